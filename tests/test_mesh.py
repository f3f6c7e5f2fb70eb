"""Meshes over several slices, and placing host arrays on devices part by part."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deltapref_jax.config import ConfigError, MeshShape
from deltapref_jax.devices import Devices
from deltapref_jax.mesh import Batch, device_grid, fit_shape, make_mesh, place, rows_divide
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


POD = Devices(16, 4, 1, "tpu")
SLICES = Devices(32, 4, 2, "tpu")
GPUS = Devices(16, 8, 2, "gpu")


def fitted(shape, devices=POD, rows=32, row_length=512, **more):
    conditions = rows_divide(
        "config.m", shape, Batch("config.training", "rows", rows, row_length), devices
    )
    return dataclasses.astuple(fit_shape("config.m", shape, devices, conditions, **more))


@pytest.mark.parametrize(
    ("shape", "devices", "rows", "sizes"),
    [
        (MeshShape(), POD, 32, (1, 16, 1, 1)),
        (MeshShape(), POD, 8, (1, 8, 2, 1)),  # rows that do not divide over all devices
        (MeshShape(), SLICES, 32, (2, 16, 1, 1)),
        (MeshShape(), GPUS, 16, (1, 16, 1, 1)),
        (MeshShape(), Devices(1, 1), 3, (1, 1, 1, 1)),
        (MeshShape(data=-1), POD, 32, (16, 1, 1, 1)),
        (MeshShape(fsdp=-1), POD, 32, (1, 16, 1, 1)),
        (MeshShape(tensor=4), POD, 32, (1, 4, 4, 1)),
        (MeshShape(data=-1, tensor=4), POD, 32, (4, 1, 4, 1)),
        (MeshShape(context=2), POD, 32, (1, 8, 1, 2)),
        (MeshShape(2, 2, 2, 2), POD, 32, (2, 2, 2, 2)),
        (MeshShape(fsdp=4), SLICES, 32, (8, 4, 1, 1)),
    ],
)
def test_sizes_that_are_not_stated_are_chosen(shape, devices, rows, sizes):
    assert fitted(shape, devices, rows) == sizes


@pytest.mark.parametrize(
    ("shape", "devices", "rows", "sentence"),
    [
        (
            MeshShape(fsdp=16),
            POD.of_host,
            32,
            "config.m is fsdp=16 and there are 4 devices; the sizes must multiply to that; nearest "
            "that fits: fsdp=4 or data=2 fsdp=2.",
        ),
        (
            MeshShape(fsdp=32),
            SLICES,
            32,
            "config.m is fsdp=32 and the 32 devices are in 2 slices; data must be a multiple of "
            "that; nearest that fits: data=2 fsdp=16 or data=4 fsdp=8.",
        ),
        (
            MeshShape(1, 1, 16),
            GPUS,
            32,
            "config.m is data=1 fsdp=1 tensor=16 and the 16 devices are in 2 hosts; data x fsdp "
            "must be a multiple of that; nearest that fits: fsdp=2 tensor=8 or data=2 tensor=8.",
        ),
        (
            MeshShape(data=8),
            POD.of_host._replace(total=8),
            12,
            "config.training.rows is 12 and config.m spreads rows over 8 of 8 devices (data x "
            "fsdp); make rows a multiple of that; nearest that fits: data=4 tensor=2 or data=2 "
            "fsdp=2 tensor=2.",
        ),
        (
            MeshShape(),
            SLICES,
            3,
            "config.training.rows is 3 and config.m states no size, so that a mesh is chosen, but "
            "each over 32 devices in 2 slices spreads rows over at least 2 (data x fsdp); set "
            "config.training.rows to a multiple of that.",
        ),
        (
            MeshShape(),
            Devices(4, 1, 4, "cpu"),
            2,
            "config.training.rows is 2 and config.m states no size, so that a mesh is chosen, but "
            "each over 4 devices in 4 hosts spreads rows over at least 4 (data x fsdp); set "
            "config.training.rows to a multiple of that.",
        ),
        (
            MeshShape(fsdp=4),
            Devices(1, 1),
            2,
            "config.m is fsdp=4 and there is 1 device; the sizes must multiply to that; nearest "
            "that fits: data=1.",
        ),
        (
            MeshShape(context=16),
            POD,
            32,
            "config.training.row_length is 500 and config.m splits each row over 16 of 16 devices "
            "(context); make row_length a multiple of that; nearest that fits: fsdp=4 context=4 or "
            "data=2 fsdp=2 context=4.",
        ),
    ],
)
def test_a_mesh_that_fits_nothing_is_refused_with_the_nearest(shape, devices, rows, sentence):
    with pytest.raises(ConfigError) as e:
        fitted(shape, devices, rows, row_length=500)
    assert str(e.value) == sentence


def test_what_is_nearest_fits():
    """Whatever is asked, the shapes that the sentence names are themselves accepted."""
    for devices in (POD, SLICES, GPUS):
        for axis in ("data", "fsdp", "tensor", "context"):
            with pytest.raises(ConfigError) as e:
                fitted(MeshShape(**{axis: 24}), devices)
            for named in str(e.value).partition("nearest that fits: ")[2][:-1].split(" or "):
                sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | {
                    name: int(size) for name, size in (part.split("=") for part in named.split())
                }
                assert fitted(MeshShape(**sizes), devices) == tuple(sizes.values())


def test_fsdp_spans_hosts_of_gpus_where_data_is_too_small():
    grid = device_grid([1, 8, 1, 1], gpus(2))
    assert [device.id for device in grid.flat] == list(range(8))
    grid = device_grid([2, 4, 1, 1], gpus(4, 2))
    assert slice_of(grid)[:, :, 0, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_make_mesh_asks_for_the_grid_of_several_slices(monkeypatch):
    asked = []
    monkeypatch.setattr("deltapref_jax.mesh.count_slices", lambda devices: 2)

    def grid(sizes, devices):
        asked.append(sizes)
        return np.reshape(devices, sizes)

    monkeypatch.setattr("deltapref_jax.mesh.device_grid", grid)
    assert tuple(make_mesh(MeshShape(2, -1)).shape.values()) == (2, 4, 1, 1)
    assert asked == [(2, 4, 1, 1)]


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
