"""Sharding of parameters over a mesh, by the axes that `parameters.PARAMETERS` declares.

The path of an optimizer moment ends with its parameter's path, so the same table shards both.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deltapref_jax.models.parameters import PARAMETERS


def _rules() -> dict[str, tuple[str | None, ...]]:
    """Mesh axes of every parameter's dimensions, and of its adapters', by name."""
    rules: dict[str, tuple[str | None, ...]] = {
        "blocks.scale": (),
        # Scalars of the optimizer.
        "count": (),
        "step": (),
    }
    for p in PARAMETERS:
        layers = (None,) if p.stacked else ()
        rules[p.name] = (*layers, *p.axes)
        if p.inputs and not p.batch:
            # A is sharded as the inputs of its matrix are, and B as the outputs.
            rules[f"{p.name}_a"] = (*layers, *p.axes[: p.inputs], None)
            rules[f"{p.name}_b"] = (*layers, None, *p.axes[p.inputs :])
    return rules


RULES = _rules()
"""Mesh axis of each leading dimension of a parameter, from `parameters.PARAMETERS`."""

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
    """Returns the sharding of a parameter by its name.

    A dimension that its mesh axis does not divide is replicated.

    Raises:
      ValueError: no parameter has the name.
    """
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(_rule(name, shape), shape, strict=False)
        )
    )


def _rule(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Mesh axes of the leading dimensions of the parameter that a path names."""
    # A moment's path ends with its parameter's; the longest end that is a name is the parameter.
    parts = name.split(".")
    if "blocks" in parts[:-2]:
        # Parameters of one layer (`decoder.unstacked`) are sharded as those of the stack are.
        return _rule(re.sub(r"\bblocks\.\d+\.", "blocks.", name), (0, *shape))[1:]
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    axes = next((RULES[end] for end in ends if end in RULES), None)
    if axes is None:
        raise ValueError(
            f"No sharding rule matches the parameter {name!r} of shape {shape}; declare it in "
            "models.parameters.PARAMETERS."
        )
    return axes


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
