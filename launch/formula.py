"""What a program needs by formula, where there is no compiler for its devices.

Memory is that of `models.memory`. Traffic is a lower bound: arguments are read once in a call (in
every step of a decoding chunk), weights are gathered over fsdp once forward and once backward, in
the dtype of the computation or quantised, and gradients of what is trained are scattered there in
float32 and summed over data.
"""

import math
from typing import TYPE_CHECKING

from deltapref_jax.models.memory import BYTES
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.spec import ModelSpec

if TYPE_CHECKING:
    from deltapref_jax.stages.programs import StageProgram
    from launch.compile_programs import Result

_F32 = 4


def estimate(result: "Result", each: "StageProgram") -> None:
    """Fills in peak, memory traffic and collectives.

    Args:
      result: what is known of the program.
      each: the program.
    """
    dtype_bytes = BYTES[each.dtype]
    result.peak = max(result.arguments, int(each.memory) - result.beside if each.flops else 0)
    steps = each.program.trips if each.name == "decode" else 1
    result.memory_traffic = float(steps * result.arguments)
    mesh, tensor = result.mesh, result.mesh["tensor"]
    count, size = (x / tensor for x in _divided(each.spec, each.dtype))
    trained = each.trained / tensor
    found = []

    def add(kind: str, axis: str, size: float, times: int = 1) -> None:
        group = mesh[axis]
        if group > 1:
            found.append((kind, axis, group, times * size * (group - 1) / group, float(times)))

    if each.name == "gradient":
        add("all-gather", "fsdp", size, 2)
        add("reduce-scatter", "fsdp", min(count, trained) * _F32)
        add("all-reduce", "data", 2 * trained * _F32 / mesh["fsdp"])
    elif each.name in ("logprobs", "labels", "prefill"):
        add("all-gather", "fsdp", size)
    elif each.name == "decode":
        add("all-gather", "fsdp", size, steps)
    # Two sums of the hidden states a layer, forward; twice as many backward.
    rows = each.tokens / (mesh["data"] * mesh["fsdp"] * mesh["context"])
    sums = each.spec.layers * (4 if each.name == "gradient" else 2)
    add("all-reduce", "tensor", 2 * rows * each.spec.width * dtype_bytes, sums if rows else 0)
    result.collectives = [c for c in found if c[3]]


def _divided(spec: ModelSpec, dtype: str) -> tuple[int, int]:
    """Numbers and bytes of the weights that are gathered over fsdp.

    Those are the ones that lie divided over it, but for an embedding that is no head too: of it
    only the rows of a batch's tokens are sent.
    """
    sizes = [
        (math.prod(p.shape(spec)) * (spec.layers if p.stacked else 1), p.stored_dtype(spec, dtype))
        for p in parameters(spec).values()
        if "fsdp" in p.axes and (spec.tied or p.name != "embed")
    ]
    return sum(n for n, _ in sizes), sum(n * stored.itemsize for n, stored in sizes)
