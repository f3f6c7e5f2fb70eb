"""What a program needs by formula, where there is no compiler for its devices.

Memory is that of `models.memory`. Traffic is a lower bound: arguments are read once in a call (in
every step of a decoding chunk), weights are gathered over fsdp once forward and once backward, and
gradients are scattered there in float32 and summed over data.
"""

from typing import TYPE_CHECKING

from deltapref_jax.models.memory import BYTES

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
    mesh, parameters = result.mesh, each.spec.parameters / result.mesh["tensor"]
    found = []

    def add(kind: str, axis: str, size: float, times: int = 1) -> None:
        group = mesh[axis]
        if group > 1:
            found.append((kind, axis, group, times * size * (group - 1) / group, float(times)))

    if each.name == "gradient":
        add("all-gather", "fsdp", parameters * dtype_bytes, 2)
        add("reduce-scatter", "fsdp", parameters * _F32)
        add("all-reduce", "data", 2 * parameters * _F32 / mesh["fsdp"])
    elif each.name in ("logprobs", "labels", "prefill"):
        add("all-gather", "fsdp", parameters * dtype_bytes)
    elif each.name == "decode":
        add("all-gather", "fsdp", parameters * dtype_bytes, steps)
    # Two sums of the hidden states a layer, forward; twice as many backward.
    rows = each.tokens / (mesh["data"] * mesh["fsdp"] * mesh["context"])
    sums = each.spec.layers * (4 if each.name == "gradient" else 2)
    add("all-reduce", "tensor", 2 * rows * each.spec.width * dtype_bytes, sums if rows else 0)
    result.collectives = [c for c in found if c[3]]
