"""A TPU kernel of h_t = m_t h_{t-1} + b_t, real or complex, and of the recurrence of its gradient.

The state stays in vector memory from the first token to the last; m, b and h pass through it once, which is all the traffic there
is. The grid goes over batch, channels and, innermost and in order, time. Elsewhere than on a TPU the kernel is interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ops import dispatch

Parts = tuple[Float[Array, "..."], ...]  # (x,) for a real number, (re, im) for a complex one

LANES, SUBLANES = 128, 8  # of a vector register: channels and rows
BLOCK_BYTES = 1 << 19  # of a block of one array; a complex recurrence has twelve of them in memory


def supports(b: Parts) -> bool:
    """Whether the kernel takes b [T, B, ...]: float32, and channels that fill registers or fit into one."""
    size = b[0].size // max(1, b[0].shape[0] * b[0].shape[1])
    return all(x.dtype == jnp.float32 for x in b) and 0 < size and (size % LANES == 0 or size <= LANES)


def recurrence(m: Parts, b: Parts, start: Parts, *, reverse: bool = False, axis: str | None = None) -> Parts:
    """Runs the recurrence forwards, or backwards in time that of its gradient.

    Args:
      m: [T, B, D] or, constant in time, [1, 1, D]; one array, or real and imaginary part.
      b: [T, B, D], likewise.
      start: [B, D], likewise.
      reverse: whether to run l_t = b_t + conj(m_{t+1}) l_{t+1}, where conj(m_T) l_T is `start`.
      axis: the logical name of the channels, by which a mesh may split them.

    Returns:
      h, or l, [T, B, D], float32.
    """
    count, constant = len(b), m[0].shape[0] == 1
    time_major, state = (None, "batch", axis), ("batch", axis)
    axes = [(None, None, axis) if constant else time_major] * count + [time_major] * count + [state] * count
    run = functools.partial(_local, count=count, reverse=reverse, interpret=dispatch.current_platform() != "tpu")
    return dispatch.local(run, axes, time_major, kernel=True)(*m, *b, *start)


def _local(*arrays, count, reverse, interpret):
    m, b, start = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
    constant, (T, B, D) = m[0].shape[0] == 1, b[0].shape
    rows = SUBLANES if B % SUBLANES == 0 else B
    channels = D if D % LANES else max(n for n in range(LANES, 4 * LANES + 1, LANES) if D % n == 0)
    most = max(SUBLANES, BLOCK_BYTES // (4 * rows * channels) // SUBLANES * SUBLANES)
    steps = pl.cdiv(T, most)
    block = pl.cdiv(pl.cdiv(T, steps), SUBLANES) * SUBLANES  # the shortest multiple of 8 that covers T in as many steps
    excess = steps * block - T
    if excess:  # beyond the end, where the state stays as it is
        fill = lambda x, value: jnp.pad(x, ((0, excess), (0, 0), (0, 0)), constant_values=value)
        b = tuple(fill(x, 0) for x in b)
        if not constant:
            m = tuple(fill(x, 1 - i) for i, x in enumerate(m))

    at = (lambda t: steps - 1 - t) if reverse else (lambda t: t)
    tokens = pl.BlockSpec((block, rows, channels), lambda i, j, t: (at(t), i, j))
    state = pl.BlockSpec((rows, channels), lambda i, j, t: (i, j))
    multipliers = pl.BlockSpec((1, 1, channels), lambda i, j, t: (0, 0, j)) if constant else tokens
    found = pl.pallas_call(
        functools.partial(_kernel, count=count, reverse=reverse, block=block, left=T if excess else None),
        grid=(B // rows, D // channels, steps),
        in_specs=[multipliers] * count + [tokens] * count + [state] * count,
        out_specs=[tokens] * count,
        out_shape=[jax.ShapeDtypeStruct((steps * block, B, D), jnp.float32)] * count,
        scratch_shapes=[pltpu.VMEM((rows, channels), jnp.float32)] * count,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*m, *b, *start)
    return tuple(x[:T] for x in found)


def _kernel(*refs, count, reverse, block, left):
    m, b, start, out, carried = (refs[i * count : (i + 1) * count] for i in range(5))
    constant = m[0].shape[0] == 1

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, first in zip(carried, start):
            ref[...] = first[...]

    here = (pl.num_programs(2) - 1 - pl.program_id(2) if reverse else pl.program_id(2)) * block

    def step(i, h):
        t = block - 1 - i if reverse else i
        mt = tuple(x[0 if constant else t] for x in m)
        bt = tuple(x[t] for x in b)
        if reverse:
            new = tuple(x + y for x, y in zip(bt, h))
            after = _times((mt[0], *(-x for x in mt[1:])), new)
        else:
            after = new = tuple(x + y for x, y in zip(_times(mt, h), bt))
        for ref, x in zip(out, new):
            ref[t] = x
        if left is None or not constant:
            return after
        # A constant multiplier is not one beyond the end.
        return tuple(jnp.where(here + t < left, x, y) for x, y in zip(after, h))

    last = lax.fori_loop(0, block, step, tuple(ref[...] for ref in carried), unroll=SUBLANES)
    for ref, x in zip(carried, last):
        ref[...] = x


def _times(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
