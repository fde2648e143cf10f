"""The reading of compiled programs: against a text whose numbers are counted by hand, and against a real program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from compilation import hlo, replica_groups
from training import sharding

MESH = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}

# A loop of 5 trips whose condition says so, and inside it one of 3 whose text says so. In the outer: a product of 2 * 8*16*32
# FLOPs, and the start of an all-gather (channel 1) of which a piece is in the inner loop. In the inner: a kernel, and a product
# in a fusion that only it calls. At the end an all-reduce of 4 KiB.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p.0: bf16[4,8], p.1: f32[8,2]) -> f32[4,2] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[8,2]{1,0} parameter(1)
  ROOT %convolution.1 = f32[4,2]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%inner_body (t.0: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t.0 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %x.0 = bf16[4,8]{1,0} get-tuple-element(%t.0), index=1
  %w.0 = f32[8,2]{1,0} custom-call(%x.0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 8}"
}}, metadata={op_name="jit(step)/jvp(scan)/scan/pallas_call"}
  %piece = bf16[4,8]{1,0} all-gather(%x.0), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %f.0 = f32[4,2]{1,0} fusion(%x.0, %w.0), kind=kOutput, calls=%fused
  ROOT %r.0 = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%x.0, %piece)
}

%inner_condition (t.1: (s32[], bf16[4,8])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %n.1 = s32[] constant(77)
  ROOT %c.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%body (t.2: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}, /*index=2*/f32[8,32]{1,0}, f32[32,16]{1,0}) parameter(0)
  %x.2 = bf16[4,8]{1,0} get-tuple-element(%t.2), index=1
  %a.2 = f32[8,32]{1,0} get-tuple-element(%t.2), index=2
  %b.2 = f32[32,16]{1,0} get-tuple-element(%t.2), index=3
  %start = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%half), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, metadata={op_name="jit(step)/weights"}
  %half = bf16[2,8]{1,0} slice(%x.2), slice={[0:2], [0:8]}
  %d.2 = f32[8,16]{1,0} dot(%a.2, %b.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %loop.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t.2), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
}

%condition (t.3: (s32[], bf16[4,8])) -> pred[] {
  %t.3 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%t.3), index=0
  %n.3 = s32[]{:T(128)} constant(5), backend_config={"flag_configs":[],"scoped_memory_configs":[{"offset":"0","size":"16"}]}
  ROOT %c.3 = pred[]{:T(512)} compare(%i.3, %n.3), direction=LT
}

%add (x.4: f32[], y.4: f32[]) -> f32[] {
  %x.4 = f32[] parameter(0)
  %y.4 = f32[] parameter(1)
  ROOT %s.4 = f32[] add(%x.4, %y.4)
}

ENTRY %main (x.5: bf16[4,8]) -> f32[1024] {
  %x.5 = bf16[4,8]{1,0} parameter(0)
  %mark = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"
  %loop.5 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t.5), condition=%condition, body=%body, metadata={op_name="jit(step)/layers"}
  %near = f32[2048]{0:T(1024)S(1)} broadcast(%zero), dimensions={}
  %far = f32[2048]{0:T(1024)} broadcast(%zero), dimensions={}, metadata={op_name="jit(step)/far"}
  %pairs = f32[16]{0} collective-permute(%x.5), channel_id=3, source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
  ROOT %sum = f32[1024]{0} all-reduce(%mark), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.Program(PROGRAM)


def test_loops(program):
    assert [(loop.trips, loop.executions, loop.origin) for loop in program.loops] == [
        (5, 1, "jit(step)/layers"),
        (3, 5, ""),
    ]
    assert program.executions["fused"] == 15 and program.executions["add"] == 0


def test_collectives_are_counted_by_channel_and_trips(program):
    """Channel 1 is at two places and is one all-gather of 4 x 8 numbers in each of 5 trips."""
    sent = {one.kind: one for one in program.sent(MESH)}
    gather = sent["all-gather"]
    assert (gather.executions, gather.bytes, gather.axes) == (5, 5 * 64, "fsdp")
    assert (str(gather.shape), gather.origin) == ("bf16[4,8]", "jit(step)/weights")
    assert (sent["all-reduce"].axes, sent["all-reduce"].bytes) == ("fsdp,tensor", 4096)
    assert (sent["collective-permute"].axes, sent["collective-permute"].bytes) == ("data", 64)
    assert [(t.kind, t.places, t.executions) for t in hlo.traffic(program.sent(MESH))] == [
        ("all-reduce", 1, 1),
        ("all-gather", 1, 5),
        ("collective-permute", 1, 1),
    ]


def test_products_are_counted_by_type_and_trips(program):
    plain, mixed = program.products()
    assert (plain.operands, plain.result, plain.precision) == ("f32", "f32", "default")
    assert (plain.places, plain.executions, plain.flops) == (1, 5, 5 * 2 * 8 * 16 * 32)
    assert (mixed.operands, mixed.result, mixed.precision) == ("bf16 f32", "f32", "highest")
    assert (mixed.places, mixed.executions, mixed.flops) == (1, 15, 15 * 2 * 4 * 8 * 2)


def test_kernels_and_large_arrays(program):
    assert program.kernels() == [hlo.Kernel("tpu_custom_call scan", 1, 15)]
    (large,) = program.large(8192)  # not the one in a core's own memory, nor the loop's state
    assert (str(large.shape), large.places, large.origin) == ("f32[2048]", 1, "jit(step)/far")


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[1,8]<=[8]", "data,fsdp,tensor"),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", "data,fsdp"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups={}", "data,fsdp,tensor"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", "data,fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", "data,fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", "?"),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ""),
        ("replica_groups={{0,9}}", "?"),
        ("source_target_pairs={{0,1},{1,0}}", "tensor"),
        ("", "?"),
    ],
)
def test_axes_of_collectives(groups, axes):
    """Devices 0 to 7 are in the mesh in this order, `tensor` fastest."""
    assert replica_groups.over_axes(f", channel_id=1, {groups}, to_apply=%add", MESH) == axes


def test_convolutions_of_compilers_count_what_meets_inputs():
    """A product of 3 batches, 2 * 4*5*6 FLOPs each, that a TPU's compiler writes as a convolution over the batch axis."""
    text = (
        "ENTRY %main (x: f32[3,4,6], y: f32[3,6,5]) -> f32[3,4,5] {\n"
        "  %x = f32[3,4,6]{2,1,0} parameter(0)\n"
        "  %y = f32[3,6,5]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[3,4,5]{2,1,0} convolution(%x, %y), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
        "dim_labels=0bf_0io->0bf\n}\n"
    )
    (products,) = hlo.Program(text).products()
    assert products.flops == 3 * 2 * 4 * 5 * 6


def test_a_real_program():
    """Eight devices, a scan of 6 layers whose weights are gathered, beside what is known of the program."""
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=place("fsdp"))
    w = jax.ShapeDtypeStruct((6, 128, 128), jnp.float32, sharding=place(None, "fsdp", "tensor"))

    def model(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, place(None, None))
            x = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), place("fsdp", None))
            return x, None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    program = hlo.Program(jax.jit(model).lower(w, x).compile().as_text())
    assert [(loop.trips, loop.executions) for loop in program.loops] == [(6, 1)]
    (products,) = program.products()
    assert (products.executions, products.flops) == (6, 6 * 2 * (64 // 4) * 128 * 128)
    found = {(t.kind, t.axes): t for t in hlo.traffic(program.sent(dict(mesh.shape)))}
    gathered = [
        t for (kind, axes), t in found.items() if kind == "all-gather" and set(axes.split(",")) <= {"fsdp", "tensor"}
    ]
    assert sum(t.executions for t in gathered) in (6, 12)  # over both axes at once, or over one after the other
    assert max(t.bytes for t in gathered) == 6 * 128 * 128 * 4
    assert ("all-reduce", "fsdp") in found and found["all-reduce", "fsdp"].bytes == 4
