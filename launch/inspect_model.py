"""Describes a model without reading its weights: what loads, how it is sharded, what it needs.

    python -m launch.inspect_model --model=PATH
    python -m launch.inspect_model --model=PATH --meshes=fsdp=8,fsdp=4:tensor=2 --json=model.json

PATH is a Hugging Face folder, a hub name (`organisation/model`, `@` and a revision behind it where
one is wanted) or a GGUF file. A model that is not supported ends with the sentence that training
would end with.
"""

import collections
import json
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from deltapref_jax.config import ConfigError, MeshShape, Training, check_choice
from deltapref_jax.display import printable
from launch.flags import run_main

_MODEL = flags.DEFINE_string("model", None, "A folder, a hub name or a .gguf file.")
_MESHES = flags.DEFINE_string(
    "meshes",
    "fsdp=1,fsdp=4,fsdp=8,fsdp=4:tensor=2,fsdp=16",
    "Meshes to shard over, with commas between them: axes and their devices, such as "
    "fsdp=4:tensor=2.",
)
_ROW_LENGTH = flags.DEFINE_integer(
    "row_length", 4096, "Tokens of a packed row of training, one row a device.", lower_bound=1
)
_SLOTS = flags.DEFINE_integer("slots", 64, "Rows decoded at once.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "Positions of the decoding cache.", lower_bound=1)
_REMAT = flags.DEFINE_string("remat", "attention", "What training recomputes of each layer.")
_JSON = flags.DEFINE_string("json", "", "File to write the description to, as JSON.")


def describe(path: str, meshes: dict[str, MeshShape]) -> dict[str, Any]:
    """Returns what is printed, as a JSON object.

    Raises:
      FileNotFoundError: there is no model.
      ValueError: it is not supported.
    """
    from deltapref_jax.models.config_json import fields_of
    from deltapref_jax.models.families import FAMILIES
    from deltapref_jax.models.memory import sampling_memory, training_memory
    from deltapref_jax.models.parameters import matrices, parameters
    from deltapref_jax.models.sharding import undivided
    from deltapref_jax.models.weights import abstract, open_model_files

    stored, text = open_model_files(path)
    spec = stored.spec
    kinds = collections.Counter(
        (f"window {kind.window}" if kind.window else "full attention")
        + (", no position embedding" if kind.rope is None else f", rope {kind.rope}")
        for kind in spec.kinds
    )
    tree = abstract(spec)[1]
    sizes = {}
    for name, mesh in meshes.items():
        devices = max(1, mesh.data) * max(1, mesh.fsdp)
        axes = {axis: max(1, getattr(mesh, axis)) for axis in ("data", "fsdp", "tensor", "context")}
        training = Training(row_length=_ROW_LENGTH.value, rows=devices, remat=_REMAT.value)
        sizes[name] = {
            "devices": devices * axes["tensor"] * axes["context"],
            "training": training_memory(spec, training, "bfloat16", mesh),
            "decoding": sampling_memory(spec, _SLOTS.value, _LENGTH.value, "bfloat16", mesh),
            "whole": undivided(tree, axes),
        }
    return {
        "path": path,
        "family": spec.family,
        "architecture": FAMILIES[spec.family].architecture,
        "parameters": spec.parameters,
        "active_parameters": _active(spec),
        "matrices": {
            name: [list(p.shape(spec)), list(p.axes)] for name, p in matrices(spec).items()
        },
        "arrays": len(parameters(spec)),
        "spec": {
            "vocab": spec.vocab,
            "width": spec.width,
            "layers": spec.layers,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_width": spec.head_width,
            "mlp": spec.mlp,
            "tied": spec.tied,
            "max_positions": spec.max_positions,
            "experts": spec.experts._asdict() if spec.experts else None,
        },
        "ropes": [rope._asdict() for rope in spec.ropes],
        "layers_by_kind": dict(kinds),
        "end_ids": list(text.end_ids),
        "fields": fields_of(stored.config),
        "meshes": sizes,
    }


def _active(spec: Any) -> int:
    """Parameters that one token meets: of experts, those that it is sent to."""
    from deltapref_jax.models.parameters import matrices

    experts = spec.experts
    if not experts:
        return spec.parameters
    held = sum(a * b for p in matrices(spec).values() if p.batch for a, b in [p.sides(spec)])
    return spec.parameters - spec.layers * held * (experts.total - experts.active)


def show(console: Console, model: dict[str, Any]) -> None:
    """Prints a description."""

    def say(sentence: str) -> None:
        console.print(printable(sentence), highlight=False, markup=False)

    spec, active = model["spec"], model["active_parameters"]
    say(f"{model['path']}: {model['architecture']} ({model['family']})")
    met = "" if active == model["parameters"] else f", {active:,} of them active in a token"
    say(
        f"{model['parameters']:,} parameters{met}; vocabulary {spec['vocab']:,}, width "
        f"{spec['width']:,}, {spec['layers']} layers, {spec['heads']} heads of "
        f"{spec['head_width']}, {spec['kv_heads']} for keys and values, MLP {spec['mlp']:,}, "
        f"{'tied' if spec['tied'] else 'untied'} embedding, at most {spec['max_positions']:,} "
        "positions"
    )
    for i, rope in enumerate(model["ropes"]):
        scaled = "frequencies scaled" if rope["factors"] else "plain"
        long = f", others in sequences above {rope['original']:,} tokens"
        say(
            f"rope {i}: base {rope['theta']:,.0f}, {scaled}{long if rope['long_factors'] else ''}"
            + (f", {rope['width']} dimensions of a head" if rope["width"] else "")
        )
    for kind, count in model["layers_by_kind"].items():
        say(f"{count} layers: {kind}")
    table = _table("matrix", "shape", "mesh axes")
    for name, (shape, axes) in model["matrices"].items():
        table.add_row(
            name, " x ".join(f"{n:,}" for n in shape), ", ".join(axis or "-" for axis in axes)
        )
    console.print(table)
    table = _table("mesh", "devices", "training", "decoding", "whole on every device")
    for name, of_mesh in model["meshes"].items():
        whole = [f"{axis}: {', '.join(names)}" for axis, names in of_mesh["whole"].items()]
        gib = (f"{of_mesh[kind] / 2**30:,.2f} GiB" for kind in ("training", "decoding"))
        table.add_row(name, str(of_mesh["devices"]), *gib, "; ".join(whole) or "-")
    console.print(table)
    say(
        "GiB per device by formula (weights, gradients, moments and what remat "
        f"{_REMAT.value!r} keeps of one row of {_ROW_LENGTH.value:,} tokens a device; weights and "
        f"a cache of {_SLOTS.value} x {_LENGTH.value:,} positions), with bfloat16 computation."
    )
    for kind, names in model["fields"].items():
        if names:
            say(f"config.json, {kind}: {', '.join(names)}")


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name)
    return table


def read_meshes(text: str) -> dict[str, MeshShape]:
    """Reads meshes such as "fsdp=4:tensor=2,fsdp=8".

    Raises:
      ConfigError: an axis is unknown, or a number is none.
    """
    meshes = {}
    for name in text.split(","):
        sizes = {}
        for part in name.split(":"):
            axis, _, number = part.partition("=")
            check_choice("--meshes", axis, ("data", "fsdp", "tensor", "context"))
            if not number.isdecimal() or not 1 <= int(number) <= 1 << 20:
                raise ConfigError(
                    f"--meshes has {part!r}; an axis needs a number of devices, such as {axis}=4."
                )
            sizes[axis] = int(number)
        meshes[name] = MeshShape(**sizes)
    return meshes


def main(_: list[str]) -> None:
    """Prints the description of the model that the command names."""
    path = str(_MODEL.value)
    check_choice("--remat", _REMAT.value, ("none", "projections", "attention", "block"))
    model = describe(path, read_meshes(_MESHES.value))
    show(Console(), model)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(model, indent=2) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("model")
    run_main(main)
