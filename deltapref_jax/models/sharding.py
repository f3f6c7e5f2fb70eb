"""Sharding of parameters over a mesh: one table from path patterns to mesh axes.

The path of an optimizer moment ends with its parameter's path, so the same table shards both.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\b(embed|head)$", ("tensor", "fsdp")),  # [V, D]
    # Over `tensor`, q, k, v, gate and up are split by their outputs, and o and down by their
    # inputs, so that one sum over devices ends each half of a block (Megatron-LM, arXiv
    # 1909.08053).
    (r"\bblocks\.(q|k|v)$", (None, "fsdp", "tensor", None)),  # [layers, D, N or K, H]
    (r"\bblocks\.o$", (None, "tensor", None, "fsdp")),  # [layers, N, H, D]
    (r"\bblocks\.(gate|up)$", (None, "fsdp", "tensor")),  # [layers, D, F]
    (r"\bblocks\.down$", (None, "tensor", "fsdp")),  # [layers, F, D]
    (r"\bblocks\.(q|k|v|gate|up)_a$", (None, "fsdp", None)),  # [layers, D, rank]
    # [layers, rank, N or K, H] or [layers, rank, F]
    (r"\bblocks\.(q|k|v|gate|up)_b$", (None, None, "tensor")),
    (r"\bblocks\.(o|down)_a$", (None, "tensor")),  # [layers, N, H, rank] or [layers, F, rank]
    (r"\bblocks\.(o|down)_b$", (None, None, "fsdp")),  # [layers, rank, D]
    (r"(norm|\bblocks\.scale)$", ()),  # replicated
    (r"\b(count|step)$", ()),  # scalars of the optimizer
)
"""(Pattern of a parameter's path, mesh axis of each leading dimension): see `spec_for`."""

BATCH = PartitionSpec(("data", "fsdp"), "context")
"""Sharding of rows and columns of a packed batch."""

ROWS = PartitionSpec(("data", "fsdp"))
"""Sharding of rows alone, such as the slots of the sampler."""


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a tree path, such as `blocks.q`, for containers of any kind.

    The `value` that NNX appends to the path of a variable is dropped.
    """
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))).lstrip(".")
        for key in path
    ]
    return ".".join(part for part in parts if part not in ("value", "raw_value"))


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the sharding of a parameter, by the one rule that matches its name.

    A dimension that its mesh axis does not divide is replicated.

    Raises:
      ValueError: no rule matches, or several do.
    """
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(_rule(name, shape), shape, strict=False)
        )
    )


def _rule(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Mesh axes of the leading dimensions of a parameter, by the one rule that matches its name."""
    # All rules are tried: a parameter that two of them match is as much an error as one of none.
    matches = [axes for pattern, axes in RULES if re.search(pattern, name)]
    if len(matches) != 1:
        raise ValueError(
            f"{len(matches)} sharding rules match the parameter {name!r} of shape {shape}; "
            "exactly one must: see models.sharding.RULES."
        )
    return matches[0]


def undivided(tree: Any, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Parameters that a mesh axis should divide and does not, by axis.

    Args:
      tree: parameters, or their shapes.
      sizes: devices along every mesh axis.
    """
    found: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        for axis, size in zip(_rule(name, leaf.shape), leaf.shape, strict=False):
            if axis and size % sizes[axis]:
                found.setdefault(axis, []).append(name)
    return found


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the NamedSharding of every leaf of a tree of parameters or of a training state.

    Leaves are arrays or their shapes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh)), tree
    )
