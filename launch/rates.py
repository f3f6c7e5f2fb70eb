"""What finished artifacts of a workspace took: seconds, tokens and bytes per sequence.

Manifests hold seconds, counts and sizes of files. An artifact is like another if their stage is the
same and their models have the same sizes and dtype; what it took is then what the other will take.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from etils import epath

from deltapref_jax.artifacts.workspace import Manifest, Workspace
from deltapref_jax.config import DIMENSIONS, OBJECTIVE_KINDS
from deltapref_jax.models.spec import ModelSpec

_JUDGING = ("judge", "audit", "retest")
_MOST = 200  # manifests read of a stage: in a bucket each of them is a request

# What must agree: the stage, and of its model the sizes with the format of quantised matrices, the
# dtype and the rank of adapters.
Kind = tuple[str, ModelSpec | None, str, int]


@dataclasses.dataclass
class Taken:
    """Sums over finished artifacts of one kind.

    Attributes:
      sequences: that a model read or wrote, or rows of a table that no model made.
      disk: bytes of files, without those of checkpoints.
    """

    artifacts: int = 0
    sequences: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    disk: float = 0.0


@dataclasses.dataclass
class Rates:
    """What finished artifacts took, by kind.

    Attributes:
      machine: the devices that the newest of them was made on; others are not counted.
      artifacts: how many are counted.
    """

    taken: dict[Kind, Taken]
    machine: str = ""
    artifacts: int = 0


def sequences_of_step(objective: str, fraction: float, pairs_per_step: int) -> tuple[int, int]:
    """Sequences that a training step trains on, and those that KTO's baseline is measured on.

    Args:
      objective: its kind.
      fraction: `Objective.baseline_fraction`.
      pairs_per_step: of the training.
    """
    kind = OBJECTIVE_KINDS[objective]
    trained = pairs_per_step * (1 if kind.unit == "token" else 2)
    # Rounded up, as `training.data` draws them.
    return trained, math.ceil(fraction * trained) if kind.baseline else 0


def read_rates(workspace: Workspace, spec_of: Callable[[str, str], ModelSpec | None]) -> Rates:
    """Reads what is finished in a workspace.

    Args:
      workspace: that the plan is for.
      spec_of: (hash of weights, path) to a model's sizes; None if the model is not known.
    """
    found: list[tuple[str, str, Kind, Taken]] = []
    if workspace.root.exists():
        for stage in sorted(p for p in workspace.root.iterdir() if p.is_dir()):
            for folder in sorted(stage.iterdir())[:_MOST] if stage.name != "by_name" else ():
                manifest = _read(folder / "manifest.json")
                kind = manifest and _kind(manifest, spec_of)
                if manifest and kind:
                    found.append((manifest.ended, _machine(manifest), kind, _taken(manifest)))
    if not found:
        return Rates({})
    machine = max(found, key=lambda each: each[0])[1]
    rates = Rates({}, machine)
    for _, where, kind, taken in found:
        if where == machine:
            total = rates.taken.setdefault(kind, Taken())
            for field in dataclasses.fields(Taken):
                value = getattr(total, field.name) + getattr(taken, field.name)
                setattr(total, field.name, value)
            rates.artifacts += 1
    return rates


def _read(path: epath.Path) -> Manifest | None:
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not finished, or not of this version
        return None


def _machine(manifest: Manifest) -> str:
    """The devices that made an artifact, such as "8 x TPU v5e"."""
    kind, count = (manifest.versions.get(name, "?") for name in ("device", "devices"))
    return f"{count} x {kind}"


def _kind(manifest: Manifest, spec_of: Callable[[str, str], ModelSpec | None]) -> Kind | None:
    """The kind of a finished artifact; None where its model is not known."""
    c = manifest.config
    model: dict[str, Any] | None = None
    if manifest.stage in ("score", "evaluate"):
        model = c.get("model")
    elif manifest.stage == "train":
        model = c.get("student")
    elif manifest.stage == "sample":
        model = c.get("generator", {}).get("model")
    elif manifest.stage in _JUDGING and c.get("judge", {}).get("kind") != "exact":
        model = c.get("judge", {}).get("model")
    if model is None:
        return manifest.stage, None, "", 0
    weights = c.get("student_weights") or c.get("weights", "")
    spec = spec_of(weights, model.get("path", ""))
    rank = c.get("training", {}).get("lora", {}).get("rank", 0)
    if spec is None:
        return None
    spec = spec.quantised(model.get("quantization", ""))
    return manifest.stage, spec, c.get("dtype") or model.get("dtype", ""), rank


def _taken(manifest: Manifest) -> Taken:
    stats, c = manifest.stats, manifest.config
    sequences = stats.get("rows", 1.0)
    if manifest.stage == "train":
        objective, pairs = c["objective"], c["training"]["pairs_per_step"]
        read = sequences_of_step(objective["kind"], objective["baseline_fraction"], pairs)
        sequences = stats["steps"] * sum(read)
    elif manifest.stage in _JUDGING:
        sequences /= len(c["judge"].get("dimensions") or DIMENSIONS)
        # A row of a retest has the ratings of both traces of a pair.
        sequences *= 1 + (manifest.stage == "retest")
    tokens = stats.get("tokens", 0.0) + stats.get("prompt_tokens", 0.0)
    size = sum(size for size, _ in manifest.files.values())
    return Taken(1, sequences, manifest.seconds, tokens, size)
