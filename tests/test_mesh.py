"""Meshes over several slices, and placing host arrays on devices part by part."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deltapref_jax.config import ConfigError, MeshShape
from deltapref_jax.mesh import device_grid, make_mesh, place
from deltapref_jax.models.sharding import shardings


def v5e(slices, rows=2, columns=4):
    """Devices of `slices` slices of a v5e of rows × columns chips, four chips a host."""
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5 lite",
            id=(s * rows + y) * columns + x,
            process_index=((s * rows + y) * columns + x) // 4,
            coords=(x, y, 0),
            core_on_chip=0,
            slice_index=s,
        )
        for s in range(slices)
        for y in range(rows)
        for x in range(columns)
    ]


def gpus(hosts, each=4):
    """GPUs of several hosts, which JAX describes as slices."""
    return [
        types.SimpleNamespace(
            platform="gpu",
            device_kind="H100",
            id=h * each + i,
            process_index=h,
            slice_index=h,
        )
        for h in range(hosts)
        for i in range(each)
    ]


def slice_of(grid):
    return np.vectorize(lambda device: device.slice_index)(grid)


@pytest.mark.parametrize("sizes", [[2, 8, 1, 1], [4, 2, 2, 1], [2, 1, 8, 1], [16, 1, 1, 1]])
def test_data_spans_the_slices_and_the_other_axes_stay_in_one(sizes):
    grid = device_grid(sizes, v5e(2))
    assert grid.shape == tuple(sizes)
    assert sorted(device.id for device in grid.flat) == list(range(16))
    expected = np.repeat([0, 1], sizes[0] // 2)
    np.testing.assert_array_equal(
        slice_of(grid), np.broadcast_to(expected[:, None, None, None], sizes)
    )


@pytest.mark.parametrize(
    ("sizes", "devices", "sentence"),
    [
        (
            [1, 16, 1, 1],
            v5e(2),
            "config.mesh is 1 x 16 x 1 x 1 (data, fsdp, tensor, context) and the 16 devices are in "
            "2 slices; data must be a multiple of that: the nearest is 2 x 8 x 1 x 1.",
        ),
        (
            [2, 4, 4, 1],
            v5e(4),
            "config.mesh is 2 x 4 x 4 x 1 (data, fsdp, tensor, context) and the 32 devices are in "
            "4 slices; data must be a multiple of that: the nearest is 4 x 2 x 4 x 1.",
        ),
        (
            [1, 1, 8, 1],
            gpus(2),
            "config.mesh is 1 x 1 x 8 x 1 (data, fsdp, tensor, context) and the 8 devices are in "
            "2 hosts; data x fsdp must be a multiple of that: the nearest is 1 x 2 x 4 x 1.",
        ),
    ],
)
def test_sizes_that_do_not_divide_over_slices_are_refused_with_the_nearest(
    sizes, devices, sentence
):
    with pytest.raises(ConfigError) as e:
        device_grid(sizes, devices)
    assert str(e.value) == sentence


def test_fsdp_spans_hosts_of_gpus_where_data_is_too_small():
    grid = device_grid([1, 8, 1, 1], gpus(2))
    assert [device.id for device in grid.flat] == list(range(8))
    grid = device_grid([2, 4, 1, 1], gpus(4, 2))
    assert slice_of(grid)[:, :, 0, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_make_mesh_asks_for_the_grid_of_several_slices(monkeypatch):
    asked = []
    monkeypatch.setattr("deltapref_jax.mesh._slices", lambda devices: 2)

    def grid(sizes, devices):
        asked.append(sizes)
        return np.reshape(devices, sizes)

    monkeypatch.setattr("deltapref_jax.mesh.device_grid", grid)
    assert tuple(make_mesh(MeshShape(2, -1)).shape.values()) == (2, 4, 1, 1)
    assert asked == [[2, 4, 1, 1]]


@pytest.mark.parametrize("dtype", [None, np.float32])
@pytest.mark.parametrize("local", [True, False])
def test_placed_weights_are_equal_and_every_device_is_sent_only_its_part(
    tiny, monkeypatch, dtype, local
):
    mesh = make_mesh(MeshShape(2, 2, 2))
    host = jax.tree.map(np.asarray, tiny.state)
    layout = shardings(host, mesh)
    if not local:  # as on the processes of a larger job
        monkeypatch.setattr(NamedSharding, "is_fully_addressable", property(lambda _: False))
        monkeypatch.setattr(jax, "device_put", None)
    placed = place(host, layout, dtype)
    for x, y, sharding in zip(*map(jax.tree.leaves, (host, placed, layout)), strict=True):
        assert y.sharding == sharding
        assert y.dtype == x.dtype
        for part in y.addressable_shards:
            np.testing.assert_array_equal(np.asarray(part.data), x[part.index])


def test_a_dtype_converts_and_copies_every_part():
    mesh = make_mesh(MeshShape(-1))
    host = np.arange(16, dtype=np.float16)
    placed = place({"a": host, "b": None}, NamedSharding(mesh, PartitionSpec("data")), np.float32)
    host[:] = 0
    assert placed["b"] is None
    assert placed["a"].dtype == np.float32
    np.testing.assert_array_equal(np.asarray(placed["a"]), np.arange(16, dtype=np.float32))
