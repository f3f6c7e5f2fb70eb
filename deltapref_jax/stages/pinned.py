"""Hub names of a config with the commits that their revisions stand for."""

import dataclasses
import os
from typing import Any, TypeVar

from deltapref_jax.config import ConfigError, Model, Pairs, Prompts
from deltapref_jax.data.dataset import on_hub
from deltapref_jax.files import remote
from deltapref_jax.hub import repository
from deltapref_jax.models.folder import hub_repository

Config = TypeVar("Config")


def pinned(config: Config) -> Config:
    """Replaces every revision of a model or data set on the hub by its commit.

    The manifest of an artifact has the commit then, and a branch that moves while a study runs
    changes nothing in it.

    Raises:
      FileNotFoundError: a model is not there, or the hub does not give a model or data set.
      ConfigError: a model on this machine has a revision.
    """
    value: Any = config
    if isinstance(value, tuple):
        return tuple(pinned(item) for item in value)  # type: ignore[return-value]
    if not dataclasses.is_dataclass(value):
        return config
    fields = {f.name: pinned(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Model) and value.path:
        fields["revision"] = _model_commit(value)
    hub_data = isinstance(value, Pairs) or isinstance(value, Prompts) and value.kind == "hub"
    if hub_data and on_hub(value):
        fields["revision"] = repository(value.path, value.revision, "dataset").commit
    return dataclasses.replace(value, **fields)


def _model_commit(model: Model) -> str:
    if model.revision and (remote(model.path) or os.path.exists(model.path)):
        raise ConfigError(
            f"revision of the model {model.path} is {model.revision!r}, and it is in no "
            "repository of the hub; leave the field empty."
        )
    repo = hub_repository(model.place)
    return repo.commit if repo else ""
