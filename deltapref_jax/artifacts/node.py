"""Artifacts wanted, before any is made: a stage with its config and inputs, as one typed object.

A stage is a subclass of `Node`, and a node is an instance of it. Three kinds of fields make a node:

    config     numbers, text and dataclasses of `config`: hashed
    inputs     other nodes, or mappings of names to nodes: hashed by their *contents*
    runtime    declared with `runtime()`: paths, meshes, trackers; carried along and never hashed

The key of an artifact is a hash of its stage, version, config and the contents of its inputs. Two
nodes with one key are one artifact, and an input that was made again with equal contents changes no
key behind it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

from deltapref_jax.config import ADDED, UNHASHED
from deltapref_jax.records import digest

if TYPE_CHECKING:
    from deltapref_jax.artifacts.job import Job

Label = tuple[str, ...]


def runtime(*, default: Any = dataclasses.MISSING) -> Any:
    """A field that a node carries and that is not part of its key, such as a path or a mesh."""
    return dataclasses.field(default=default, metadata=UNHASHED)


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    eq_default=False,
    field_specifiers=(dataclasses.field, runtime),
)
class _Dataclasses:
    """Makes every subclass a frozen dataclass with keyword arguments, equal to itself alone."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, kw_only=True)(cls)


class Node(_Dataclasses):
    """An artifact wanted. A subclass is declared as `class Name(Node, stage="folder", version=1)`.

    With `sharded=True` several runners share the artifact, shard by shard (`Job.shards`); otherwise
    one of them holds it while it is made.

    A new version makes all artifacts of the stage stale: raise it when `make` gives other contents.

    Attributes:
      label: what the artifact is called in the study, for people: ("judge", "exact", "weak").
    """

    stage: ClassVar[str]
    version: ClassVar[int]
    sharded: ClassVar[bool]
    label: Label = runtime()

    def __init_subclass__(cls, stage: str = "", version: int = 0, sharded: bool = False):
        super().__init_subclass__()
        if stage:
            cls.stage, cls.version, cls.sharded = stage, version, sharded

    def make(self, job: "Job") -> None:
        """Makes the artifact: writes its table or files, and puts counts into `job.stats`."""
        raise NotImplementedError(f"The stage {self.stage!r} has no make().")

    def batch(self) -> Any:
        """Sharded nodes that return the same go to one `make_batch`; None: `make` makes each."""
        return None

    @classmethod
    def make_batch(cls, work: "Sequence[tuple[Self, Job]]") -> None:
        """Makes the shards of several artifacts from one pool (`shards.make_shards`)."""
        raise NotImplementedError(f"The stage {cls.stage!r} has no make_batch().")

    @property
    def name(self) -> str:
        """The label as one word."""
        return "/".join(self.label)

    def inputs(self) -> dict[str, "Node"]:
        """Every input by its field's name; those of a mapping are called `field/name`."""
        named: dict[str, Node] = {}
        for field in dataclasses.fields(self):
            named |= _flatten(field.name, getattr(self, field.name))
        return named

    def config(self) -> dict[str, Any]:
        """What is hashed of the node besides its inputs, as plain data."""
        return _plain(self, hashed=True)

    def describe(self) -> dict[str, Any]:
        """Config and runtime as plain data, for the manifest."""
        return _plain(self, hashed=False)

    def key(self, contents: Mapping[str, str]) -> str:
        """16 hex digits; `contents`: of every input by name (see `inputs`)."""
        return digest(self.stage, self.version, self.config(), dict(contents))


def _flatten(name: str, value: Any) -> dict[str, Node]:
    if isinstance(value, Node):
        return {name: value}
    if not isinstance(value, Mapping):
        return {}
    return {
        path: node
        for key, part in value.items()
        for path, node in _flatten(f"{name}/{key}", part).items()
    }


def _plain(value: Any, hashed: bool) -> Any:
    """Dataclasses, mappings and tuples as JSON's types, without nodes.

    With `hashed` the fields that are not hashed are left out too, and those that were added later
    and have their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Inputs are left out, because their contents are hashed and not their config.
        return {
            field.name: _plain(getattr(value, field.name), hashed)
            for field in dataclasses.fields(value)
            if not (hashed and _unhashed(value, field))
            and not _flatten(field.name, getattr(value, field.name))
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(part, hashed) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part, hashed) for part in value]
    return value


def _unhashed(value: Any, field: dataclasses.Field[Any]) -> bool:
    if field.metadata != ADDED:
        return field.metadata == UNHASHED
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return bool(getattr(value, field.name) == default)


def first_of_equals(nodes: Iterable[Node]) -> dict[Node, Node]:
    """Maps nodes to the first one that is the same artifact, such as the pairs of two arms.

    It is known before any is made: equal inputs will have equal contents. Nodes whose artifacts
    turn out to have equal inputs by their contents alone remain two.

    Args:
      nodes: in the order of `in_order`, with everything behind them.
    """
    identities: dict[Node, str] = {}
    first: dict[str, Node] = {}
    for node in nodes:
        inputs = {name: identities[source] for name, source in node.inputs().items()}
        identities[node] = digest(node.stage, node.version, node.config(), inputs)
        first.setdefault(identities[node], node)
    return {node: first[identity] for node, identity in identities.items()}


def distinct(wanted: Iterable[Node]) -> list[Node]:
    """Every node behind `wanted` in order, once per artifact: what counts of artifacts count."""
    return [node for node, first in first_of_equals(in_order(wanted)).items() if node is first]


def in_order(wanted: Iterable[Node]) -> list[Node]:
    """Every node behind `wanted`, inputs before what needs them, each node once."""
    # A dict keeps insertion order and serves as an ordered set.
    ordered: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in ordered:
            for source in node.inputs().values():
                visit(source)
            ordered[node] = None

    for node in wanted:
        visit(node)
    return list(ordered)
