"""A TPU kernel of linear attention with one decay per head, chunk by chunk, and of its gradient.

The state stays in a core's own memory from the first chunk to the last, and so does what the tokens of a chunk are to each other;
q, k, v and y pass through once. Kept for the backward pass are the states that enter the chunks. It runs backwards with
the gradient of the state; the equations are those of `ops.linear_attention`. The grid goes over batch, heads and, innermost and
in order, chunks. Elsewhere than on a TPU the kernel is interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ops import dispatch
from ops.products import factor_dtype

CHUNK = 128  # tokens: as many as a matrix unit has rows
LEAST = 16  # rows of a tile of bfloat16
LARGEST = 512  # of K and V, so that states and their gradients fit into the memory

_TOKENS = ("batch", "heads", None, None)
_DECAY = ("batch", "heads", None, None, None)
_RUNS = ("batch", None, None, None)
_STATES = ("batch", "heads", None, None, None)


def supports(q: Array, v: Array, g: Array) -> bool:
    """Whether the kernel takes q [B, T, H, K] and v [B, T, H, V] with log-decays g [..., 1 or K] of the type of the state."""
    # A TPU's compiler refuses products over one channel of bfloat16.
    sizes = 1 < q.shape[-1] <= LARGEST and 0 < v.shape[-1] <= LARGEST
    return sizes and g.shape[-1] == 1 and g.dtype == jnp.float32


def attend(
    chunk: int,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "_ T _ 1"],
    start: Bool[Array, "B T"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention without scale and bonus, in chunks that divide the length.

    Args:
      chunk: tokens of a chunk, a multiple of `LEAST`.
      q, k, v: of which one token's read sees its write.
      g: log-decays, bounded; axes that are 1 are repeated.
      start: where the state restarts before a token.
      state: before the first token.

    Returns:
      y and the last state, float32.
    """
    B, T, H, _ = q.shape
    g = jnp.broadcast_to(g[..., 0], (B, T, H))
    if start is None:
        start = jnp.zeros((B, T), bool)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    y, final = _attend(chunk, q, k, v, jnp.swapaxes(g, 1, 2), start, state)
    return jnp.swapaxes(y, 1, 2), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunk, q, k, v, g, start, state):
    return _forward(chunk, q, k, v, g, start, state)[0]


def _of_chunks(chunk, g, start):
    """The sums of log-decays in each chunk [B, H, N, 1, chunk], and the numbers of restarts [B, N, 1, chunk]."""
    G = jnp.cumsum(g.reshape(*g.shape[:2], -1, 1, chunk), -1)
    return G, jnp.cumsum(start.reshape(start.shape[0], -1, 1, chunk).astype(jnp.int32), -1)


def _options(q, k, v):
    return {"factors": factor_dtype(q, k, v), "interpret": dispatch.current_platform() != "tpu"}


def _forward(chunk, q, k, v, g, start, state):
    run = functools.partial(_forward_local, **_options(q, k, v))
    axes = [_TOKENS, _TOKENS, _TOKENS, _DECAY, _RUNS, _TOKENS]
    y, final, states = dispatch.local(run, axes, (_TOKENS, _TOKENS, _STATES), kernel=True)(
        q, k, v, *_of_chunks(chunk, g, start), state
    )
    return (y, final), (q, k, v, g, start, states)


def _backward(chunk, residuals, cotangents):
    q, k, v, g, start, states = residuals
    dy, dfinal = cotangents
    run = functools.partial(_backward_local, **_options(q, k, v))
    axes = [_TOKENS, _TOKENS, _TOKENS, _TOKENS, _DECAY, _RUNS, _STATES, _TOKENS]
    outputs = (_TOKENS, _TOKENS, _TOKENS, _DECAY, _TOKENS)
    dq, dk, dv, dg, dstate = dispatch.local(run, axes, outputs, kernel=True)(
        q, k, v, dy, *_of_chunks(chunk, g, start), states, dfinal
    )
    return dq, dk, dv, jnp.where(start[:, None], 0, dg.reshape(g.shape)), None, dstate


_attend.defvjp(_forward, _backward)


def _blocks(shapes, count, reverse):
    """Of arrays that have a block for each batch, head and chunk: tokens, decays, restarts, states in chunks, and states."""
    at = (lambda n: count - 1 - n) if reverse else (lambda n: n)
    chunk, K, V = shapes
    tokens = lambda size: pl.BlockSpec((None, None, chunk, size), lambda b, h, n: (b, h, at(n), 0))
    decays = pl.BlockSpec((None, None, None, 1, chunk), lambda b, h, n: (b, h, at(n), 0, 0))
    restarts = pl.BlockSpec((None, None, 1, chunk), lambda b, h, n: (b, at(n), 0, 0))
    states = pl.BlockSpec((None, None, None, K, V), lambda b, h, n: (b, h, at(n), 0, 0))
    return tokens, decays, restarts, states, pl.BlockSpec((None, None, K, V), lambda b, h, n: (b, h, 0, 0))


def _call(kernel, name, grid, shape, interpret, **options):
    call = pl.pallas_call(
        kernel,
        grid=grid,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
        **options,
    )
    return jax.named_scope(name)(call)


def _forward_local(q, k, v, G, runs, state, *, factors, interpret):
    (B, H, N, _, chunk), K, V = G.shape, q.shape[-1], v.shape[-1]
    tokens, decays, restarts, states, one = _blocks((chunk, K, V), N, reverse=False)
    return _call(
        functools.partial(_forward_kernel, factors=factors),
        "linear_attention_forward",
        (B, H, N),
        (K, V),
        interpret,
        in_specs=[tokens(K), tokens(K), tokens(V), decays, restarts, one],
        out_specs=[tokens(V), one, states],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct((B, H, N, K, V), jnp.float32),
        ],
    )(q, k, v, G, runs, state)


def _backward_local(q, k, v, dy, G, runs, states, dfinal, *, factors, interpret):
    (B, H, N, _, chunk), K, V = G.shape, q.shape[-1], v.shape[-1]
    tokens, decays, restarts, of_chunks, one = _blocks((chunk, K, V), N, reverse=True)
    return _call(
        functools.partial(_backward_kernel, factors=factors),
        "linear_attention_backward",
        (B, H, N),
        (K, V),
        interpret,
        in_specs=[tokens(K), tokens(K), tokens(V), tokens(V), decays, restarts, of_chunks, one],
        out_specs=[tokens(K), tokens(K), tokens(V), decays, one],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            jax.ShapeDtypeStruct(G.shape, jnp.float32),
            jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
        ],
    )(q, k, v, dy, G, runs, states, dfinal)


def _dot(a, b, over, factors):
    """A product of two matrices over an axis of each, with sums in float32."""
    precision = dispatch.matmul_precision(factors)
    a, b = a.astype(factors), b.astype(factors)
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision, jnp.float32)


def _column(row):
    """[1, C] as [C, 1]."""
    place = lambda axis: lax.broadcasted_iota(jnp.int32, (row.shape[1],) * 2, axis)
    return jnp.sum(jnp.where(place(0) == place(1), row, jnp.zeros((), row.dtype)), axis=1, keepdims=True)


def _decays(G, runs, *, strict):
    """Inside of a chunk: between pairs [C, C] (0 where none reaches); and of `chunks.boundary_decays`, [C, 1] and [1, 1]."""
    C = G.shape[1]
    behind = lambda axis: lax.broadcasted_iota(jnp.int32, (C, C), axis)
    G_column, runs_column = _column(G), _column(runs)
    last, last_run = jnp.min(G, axis=1, keepdims=True), jnp.max(runs, axis=1, keepdims=True)
    reached = (behind(0) > behind(1) if strict else behind(0) >= behind(1)) & (runs_column == runs)
    pairs = jnp.where(reached, jnp.exp(jnp.where(reached, G_column - G, 0.0)), 0.0)
    enter = jnp.where(runs_column == 0, jnp.exp(G_column), 0.0)
    leave = jnp.where(runs_column == last_run, jnp.exp(last - G_column), 0.0)
    return pairs, enter, leave, jnp.where(last_run == 0, jnp.exp(last), 0.0)


def _forward_kernel(q_ref, k_ref, v_ref, G_ref, runs_ref, first_ref, y_ref, final_ref, states_ref, S_ref, *, factors):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        S_ref[...] = first_ref[...]

    q, k, v, S = q_ref[...], k_ref[...], v_ref[...], S_ref[...]
    pairs, enter, leave, through = _decays(G_ref[...], runs_ref[...], strict=False)
    dot = functools.partial(_dot, factors=factors)
    y_ref[...] = dot(dot(q, k, (1, 1)) * pairs, v, (1, 0)) + dot(q.astype(jnp.float32) * enter, S, (1, 0))
    states_ref[...] = S
    S = through * S + dot(k.astype(jnp.float32) * leave, v, (0, 0))
    S_ref[...] = S

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[...] = S


def _backward_kernel(
    q_ref, k_ref, v_ref, dy_ref, G_ref, runs_ref, S_ref, dfinal_ref, dq_ref, dk_ref, dv_ref, dg_ref, dfirst_ref, D_ref,
    *, factors,
):  # fmt: skip
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        D_ref[...] = dfinal_ref[...]

    q, k, v, dy = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref, dy_ref))
    S, D, runs = S_ref[...], D_ref[...], runs_ref[...]
    pairs, enter, leave, through = _decays(G_ref[...], runs, strict=True)
    dot, total = functools.partial(_dot, factors=factors), functools.partial(jnp.sum, axis=1, keepdims=True)

    # Without the diagonal: a token's read of its own write is added at the end.
    dscores = dot(dy, v, (1, 1)) * pairs
    dq = dot(dscores, k, (1, 0)) + enter * dot(dy, S, (1, 1))
    dk = dot(dscores, q, (0, 0))
    dk_leaving = leave * dot(v, D, (1, 1))
    dv = dot(dot(q, k, (1, 1)) * pairs, dy, (0, 0)) + dot(k * leave, D, (1, 0))

    # dL/dG, of which dg is the sum over what follows in the segment. The last token's write leaves undecayed.
    C = q.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    at_end = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
    leaving = jnp.where(at_end, 0.0, total(k * dk_leaving))
    passing = through * jnp.sum(total(S * D), axis=0, keepdims=True)
    dG = total(q * dq - k * dk) - leaving
    dG += jnp.where(at_end, jnp.sum(leaving, axis=0, keepdims=True) + passing, 0.0)
    follows = (row >= column) & (_column(runs) == runs)
    dg_ref[...] = jnp.sum(jnp.where(follows, dG, 0.0), axis=0, keepdims=True)

    own = total(dy * v)
    dq_ref[...] = (dq + k * own).astype(dq_ref.dtype)
    dk_ref[...] = (dk + dk_leaving + q * own).astype(dk_ref.dtype)
    dv_ref[...] = (dv + total(q * k) * dy).astype(dv_ref.dtype)
    D = through * D + dot(q * enter, dy, (0, 0))
    D_ref[...] = D

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        dfirst_ref[...] = D
