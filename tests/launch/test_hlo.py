"""Bytes of collectives and of memory are those of closed forms, loops counted."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh
from launch.hlo import Collective, parse, read_traffic

P = PartitionSpec
N, LAYERS = 64, 5
FLOAT = 4  # bytes


def traffic(mesh, function, specs, *shapes, trips=1.0):
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    abstract = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    compiled = jax.jit(function).lower(*abstract).compile()
    return read_traffic(compiled.as_text(), dict(mesh.shape), trips)


def manual(mesh, function, inside, outside):
    return jax.shard_map(function, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)


@pytest.fixture
def mesh():
    return make_mesh(MeshShape(2, 4, 1, 1), jax.devices()[:8])


@pytest.mark.parametrize(
    ("name", "body", "spec", "kind", "axes", "received"),
    [
        # A ring gives every device three of four parts.
        ("gather", lambda x: jax.lax.all_gather(x, "fsdp"), P("fsdp"), "all-gather", "fsdp", 3 / 4),
        ("sum", lambda x: jax.lax.psum(x, "fsdp"), P(), "all-reduce", "fsdp", 2 * 3 / 4),
        ("both", lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), "all-reduce", "data x fsdp",
         2 * 7 / 8),
        ("scatter", lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P(), "reduce-scatter",
         "fsdp", 3 / 4),
        ("shift", lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), P(),
         "collective-permute", "data", 1),
    ],
)  # fmt: skip
def test_a_collective_is_counted_in_a_loop(mesh, name, body, spec, kind, axes, received):
    """`received`: bytes of the whole array that one device gets each time."""

    def function(x):
        def step(total, _):
            return total + body(total * x).sum(), None

        start = jnp.zeros((), jnp.float32) + x.sum()
        return jax.lax.scan(step, start, None, length=LAYERS)[0][None]

    found = traffic(mesh, manual(mesh, function, (spec,), P(("data", "fsdp"))), [spec], (8 * N, N))
    moved = {(c.kind, c.axes): (c.bytes, c.count) for c in found.collectives}
    whole = 8 * N * N * FLOAT
    assert moved[kind, axes] == (pytest.approx(LAYERS * received * whole), LAYERS)
    assert found.open_loops == 0


def test_a_loop_whose_length_depends_on_data_has_the_trips_that_are_given(mesh):
    def function(x):
        def step(i, total):
            return total + jax.lax.psum(total * x, "data").sum()

        return jax.lax.fori_loop(0, x[0, 0].astype(int), step, x.sum())[None]

    inside = manual(mesh, function, (P(),), P(("data", "fsdp")))
    once, seven = (traffic(mesh, inside, [P()], (N, N), trips=t) for t in (1.0, 7.0))
    assert (once.open_loops, seven.open_loops) == (1, 1)
    (a,), (b,) = once.collectives, seven.collectives
    assert (a.kind, a.axes, a.bytes) == ("all-reduce", "data", N * N * FLOAT)
    assert b.bytes == 7 * a.bytes
    assert b.count == 7


def test_the_partitioner_gathers_a_sharded_weight_once_a_layer(mesh):
    """An einsum over fsdp-sharded weights, as in the decoder: [LAYERS, N, N] over a scan."""

    def function(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    found = traffic(
        mesh,
        function,
        [P(("data", "fsdp")), P(None, "fsdp", None)],
        (8, N),
        (LAYERS, N, N),
    )
    total = sum(c.bytes for c in found.collectives if c.axes == "fsdp")
    # Either the weights are gathered, or the rows travel and partial products are summed.
    assert 0 < total <= LAYERS * N * N * FLOAT * 3 / 4 + 1


def test_memory_is_read_once_where_slices_are_taken(one_device):
    """A scan over stacked weights reads each once, not all of them at every step."""

    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    width = 256
    found = traffic(one_device, function, [P(), P()], (8, width), (LAYERS, width, width))
    weights = LAYERS * width * width * FLOAT
    assert weights <= found.memory <= 4 * weights


TPU = (pathlib.Path(__file__).parent / "tpu_program.hlo").read_text()


def test_the_text_of_a_tpu_program_is_read():
    found = read_traffic(TPU, {"data": 2, "fsdp": 4, "tensor": 1, "context": 1})
    moved = {c.kind: (c.axes, c.group, c.bytes, c.count) for c in found.collectives}
    gathered = 64 * 32 * 2
    assert moved == {
        "all-gather": ("fsdp", 4, 6 * gathered * 3 / 4, 6),
        "collective-permute": ("fsdp", 4, 6 * gathered / 4, 6),
        "reduce-scatter": ("fsdp", 4, 64 * 32 * 4 * 3 / 4, 1),
    }
    # Of the gather only its argument lies in main memory.
    part = 16 * 32 * 2
    assert found.memory == 6 * (part + 2 * part) + (64 * 32 + 16 * 32) * 4
    assert found.open_loops == 0


def test_groups_along_a_part_of_an_axis_are_read():
    whole = "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}"
    assert whole in TPU
    text = TPU.replace(whole, "mesh['axis_0'=8] {'axis_0':(2)4}")
    found = read_traffic(text, {"data": 2, "fsdp": 4, "tensor": 1, "context": 1})
    (gather,) = (c for c in found.collectives if c.kind == "all-gather")
    assert (gather.axes, gather.group) == ("fsdp", 4)


def test_a_brace_in_a_kernel_ends_no_computation():
    kernel = (
        '  %k = f32[] custom-call(), custom_call_target="tpu_custom_call", config={"a": {\n}\n}}'
    )
    gather = "  %all-gather.1 = "
    assert TPU.count(gather) == 1
    text = TPU.replace(gather, f"{kernel}\n{gather}")
    mesh = {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert read_traffic(text, mesh).collectives == read_traffic(TPU, mesh).collectives


ASYNC = """\
%fused (a: bf16[8,64,32], at: s32[8], rows: bf16[8,32]) -> bf16[8,64,32] {
  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %at = s32[8]{0:S(1)} parameter(1)
  %rows = bf16[8,32]{1,0:S(1)} parameter(2)
  ROOT %put = bf16[8,64,32]{2,1,0} scatter(%a, %at, %rows), to_apply=%add
}

ENTRY %main (x: bf16[8,64,32], i: s32[8], r: bf16[8,32]) -> bf16[8,64,32] {
  %x = bf16[8,64,32]{2,1,0} parameter(0)
  %i = s32[8]{0:S(1)} parameter(1)
  %r = bf16[8,32]{1,0:S(1)} parameter(2)
  %y = bf16[8,32]{1,0} parameter(3)
  LINE
}
"""
WHOLE, HALF = 8 * 64 * 32 * 2, 4 * 64 * 32 * 2


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # A slice that goes to fast memory, and one that stays, read what they hold.
        ("%s = ((bf16[8,64,32]{2,1,0}), bf16[4,64,32]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), "
         "slice={[0:4], [0:64], [0:32]}", HALF),
        ("%s = ((bf16[8,64,32]{2,1,0}), bf16[4,64,32]{2,1,0}, s32[]{:S(2)}) slice-start(%x), "
         "slice={[0:4], [0:64], [0:32]}", 2 * HALF),
        ("%c = (bf16[8,64,32]{2,1,0:S(1)}, bf16[8,64,32]{2,1,0}, u32[]{:S(2)}) copy-start(%x)",
         WHOLE),
        ("%c = (bf16[8,64,32]{1,2,0}, bf16[8,64,32]{2,1,0}, u32[]{:S(2)}) copy-start(%x)",
         2 * WHOLE),
        # Rows are put into a cache where it lies, or into a copy of it in fast memory.
        ("%f = bf16[8,64,32]{2,1,0} fusion(%x, %i, %r), kind=kCustom, calls=%fused", 8 * 32 * 2),
        ("%f = bf16[8,64,32]{2,1,0:S(1)} fusion(%x, %i, %r), kind=kCustom, calls=%fused", WHOLE),
        # A kernel that changes an operand in place does not write all of it.
        ("%k = (f32[8]{0}, bf16[8,64,32]{2,1,0}) custom-call(%i, %x), "
         "output_to_operand_aliasing={{1}: (1, {})}, attributes={a={b: (0)}}", WHOLE + 8 * 4),
        ("%k = (bf16[8,64,32]{2,1,0}, bf16[8,32]{1,0}) custom-call(%x, %y), "
         "output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}, attributes={a={b: (7)}}",
         WHOLE + 8 * 32 * 2),
        ("%k = (f32[8]{0}, bf16[8,64,32]{2,1,0}) custom-call(%i, %x)", 2 * WHOLE + 8 * 4),
    ],
)  # fmt: skip
def test_what_is_moved_to_and_from_fast_memory_is_counted_once(line, moved):
    assert read_traffic(ASYNC.replace("LINE", line), {"data": 1}).memory == moved


@pytest.mark.parametrize(
    ("kind", "name", "received"),
    [("ALL_REDUCE", "all-reduce", WHOLE), ("ALL_GATHER", "all-gather", WHOLE / 2)],
)
def test_what_hosts_carry_between_slices_is_a_collective_over_data(kind, name, received):
    about = (
        "is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="
        f'"psum.63_0",_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
    )
    text = ASYNC.replace(
        "LINE",
        f"%mark = token[] after-all()\n"
        f"  %s = (bf16[8,64,32]{{2,1,0}}, u32[], token[]) send(%x, %mark), channel_id=4, {about}\n"
        f"  %r = (bf16[8,64,32]{{2,1,0}}, u32[], token[]) recv(%mark), channel_id=3, {about}",
    )
    found = read_traffic(text, {"data": 4, "fsdp": 2}, slices=2)
    assert found.collectives == (Collective(name, "data", 2, received, 1.0),)
    assert found.memory == 2 * (WHOLE + 4)  # with a mark of four bytes each


def test_every_computation_is_found():
    computations, entry = parse(TPU)
    assert entry == "main"
    assert list(computations) == ["add", "all-reduce-scatter.1", "body", "condition", "main"]
    assert [i.name for i in computations["condition"]] == ["p.1", "i.1", "n", "lt"]
    assert np.prod(computations["main"][1].shapes[0][1]) == 64 * 32
