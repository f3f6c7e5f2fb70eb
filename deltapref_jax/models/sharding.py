"""Where parameters lie on a mesh: one table of path pattern to axes.

Optimizer moments have their parameter's path inside their own, so the same table places them.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\b(embed|head)$", ("tensor", "fsdp")),  # [V, D]
    (r"\bblocks\.(q|k|v)$", (None, "fsdp", "tensor", None)),  # [layers, D, N or K, H]
    (r"\bblocks\.o$", (None, "tensor", None, "fsdp")),  # [layers, N, H, D]
    (r"\bblocks\.(gate|up)$", (None, "fsdp", "tensor")),  # [layers, D, F]
    (r"\bblocks\.down$", (None, "tensor", "fsdp")),  # [layers, F, D]
    (r"\bblocks\.(q|k|v|gate|up)_a$", (None, "fsdp", None)),  # [layers, D, rank]
    (
        r"\bblocks\.(q|k|v|gate|up)_b$",
        (None, None, "tensor"),
    ),  # [layers, rank, N or K, H] or [layers, rank, F]
    (r"\bblocks\.(o|down)_a$", (None, "tensor")),  # [layers, N, H, rank] or [layers, F, rank]
    (r"\bblocks\.(o|down)_b$", (None, None, "fsdp")),  # [layers, rank, D]
    (r"(norm|\bblocks\.scale)$", ()),  # replicated
    (r"\b(count|step)$", ()),  # scalars of the optimizer
)

BATCH = PartitionSpec(("data", "fsdp"), "context")
"""Rows and columns of a packed batch."""

ROWS = PartitionSpec(("data", "fsdp"))
"""Rows alone: slots of the sampler."""


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks.q` of a tree path, whatever the containers; nnx's trailing `value` is dropped."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))).lstrip(".")
        for key in path
    ]
    return ".".join(part for part in parts if part not in ("value", "raw_value"))


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The one rule that matches `name`; an axis that does not divide its dimension is replicated.

    Raises:
      ValueError: no rule matches, or several do.
    """
    found = [axes for pattern, axes in RULES if re.search(pattern, name)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} sharding rules match the parameter {name!r} of shape {shape}; "
            "exactly one must: see models.sharding.RULES."
        )
    axes = found[0]
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=False)
        )
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for parameters or for a whole training state (arrays or their shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh)), tree
    )
