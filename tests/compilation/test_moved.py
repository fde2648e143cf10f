"""The bytes that a program moves: against a text whose numbers are counted by hand, and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from compilation import hlo
from compilation.moved import moved

# In each of 5 trips a fusion reads one row of 128 numbers of 64 and writes another, and a product reads [128,8] that lies in a
# TPU core's own memory, and that row, and writes 8 numbers. Before, a half of an array is copied to a core's memory.
PROGRAM = """HloModule jit_scan, is_scheduled=true

%fused (p.0: f32[64,128], p.1: s32[], p.2: f32[64,128]) -> f32[64,128] {
  %p.0 = f32[64,128]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[64,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,128]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,128}
  %double = f32[1,128]{1,0} add(%row, %row)
  ROOT %put = f32[64,128]{1,0} dynamic-update-slice(%p.2, %double, %p.1, %zero)
}

%body (t.0: (s32[], f32[64,128], f32[64,128], bf16[128,8])) -> (s32[], f32[64,128], f32[64,128], bf16[128,8]) {
  %t.0 = (s32[], f32[64,128]{1,0}, f32[64,128]{1,0}, bf16[128,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i.0 = s32[] get-tuple-element(%t.0), index=0
  %x.0 = f32[64,128]{1,0} get-tuple-element(%t.0), index=1
  %y.0 = f32[64,128]{1,0} get-tuple-element(%t.0), index=2
  %w.0 = bf16[128,8]{1,0:T(8,128)S(1)} get-tuple-element(%t.0), index=3
  %new = f32[64,128]{1,0} fusion(%x.0, %i.0, %y.0), kind=kLoop, calls=%fused
  %first = f32[1,128]{1,0} slice(%new), slice={[0:1], [0:128]}
  %read = f32[1,8]{1,0} dot(%first, %w.0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r.0 = (s32[], f32[64,128]{1,0}, f32[64,128]{1,0}, bf16[128,8]{1,0:T(8,128)S(1)}) tuple(%i.0, %x.0, %new, %w.0)
}

%condition (t.1: (s32[], f32[64,128], f32[64,128], bf16[128,8])) -> pred[] {
  %t.1 = (s32[], f32[64,128]{1,0}, f32[64,128]{1,0}, bf16[128,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %n.1 = s32[] constant(5)
  ROOT %c.1 = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (t.2: (s32[], f32[64,128], f32[64,128]), w.2: bf16[256,8]) -> f32[64,128] {
  %t.2 = (s32[], f32[64,128]{1,0}, f32[64,128]{1,0}) parameter(0)
  %w.2 = bf16[256,8]{1,0} parameter(1)
  %part = ((bf16[256,8]{1,0}), bf16[128,8]{1,0:T(8,128)S(1)}, s32[]) slice-start(%w.2), slice={[0:128], [0:8]}
  %there = bf16[128,8]{1,0:T(8,128)S(1)} slice-done(%part)
  %i.2 = s32[] get-tuple-element(%t.2), index=0
  %x.2 = f32[64,128]{1,0} get-tuple-element(%t.2), index=1
  %loop = (s32[], f32[64,128]{1,0}, f32[64,128]{1,0}, bf16[128,8]{1,0:T(8,128)S(1)}) while(%all), condition=%condition, body=%body
  %all = (s32[], f32[64,128]{1,0}, f32[64,128]{1,0}, bf16[128,8]{1,0:T(8,128)S(1)}) tuple(%i.2, %x.2, %x.2, %there)
  ROOT %last = f32[64,128]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_pieces_trips_and_memories():
    index, row = 4, 4 * 128
    trip = (
        (index + row + row) + 2 * row + (row + 4 * 8) + (index + index + 1)
    )  # the fusion, the slice, the product, the condition
    before = 2 * 128 * 8 + 4  # the half that is read, and the counter of its copy
    assert moved(hlo.Program(PROGRAM)) == pytest.approx(5 * trip + before, abs=5 * 16)


def test_as_xla_counts_where_there_is_no_loop():
    x, w = jax.ShapeDtypeStruct((256, 512), jnp.float32), jax.ShapeDtypeStruct((512, 128), jnp.float32)
    function = lambda x, w: jnp.tanh(jnp.exp(x) @ w)[:64].sum(0)
    compiled = jax.jit(function).lower(x, w).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert moved(hlo.Program(compiled.as_text())) == pytest.approx(expected, rel=0.02)
