"""Artifacts wanted, before any is made: a stage, its config and its inputs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from deltapref_jax.records import digest


@dataclasses.dataclass(frozen=True)
class Node:
    """An artifact wanted: a stage, its config and its inputs. `label` and `local` (paths, mesh) are not hashed."""

    stage: str
    label: str
    config: Mapping[str, Any]
    inputs: Mapping[str, "Node"] = dataclasses.field(default_factory=dict)
    local: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: int = 1

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits."""
        return digest(
            self.stage,
            self.version,
            self.config,
            {name: node.key for name, node in self.inputs.items()},
        )


def in_order(wanted: Mapping[str, Node]) -> list[Node]:
    """Every node behind `wanted`, inputs before what needs them, each key once."""
    ordered: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.key not in ordered:
            for source in node.inputs.values():
                visit(source)
            ordered[node.key] = node

    for node in wanted.values():
        visit(node)
    return list(ordered.values())
