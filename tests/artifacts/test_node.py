"""Keys: what of a node is hashed, and that inputs count by their contents alone."""

import dataclasses
import typing

import pyarrow as pa
import pytest

from deltapref_jax import config
from deltapref_jax.artifacts.node import Node, in_order, runtime
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ADDED, UNHASHED, Model, Training
from deltapref_jax.files import ArtifactError


class Constant(Node, stage="constant", version=1):
    """A table that depends on `value` alone."""

    value: int
    note: str = ""

    def make(self, job):
        job.write(pa.table({"x": [self.value]}))


class Total(Node, stage="total", version=1):
    """The sum of its inputs."""

    first: Node
    others: dict[str, Node]
    scale: int = 1
    training: Training = dataclasses.field(default_factory=Training)
    model: Model = dataclasses.field(default_factory=Model)
    mesh: str = runtime(default="")
    where: str = runtime(default="")

    def make(self, job):
        tables = [job.table(self.first), *job.tables(self.others).values()]
        job.stats["made"] = 1.0
        job.write(pa.table({"x": [self.scale * sum(t["x"][0].as_py() for t in tables)]}))


class Total2(Node, stage="total", version=2):
    """The next version of the stage."""

    first: Node
    others: dict[str, Node]
    scale: int = 1
    training: Training = dataclasses.field(default_factory=Training)
    model: Model = dataclasses.field(default_factory=Model)


class Sum(Node, stage="sum", version=1):
    """Another stage of the same config and inputs."""

    first: Node
    others: dict[str, Node]
    scale: int = 1
    training: Training = dataclasses.field(default_factory=Training)
    model: Model = dataclasses.field(default_factory=Model)


def total(kind=Total, label="total", others=("b",), **fields):
    given = {"first": constant(1)} | fields
    named = {name: constant(2) for name in others}
    return kind(label=(label,), **({"others": named} | given))


def constant(value, note="", label="c"):
    return Constant(label=(label,), value=value, note=note)


CONTENTS = {"first": "1", "others/b": "2"}


def test_key_hashes_stage_version_config_and_contents_but_not_label_and_runtime():
    node = total()
    assert total(label="another", mesh="2", where="/there").key(CONTENTS) == node.key(CONTENTS)
    assert total(first=constant(7)).key(CONTENTS) == node.key(CONTENTS)  # an input's is its own
    others = [
        total(Sum).key(CONTENTS),
        total(scale=2).key(CONTENTS),
        total(Total2).key(CONTENTS),
        total(training=Training(rows=4)).key(CONTENTS),
        node.key({"first": "1", "others/c": "2"}),
        node.key({"first": "2", "others/b": "1"}),
    ]
    assert len({node.key(CONTENTS), *others}) == 7
    assert list(node.inputs()) == list(CONTENTS)
    assert [n.stage for n in in_order([node, node])] == ["constant", "constant", "total"]


def test_config_is_plain_data_without_what_is_not_hashed():
    node = total(where="/there", model=Model("/there", "bfloat16"))
    assert node.config().keys() == {"scale", "training", "model"}
    assert node.config()["model"] == {"dtype": "bfloat16", "quantization": ""}
    assert {"checkpoint_every", "keep_checkpoints"}.isdisjoint(node.config()["training"])
    described = node.describe()
    assert described.keys() == {"label", "scale", "training", "model", "mesh", "where"}
    model = {"path": "/there", "dtype": "bfloat16", "quantization": "", "revision": ""}
    assert described["model"] == model
    assert described["training"]["checkpoint_every"] == Training().checkpoint_every


def unhashed():
    """Fields of the config's dataclasses that say of themselves that they are not hashed."""
    kinds = [x for x in vars(config).values() if dataclasses.is_dataclass(x)]
    return [(k, f) for k in kinds for f in dataclasses.fields(k) if f.metadata == UNHASHED]


def other(value):
    """Another value of the same type."""
    if dataclasses.is_dataclass(value):
        field = dataclasses.fields(value)[0].name
        return dataclasses.replace(value, **{field: other(getattr(value, field))})
    return (*value, "x") if isinstance(value, tuple) else value + type(value)(1)


class Newer(Node, stage="newer", version=1):
    """Has fields that are newer than artifacts."""

    size: int
    mode: str = dataclasses.field(default="plain", metadata=ADDED)
    names: tuple = dataclasses.field(default_factory=tuple, metadata=ADDED)


def test_a_newer_field_changes_keys_where_it_is_not_its_default_alone():
    class Older(Node, stage="newer", version=1):
        size: int

    before = Older(label=("x",), size=3).key({})
    assert Newer(label=("x",), size=3).key({}) == before
    keys = {before} | {
        Newer(label=("x",), size=3, **fields).key({})
        for fields in ({"mode": "other"}, {"names": ("a",)}, {"mode": "other", "names": ("a",)})
    }
    assert len(keys) == 4


class Holder(Node, stage="holder", version=1):
    """Has a dataclass of the config."""

    held: typing.Any


@pytest.mark.parametrize(
    ("kind", "field"), [pytest.param(k, f, id=f"{k.__name__}.{f.name}") for k, f in unhashed()]
)
def test_a_field_that_is_not_hashed_changes_no_key(kind, field):
    held = kind(**{f.name: "x" for f in dataclasses.fields(kind) if required(f)})
    changed = dataclasses.replace(held, **{field.name: other(getattr(held, field.name))})
    assert changed != held
    nodes = [Holder(label=("x",), held=x) for x in (held, changed)]
    assert nodes[0].key({}) == nodes[1].key({})
    assert nodes[0].describe() != nodes[1].describe()


def required(field):
    return field.default is field.default_factory is dataclasses.MISSING


def test_the_fields_that_are_not_hashed_are_these():
    """A field that changes what is made must not be among them."""
    assert {f"{kind.__name__}.{field.name}" for kind, field in unhashed()} == {
        "Model.path",
        "Model.revision",
        "Prompts.name",
        "Prompts.path",
        "Prompts.revision",
        "Generator.about",
        "Generator.mesh",
        "Judge.mesh",
        "Objective.name",
        "Sampling.mesh",
        "Scoring.mesh",
        "Training.checkpoint_every",
        "Training.finishes",
        "Training.keep_checkpoints",
        "Training.mesh",
        "Training.offload_moments",
        "Experiment.workspace",
        "Experiment.trackers",
        "Experiment.table",
        "Pairs.name",
        "Pairs.path",
        "Pairs.revision",
        "Pairs.workers",
    }


def test_a_key_is_known_once_the_inputs_are_complete(tmp_path):
    workspace, node = Workspace(tmp_path), total()
    assert workspace.key(node.first) is not None
    assert workspace.key(node) is None
    assert not workspace.complete(node)
    with pytest.raises(
        ArtifactError,
        match=rf"^The inputs of total are not in {tmp_path}; run the study first\.$",
    ):
        workspace.path(node)
    run([node.first], workspace, show=False)
    assert workspace.key(node) is None  # the other input is missing yet
    run([node], workspace, show=False)
    assert workspace.key(node) == workspace.path(node).name
    assert workspace.complete(node)


def test_an_input_made_again_with_equal_contents_leaves_what_is_behind_it_complete(tmp_path):
    workspace = Workspace(tmp_path)
    node = total()
    run([node], workspace, show=False)
    same = total(first=constant(1, note="in another manner"))
    assert workspace.key(same.first) != workspace.key(node.first)
    run([same.first], workspace, show=False)
    assert workspace.manifest(same.first).content == workspace.manifest(node.first).content
    assert workspace.key(same) == workspace.key(node)
    assert workspace.complete(same)

    differs = total(first=constant(5))
    run([differs.first], workspace, show=False)
    assert workspace.key(differs) not in (None, workspace.key(node))
    assert not workspace.complete(differs)
    run([differs], workspace, show=False)
    assert workspace.table(differs)["x"].to_pylist() == [7]
    assert workspace.table(same)["x"].to_pylist() == [3]


def test_nodes_of_one_key_are_one_artifact(tmp_path):
    """Equal config and contents: the second is not made, whatever it is called."""
    workspace = Workspace(tmp_path)
    run([total(), total(label="again", where="/there")], workspace, "study", show=False)
    assert len(list((tmp_path / "total").iterdir())) == 1
    names = {path.name for path in (tmp_path / "by_name" / "study").iterdir()}
    assert names == {"c", "total", "again"}
