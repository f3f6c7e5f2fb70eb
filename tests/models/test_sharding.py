"""The table shards every parameter and every optimizer moment by exactly one rule."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deltapref_jax.config import ConfigError, MeshShape
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.parameters import PARAMETERS
from deltapref_jax.models.sharding import RULES, path_name, shardings, spec_for, undivided
from deltapref_jax.models.spec import Adapters, ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.training.state import Optimizer

HERE = pathlib.Path(__file__).parent
CONFIGS = sorted(
    f for part in ("families", "published") for f in HERE.glob(f"{part}/**/config.json")
)
BIG = ModelSpec(128_256, 4096, 32, 32, 8, 128, 14_336, tied=False)
ADAPTED = Adapters(16, ("q", "k", "v", "o", "gate", "up", "down"))


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(("tied", "adapters"), [(True, ADAPTED), (False, Adapters())])
def test_exactly_one_rule_matches_every_parameter_and_every_moment(tied, adapters):
    params = abstract(dataclasses.replace(BIG, tied=tied), adapters=adapters)[1]
    moments = jax.eval_shape(Optimizer().transform().init, params)
    names = {*named(params)} | {*named(moments)}
    assert len(names) == 3 * len(named(params)) + 1  # two moments each, and the count
    assert ("head" in names) == (not tied)
    for name in names:
        (rule,) = {rule for rule in RULES if f".{name}".endswith(f".{rule}")}
        assert spec_for(name, (64,) * 4, make_mesh(MeshShape(1, 8))) is not None, rule


@pytest.mark.parametrize("place", CONFIGS, ids=lambda p: p.parent.name)
def test_exactly_one_rule_matches_every_parameter_of_a_family(place):
    for name in named(abstract(spec_from_hf(json.loads(place.read_text())))[1]):
        (rule,) = {rule for rule in RULES if f".{name}".endswith(f".{rule}")}
        assert rule == name


def test_every_declared_parameter_has_a_rule_of_as_many_axes_as_it_has():
    for p in PARAMETERS:
        layers = 1 if p.stacked else 0
        assert len(RULES[p.name]) <= layers + len(p.dims)
        assert not p.axes or len(p.axes) == len(p.dims), p.name


def test_moments_are_sharded_like_their_parameters():
    mesh = make_mesh(MeshShape(2, 2, 2))
    params = abstract(BIG, adapters=ADAPTED)[1]
    moments = jax.eval_shape(Optimizer().transform().init, params)
    expected = named(shardings(params, mesh))
    for name, sharding in named(shardings(moments, mesh)).items():
        if not name.endswith("count"):
            assert sharding == expected[re.sub(r"^.*\b(?:mu|nu)\.", "", name)], name


def test_big_parameters_are_spread_over_all_of_fsdp_and_tensor():
    mesh = make_mesh(MeshShape(1, 4, 2))
    for name, leaf in named(abstract(BIG)[1]).items():
        share = np.prod(
            named(shardings({name: leaf}, mesh))[name].shard_shape(leaf.shape)
        ) / np.prod(leaf.shape)
        assert share == (1 if name.endswith("norm") else 1 / 8), name


def test_adapters_are_sharded_like_inputs_and_outputs_of_their_matrices():
    mesh = make_mesh(MeshShape(1, 4, 2))
    specs = {
        name: sharding.spec
        for name, sharding in named(shardings(abstract(BIG, adapters=ADAPTED)[1], mesh)).items()
    }
    for name in ADAPTED.targets:
        inputs = 3 if name == "o" else 2
        whole, a, b = (
            [*specs[f"blocks.{name}{part}"], None, None, None, None] for part in ("", "_a", "_b")
        )
        assert (a[:inputs], a[inputs]) == (whole[:inputs], None)
        assert (b[1], b[2:4]) == (None, whole[inputs : inputs + 2])


def test_an_axis_that_does_not_divide_is_replicated():
    mesh = make_mesh(MeshShape(1, 4, 2))
    assert spec_for("blocks.k", (3, 16, 2, 8), mesh) == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec_for("blocks.k", (3, 18, 1, 8), mesh) == PartitionSpec(None, None, None, None)
    assert spec_for("1.mu.final_norm", (16,), mesh) == PartitionSpec()


def test_an_unknown_parameter_is_refused_with_its_name_and_shape():
    mesh = make_mesh(MeshShape())
    with pytest.raises(
        ValueError,
        match=r"^No sharding rule matches the parameter 'blocks\.routes' of shape \(2, 8\); "
        r"declare it in models\.parameters\.PARAMETERS\.$",
    ):
        shardings({"blocks": {"routes": np.zeros((2, 8))}}, mesh)


def test_mesh_sizes_must_multiply_to_the_devices():
    assert dict(make_mesh(MeshShape(-1, 2, 2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "context": 1,
    }
    assert dict(make_mesh(MeshShape(2, -1, 1)).shape) == {
        "data": 2,
        "fsdp": 4,
        "tensor": 1,
        "context": 1,
    }
    for shape, named in (
        (MeshShape(3, 1, 1), "data=3 fsdp=1 tensor=1"),
        (MeshShape(-1, 3, 1), "data=-1 fsdp=3 tensor=1"),
        (MeshShape(2, 2, 1), "data=2 fsdp=2 tensor=1"),
    ):
        with pytest.raises(ConfigError) as error:
            make_mesh(shape)
        assert str(error.value).startswith(
            f"config.mesh is {named} and there are 8 devices; the sizes must multiply to that; "
            "nearest that fits: "
        )


def test_what_an_axis_leaves_whole_is_named():
    params = abstract(BIG)[1]
    assert undivided(params, {"data": 3, "fsdp": 4, "tensor": 8, "context": 1}) == {}
    assert undivided(params, {"data": 1, "fsdp": 1, "tensor": 16, "context": 1}) == {
        "tensor": ["blocks.k", "blocks.v"]
    }
    assert undivided(params, {"data": 1, "fsdp": 3, "tensor": 1, "context": 1}).keys() == {"fsdp"}
