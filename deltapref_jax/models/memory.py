"""Memory of a decoder by formula, in bytes per device, before anything is compiled.

Weights, gradients, moments and cache follow from shapes and are exact; activations are an estimate
of what XLA keeps, and buffers that live for a moment are not counted.
"""

from deltapref_jax.config import MeshShape, Training
from deltapref_jax.models.lora import adapters
from deltapref_jax.models.parameters import matrices, weight_bytes
from deltapref_jax.models.spec import ModelSpec

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number by its dtype."""

FROZEN = "bfloat16"
"""In which the base of adapters is stored, as published models are; a run keeps it as it is."""


def sampling_memory(spec: ModelSpec, slots: int, length: int, dtype: str, mesh: MeshShape) -> float:
    """Weights, cache, and the logits of one decoding step.

    Args:
      spec: sizes of the decoder.
      slots: rows decoded at once.
      length: positions of the cache.
      dtype: of the cache, and of the weights that the spec does not have quantised.
      mesh: an axis of -1 is counted as one device.
    """
    data, fsdp, tensor, _ = _sizes(mesh)
    cache = 2 * spec.layers * spec.kv_heads * spec.head_width * slots * length * BYTES[dtype]
    logits = slots * spec.vocab * 4
    weights = weight_bytes(spec, dtype)
    return weights / (fsdp * tensor) + (cache + logits) / (data * fsdp * tensor)


def scoring_memory(
    spec: ModelSpec, rows: int, row_length: int, dtype: str, mesh: MeshShape
) -> float:
    """Weights, and the activations of one layer, which is all that a forward pass keeps."""
    _, fsdp, tensor, _ = _sizes(mesh)
    tokens = _tokens(rows, row_length, mesh)
    weights = weight_bytes(spec, dtype) / (fsdp * tensor)
    return weights + tokens * _kept(spec, "none") * BYTES[dtype]


def training_memory(
    spec: ModelSpec,
    training: Training,
    dtype: str,
    mesh: MeshShape,
    activations: float = 1.0,
    frozen: str = FROZEN,
) -> float:
    """Weights, gradients, both moments, and the activations of a micro-batch.

    Moments that lie on the host come to the devices for the update, when no activations are there.

    Without rematerialisation a micro-batch's gradients lie beside the sum of those before it; else
    they are added to it in place.

    Activations are what rematerialisation keeps of every layer, and twice the whole of one layer,
    whose values and gradients are there while its backward pass runs. They are counted
    `activations` times.

    The base of adapters is counted in the dtype `frozen`, in which a run keeps it.
    """
    _, fsdp, tensor, _ = _sizes(mesh)
    trained = trained_parameters(spec, training)
    base = weight_bytes(spec, frozen) if training.lora.rank else 0
    moments = 2 * BYTES[training.moments]
    gradients = 2 if training.remat == "none" else 1
    held = 0 if training.offload_moments else moments
    gradient = base + trained * (4 + gradients * 4 + held)
    update = base + trained * (4 + 4 + moments)
    kept = spec.layers * _kept(spec, training.remat) + 2 * _kept(spec, "none")
    tokens = _tokens(training.rows, training.row_length, mesh)
    kept_bytes = activations * tokens * kept * BYTES[dtype]
    return max(gradient / (fsdp * tensor) + kept_bytes, update / (fsdp * tensor))


def trained_parameters(spec: ModelSpec, training: Training) -> int:
    """The number of parameters that are trained: all, or those of the adapters."""
    shape = adapters(training.lora, spec)
    if not shape.rank:
        return spec.parameters
    declared = matrices(spec)
    sides = sum(sum(declared[target].sides(spec)) for target in shape.targets)
    return spec.layers * shape.rank * sides


def _sizes(mesh: MeshShape) -> tuple[int, int, int, int]:
    """Devices along data, fsdp, tensor and context; -1 counts as 1."""
    data, fsdp, tensor, context = (
        max(1, size) for size in (mesh.data, mesh.fsdp, mesh.tensor, mesh.context)
    )
    return data, fsdp, tensor, context


def _tokens(rows: int, row_length: int, mesh: MeshShape) -> float:
    """Tokens of a packed batch on one device."""
    data, fsdp, _, context = _sizes(mesh)
    return rows * row_length / (data * fsdp * context)


def _kept(spec: ModelSpec, remat: str) -> int:
    """Numbers per token that one layer keeps for its backward pass (see `decoder.POLICIES`)."""
    # A token has the inner activations of every expert that it is sent to.
    D, F = spec.width, spec.experts.active * spec.experts.mlp if spec.experts else spec.mlp
    inner, kv = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
    return {
        # both residuals and their norms, q, k and v before and after the rotation, attention,
        # gate, up and their product
        "none": 4 * D + 3 * inner + 4 * kv + 3 * F,
        "projections": 3 * D + 2 * inner + 2 * kv + 2 * F,
        "attention": D + inner,
        "block": D,
    }[remat]
