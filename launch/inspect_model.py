"""Describes a model without reading its weights: what it is, how it is sharded, what it needs.

    python -m launch.inspect_model PATH
    python -m launch.inspect_model PATH --meshes=fsdp=8,fsdp=4:tensor=2 --json=model.json

PATH is a Hugging Face folder, a hub name (`organisation/model`, `@` and a revision behind it where
one is wanted) or a GGUF file. A config.json alone is enough; where weights are there, the shapes of
their tensors are compared with it. A model that is not supported ends with the sentence that
training would end with.
"""

import collections
import json
import math
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from deltapref_jax.config import (
    QUANTIZATIONS,
    ConfigError,
    Lora,
    MeshShape,
    Training,
    check_choice,
)
from deltapref_jax.display import count, printable
from launch.flags import define_output, run_main

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
_QUANTIZATION = flags.DEFINE_enum(
    "quantization", "", list(QUANTIZATIONS), "Format of the matrices of layers in decoding."
)
_JSON = define_output("json")


def describe(path: str, meshes: dict[str, MeshShape]) -> dict[str, Any]:
    """Returns what is printed, as a JSON object.

    Raises:
      FileNotFoundError: there is no model.
      ValueError: it is not supported.
    """
    from deltapref_jax.models.config_json import fields_of
    from deltapref_jax.models.families import FAMILIES
    from deltapref_jax.models.lora import fit_lora
    from deltapref_jax.models.memory import sampling_memory, training_memory
    from deltapref_jax.models.parameters import matrices, parameters, weight_bytes
    from deltapref_jax.models.sharding import undivided
    from deltapref_jax.models.weights import abstract, describe_files

    stored, text = describe_files(path)
    spec = stored.spec
    decoding = spec.quantised(_QUANTIZATION.value)
    kinds = collections.Counter(
        (f"window {kind.window}" if kind.window else "full attention")
        + (", no position embedding" if kind.rope is None else f", rope {kind.rope}")
        + (", attention sinks" if spec.sinks else "")
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
            "decoding": sampling_memory(decoding, _SLOTS.value, _LENGTH.value, "bfloat16", mesh),
            "whole": undivided(tree, axes),
        }
    return {
        "path": path,
        "family": spec.family,
        "architecture": FAMILIES[spec.family].architecture,
        "parameters": spec.parameters,
        "active_parameters": _active(spec),
        "quantization": decoding.quantization,
        "weight_bytes": weight_bytes(decoding, "bfloat16"),
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
        "weights": bool(stored.shapes),
        "lora_targets": list(fit_lora(Lora(), spec).targets),
        "end_ids": list(text.end_ids) if text else [],
        "fields": fields_of(stored.config),
        "meshes": sizes,
    }


def _active(spec: Any) -> int:
    """Parameters that one token meets: of experts, those that it is sent to."""
    from deltapref_jax.models.parameters import block_parameters

    experts = spec.experts
    if not experts:
        return spec.parameters
    of_experts = (p for p in block_parameters(spec).values() if p.of_experts)
    held = sum(math.prod(p.shape(spec)) for p in of_experts) // experts.total  # by each of them
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
        f"{spec['head_width']}, {spec['kv_heads']} for keys and values, {_mlp(spec)}, "
        f"{'tied' if spec['tied'] else 'untied'} embedding, at most {spec['max_positions']:,} "
        "positions"
    )
    held = f"{model['quantization']} matrices" if model["quantization"] else "bfloat16"
    say(f"{model['weight_bytes'] / 2**30:,.2f} GiB of weights in decoding, with {held}")
    for i, rope in enumerate(model["ropes"]):
        scaled = "frequencies scaled" if rope["factors"] else "plain"
        long = f", others in sequences above {rope['original']:,} tokens"
        say(
            f"rope {i}: base {rope['theta']:,.0f}, {scaled}{long if rope['long_factors'] else ''}"
            + (f", {rope['width']} dimensions of a head" if rope["width"] else "")
        )
    for kind, number in model["layers_by_kind"].items():
        say(f"{count(number, 'layer')}: {kind}")
    say(f"adapters (LoRA) without named targets: {', '.join(model['lora_targets'])}")
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
    if not model["weights"]:
        say("There are no weights beside config.json, so that no tensor was compared with it.")


def _mlp(spec: dict[str, Any]) -> str:
    """The width of the MLP, or the experts in its place."""
    if experts := spec["experts"]:
        return (
            f"{experts['total']} experts of {experts['mlp']:,} in place of the MLP, "
            f"{experts['active']} of them for a token"
        )
    return f"MLP {spec['mlp']:,}"


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name)
    return table


def read_meshes(text: str) -> dict[str, MeshShape]:
    """Reads meshes such as "fsdp=4:tensor=2,fsdp=8".

    Raises:
      ConfigError: an axis is unknown or there twice, a mesh is there twice, or a number is none.
    """
    meshes = {}
    for name in text.split(","):
        sizes: dict[str, int] = {}
        if name in meshes:
            raise ConfigError(f"--meshes has {name!r} twice; give each mesh once.")
        for part in name.split(":"):
            axis, _, number = part.partition("=")
            check_choice("--meshes", axis, ("data", "fsdp", "tensor", "context"))
            if not number.isdecimal() or not 1 <= int(number) <= 1 << 20:
                raise ConfigError(
                    f"--meshes has {part!r}; an axis needs a number of devices, such as {axis}=4."
                )
            if axis in sizes:
                raise ConfigError(f"--meshes has {axis} twice in {name!r}; give each axis once.")
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
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--model={sys.argv[1]}"
    flags.mark_flag_as_required("model")
    run_main(main)
