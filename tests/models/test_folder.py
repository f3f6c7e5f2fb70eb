import json
import shutil

import pytest

from deltapref_jax.hub import repository
from deltapref_jax.models import weights as weights_module
from deltapref_jax.models.folder import resolve, weights_hash
from deltapref_jax.models.weights import export, inspect_model, load

NAME = "someone/tiny"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch):
    """The tiny model in several files with an index."""
    monkeypatch.setattr(weights_module, "_SHARD_BYTES", 20_000)
    export_to = tmp_path / "sharded"
    export(tiny.state, tiny.spec, tiny.text, export_to)
    return export_to


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights_asked(hub):
    return [r for r in hub.requests if "safetensors" in r[1] and "index" not in r[1]]


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_model_on_the_hub_is_checked_and_hashed_without_its_weights(hub, request, kind):
    local = request.getfixturevalue(kind)
    (local / "other.safetensors").write_bytes(b"stray" * kind.count("sharded"))
    hub.push(NAME, local)
    spec, text = inspect_model(NAME)
    assert spec == inspect_model(str(local))[0]
    assert text.identity == inspect_model(str(local))[1].identity
    assert weights_hash(NAME) == weights_hash(str(local))
    # of the weights, nothing but the beginning of each file was asked for
    assert weights_asked(hub) and all(r[2] == "bytes=0-100000" for r in weights_asked(hub))
    assert not list((resolve_root(local, NAME)).glob("*.safetensors"))


def resolve_root(_, name):
    import pathlib

    return pathlib.Path(resolve(name, weights=False))
