"""A TPU kernel of the selective scan, and one of its gradient.

The state of a block of channels stays in vector memory from the first token to the last. The main memory has it only at the
borders of blocks of tokens, from which the gradient's kernel computes the states of a block again. The grid goes over rows,
channels and, innermost and in order, tokens. Elsewhere than on a TPU the kernels are interpreted.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ops import dispatch
from ops.kept import keep

LANES, SUBLANES = 128, 8  # of a vector register
BLOCK = 128  # tokens of a block, which are the lanes of its B and C
STATE = 8 * SUBLANES * LANES  # numbers of a block's state: eight registers
CHANNELS = 4 * LANES  # of a block, at the most


def supports(x: Array, dt: Array, A: Array, B: Array, C: Array) -> bool:
    """Whether the kernels take these arguments of `selective_scan`: float32 or bfloat16, channels that fill registers or fit into
    one, and at most 64 states of a channel.
    """
    width, states = A.shape
    narrow = all(z.dtype in (jnp.float32, jnp.bfloat16) for z in (x, dt, A, B, C))
    return narrow and 0 < states <= STATE // LANES and 0 < width and (width % LANES == 0 or width <= LANES)


def scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "N D"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "D"],
    state: Float[Array, "B N D"],
    start: Bool[Array, "B T"] | None,
    axis: str | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N D"]]:
    """Runs h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t + D x_t.

    Args:
      x, dt, B, C: float32 or bfloat16, zero on padding. What is made of them is float32.
      A, D, state: float32; `state` is h before the first token.
      start: where h restarts from zero before a token.
      axis: the logical name of the channels, by which a mesh may split them.

    Returns:
      y in the dtype of x, and the last h in float32.
    """
    length = x.shape[1]
    excess = -length % min(BLOCK, pl.cdiv(length, 2 * SUBLANES) * 2 * SUBLANES)
    fill = lambda z, value=0: jnp.pad(z, ((0, 0), (0, excess), (0, 0)), constant_values=value) if excess else z
    across = lambda z: jnp.swapaxes(z, 1, 2)  # tokens last, where they fill the lanes, as 16 states do not
    # Beyond the end dt is 0, and the state stays as it is.
    keep = () if start is None else (across(fill(1 - start[..., None].astype(jnp.float32), 1)),)
    y, final = _scan(axis, fill(x), fill(dt), A, across(fill(B)), across(fill(C)), D[None], state, *keep)
    return y[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(axis, *arrays):
    """`scan` of whole blocks, of x, dt, A, B, C, D, the state and, where it may restart, `keep`.

    Here B and C are [B, N, T], D is [1, D], and keep [B, 1, T] is 0 where the state restarts and else 1.
    """
    return _forward(axis, *arrays)[0]


def _axes(axis):
    """The logical axes of x, dt, A, B, C, D and the state; of the states at borders; and of `keep`."""
    of_channels, of_all, shared = ("batch", None, axis), (None, axis), ("batch", None, None)
    return [of_channels, of_channels, of_all, shared, shared, of_all, of_channels], ("batch", None, None, axis), shared


def _forward(axis, *arrays):
    own, borders, shared = _axes(axis)
    inputs, outputs = [*own, *[shared] * (len(arrays) - 7)], [own[0], own[6], borders]
    run = functools.partial(_run, interpret=dispatch.current_platform() != "tpu")
    y, final, entries = dispatch.local(run, inputs, outputs, kernel=True)(*arrays)
    return (y, final), (arrays, keep(entries))


def _backward(axis, residuals, cotangents):
    arrays, entries = residuals
    own, borders, shared = _axes(axis)
    inputs = [*own[:6], borders, own[0], own[6], *[shared] * (len(arrays) - 7)]
    run = functools.partial(_run_backward, interpret=dispatch.current_platform() != "tpu")
    found = dispatch.local(run, inputs, own, kernel=True)(*arrays[:6], entries, *cotangents, *arrays[7:])
    return *(z.astype(like.dtype) for z, like in zip(found, arrays)), *(None for _ in arrays[7:])


_scan.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """The grid of rows, channels and tokens, and what a point of it has of the arrays: blocks, or functions of rows to blocks."""

    grid: tuple[int, int, int]
    size: int  # tokens
    channels: int
    tokens: pl.BlockSpec  # of [B, T, D]
    coefficients: Callable[[int], pl.BlockSpec]  # of [B, rows, T]
    state: Callable[[int], pl.BlockSpec]  # of [B, rows, D]
    border: pl.BlockSpec  # of [B, blocks, N, D]
    share: pl.BlockSpec  # of [blocks of channels, B, N, T]
    inputs: list[pl.BlockSpec]  # of x, dt, A, B, C and D


def _blocks(x, A, reverse=False):
    (batch, length, width), states = x.shape, A.shape[0]
    most = max(LANES, min(CHANNELS, STATE // states))
    channels = width if width % LANES else max(n for n in range(LANES, most + 1, LANES) if width % n == 0)
    size = min(BLOCK, length)
    count = length // size
    at = (lambda t: count - 1 - t) if reverse else (lambda t: t)
    tokens = pl.BlockSpec((None, size, channels), lambda b, d, t: (b, at(t), d))
    coefficients = lambda rows: pl.BlockSpec((None, rows, size), lambda b, d, t: (b, 0, at(t)))
    of_all = lambda rows: pl.BlockSpec((rows, channels), lambda b, d, t: (0, d))
    return _Blocks(
        (batch, width // channels, count),
        size,
        channels,
        tokens,
        coefficients,
        state=lambda rows: pl.BlockSpec((None, rows, channels), lambda b, d, t: (b, 0, d)),
        border=pl.BlockSpec((None, None, states, channels), lambda b, d, t: (b, at(t), 0, d)),
        share=pl.BlockSpec((None, None, states, size), lambda b, d, t: (d, b, 0, at(t))),
        inputs=[tokens, tokens, of_all(states), *[coefficients(states)] * 2, of_all(1)],
    )


_IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _run(x, dt, A, B, C, D, state, *keep, interpret):
    at, states, kind = _blocks(x, A), len(A), jax.ShapeDtypeStruct
    entries = (len(x), at.grid[2], *A.shape)
    y, final, entries = pl.pallas_call(
        functools.partial(_kernel, unroll=1 if interpret else SUBLANES),
        grid=at.grid,
        in_specs=[*at.inputs, at.state(states), *(at.coefficients(1) for _ in keep)],
        out_specs=[at.tokens, at.state(states), at.border],
        out_shape=[kind(x.shape, x.dtype), kind(state.shape, jnp.float32), kind(entries, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((at.size, at.channels), jnp.float32)] * 3,
        compiler_params=_IN_ORDER,
        interpret=interpret,
    )(x, dt, A, B, C, D, state, *keep)
    return y, final, entries


def _run_backward(x, dt, A, B, C, D, entries, dy, dfinal, *keep, interpret):
    at, states, kind = _blocks(x, A, reverse=True), len(A), jax.ShapeDtypeStruct
    share, row = kind((at.grid[1], *B.shape), jnp.float32), kind((len(x), 1, x.shape[2]), jnp.float32)
    dx, ddt, dA, dB, dC, dD, dstate = pl.pallas_call(
        functools.partial(_backward_kernel, unroll=1 if interpret else SUBLANES),
        grid=at.grid,
        in_specs=[*at.inputs, at.border, at.tokens, at.state(states), *(at.coefficients(1) for _ in keep)],
        out_specs=[at.tokens, at.tokens, at.state(states), at.share, at.share, at.state(1), at.state(states)],
        out_shape=[kind(x.shape, x.dtype), kind(dt.shape, dt.dtype)]
        + [kind(dfinal.shape, jnp.float32), share, share, row, kind(dfinal.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((at.size, at.channels), jnp.float32)] * 5
        + [pltpu.VMEM((at.size + 1, states, at.channels), jnp.float32)],
        compiler_params=_IN_ORDER,
        interpret=interpret,
    )(x, dt, A, B, C, D, entries, dy, dfinal, *keep)
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dstate


def _column(rows, t):
    """Column t of [N, tokens], as [N, 1]."""
    return jnp.sum(jnp.where(_tokens(rows) == t, rows, 0), 1, keepdims=True)


def _tokens(rows):
    return lax.broadcasted_iota(jnp.int32, rows.shape, 1)


def _decay(A, dt, keep, t):
    """What h is multiplied by before token t, [N, channels]."""
    decay = jnp.exp(dt * A)
    return decay * _column(keep[0], t) if keep else decay


def _kernel(x, dt, A, B, C, D, start, *refs, unroll):
    *keep, y, state, entry, x32, dt32, y32 = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = start[...]

    entry[...] = state[...]
    x32[...], dt32[...] = x[...].astype(jnp.float32), dt[...].astype(jnp.float32)
    A, B, C, keep = A[...], B[...].astype(jnp.float32), C[...].astype(jnp.float32), [ref[...] for ref in keep]

    def token(t, h):
        now = pl.ds(t, 1)
        h = _decay(A, dt32[now], keep, t) * h + (dt32[now] * x32[now]) * _column(B, t)
        y32[now] = jnp.sum(h * _column(C, t), 0, keepdims=True)
        return h

    state[...] = lax.fori_loop(0, len(x32), token, state[...], unroll=unroll)
    y[...] = (y32[...] + D[...] * x32[...]).astype(y.dtype)


def _backward_kernel(x, dt, A, B, C, D, entry, dy, dfinal, *refs, unroll):
    *keep, dx, ddt, dA, dB, dC, dD, dstate, x32, dt32, dy32, dx32, ddt32, h = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[...]
        dA[...], dD[...] = jnp.zeros_like(dA), jnp.zeros_like(dD)

    x32[...], dt32[...], dy32[...] = (ref[...].astype(jnp.float32) for ref in (x, dt, dy))
    A, B, C, keep = A[...], B[...].astype(jnp.float32), C[...].astype(jnp.float32), [ref[...] for ref in keep]
    dD[...] += jnp.sum(dy32[...] * x32[...], 0, keepdims=True)
    h[0] = entry[...]

    def token(t, before):
        now = pl.ds(t, 1)
        h[t + 1] = _decay(A, dt32[now], keep, t) * before + (dt32[now] * x32[now]) * _column(B, t)
        return h[t + 1]

    lax.fori_loop(0, len(x32), token, entry[...], unroll=unroll)

    def back(i, carry):
        dh, dA, dB, dC = carry
        t = len(x32) - 1 - i
        now = pl.ds(t, 1)
        xt, dtt, dyt = x32[now], dt32[now], dy32[now]
        decay = _decay(A, dtt, keep, t)
        dh += dyt * _column(C, t)
        put = lambda z, total: jnp.where(_tokens(total) == t, jnp.sum(z, 1, keepdims=True), total)
        dC, dB = put(h[t + 1] * dyt, dC), put(dh * (dtt * xt), dB)
        inflow = jnp.sum(dh * _column(B, t), 0, keepdims=True)  # the gradient of dt x
        dlog = dh * decay * h[t]  # of dt A
        dx32[now] = inflow * dtt
        ddt32[now] = inflow * xt + jnp.sum(dlog * A, 0, keepdims=True)
        return decay * dh, dA + dlog * dtt, dB, dC

    carry = dstate[...], dA[...], jnp.zeros_like(B), jnp.zeros_like(C)
    dstate[...], dA[...], dB[...], dC[...] = lax.fori_loop(0, len(x32), back, carry, unroll=unroll)
    dx[...] = (dx32[...] + D[...] * dy32[...]).astype(dx.dtype)
    ddt[...] = ddt32[...].astype(ddt.dtype)
