"""The running maximum that keeps decayed sums of exponentials in range.

    s_t = exp(g_t) s_{t-1} + exp(i_t) x_t

overflows where i_t is large. Written as s_t = exp(m_t) s'_t with m_t = max(g_t + m_{t-1}, i_t) it cannot, and s' is again
a decayed sum, whose decays and weights are at most 1, so that any primitive with decay computes it:

    s'_t = exp(g_t + m_{t-1} - m_t) s'_{t-1} + exp(i_t - m_t) x_t

RWKV-4 (arXiv 2305.13048, appendix D), mLSTM (2405.04517, equation 15).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, segments, sequence

# The maximum before the first token: that of nothing, finite so that no difference is NaN.
NOTHING = -1e30


class Scaled(NamedTuple):
    """A decayed sum of exponentials in units of exp(m_t); float32 or float64.

    Attributes:
      log_decay: g_t + m_{t-1} - m_t, at most 0 up to rounding.
      log_weight: i_t - m_t, `NOTHING` on padding.
      maximum: m_t.
      before: m_{t-1}, `NOTHING` at the first token of a segment.
      final: the m of the last token.
    """

    log_decay: Float[Array, "B T ..."]
    log_weight: Float[Array, "B T ..."]
    maximum: Float[Array, "B T ..."]
    before: Float[Array, "B T ..."]
    final: Float[Array, "B ..."]


@dispatch.primitive("reference", "sequential", "associative")
def running_max(
    log_decay: Float[Array, "..."],
    log_input: Float[Array, "B T ..."],
    *,
    initial_state: Float[Array, "B ..."] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> Scaled:
    """Computes m_t = max(g_t + m_{t-1}, i_t) and what it makes of decays and inputs.

    No gradients flow through m: the sum that it scales does not depend on it.

    Args:
      log_decay: g <= 0, [B, T, ...] like `log_input` or [...] when constant in time.
      log_input: i.
      initial_state: m before the first token; `NOTHING` by default.
      segment_ids: 0 is padding, which leaves m as it is; a change restarts it.
      implementation: "reference" and "sequential" (one program, token by token, because no gradient is taken) or
        "associative" (parallel prefix). "auto" is sequential on CPU and associative elsewhere.
    """
    policy = "sequential" if dispatch.on_cpu() else "associative"
    form = dispatch.choose("running_max", implementation, policy)
    dtype = jnp.promote_types(jnp.result_type(log_decay, log_input), jnp.float32)
    # A difference of infinities would be NaN.
    g, i = (jnp.maximum(x.astype(dtype), NOTHING) for x in (log_decay, log_input))
    g = jnp.broadcast_to(g, i.shape)
    state = jnp.full(i[:, 0].shape, NOTHING, dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    if sequence.is_split(i.shape[1]):
        return _over_shards(g, i, state, segment_ids, implementation)
    start = None
    if segment_ids is not None:
        start = segments.expand(segments.is_start(segment_ids), i.ndim)
        padding = segments.expand(segment_ids == 0, i.ndim)
        g, i = jnp.where(padding, 0, g), jnp.where(padding, NOTHING, i)
    m, before = _maxima(form, *map(lax.stop_gradient, (g, i, state)), start)
    weight = i - m if segment_ids is None else jnp.where(padding, NOTHING, i - m)
    # The difference of the maxima first: it is all but exact, so that what g has lost in m it keeps here.
    return Scaled(g + (before - m), weight, m, before, m[:, -1])


def _over_shards(g, i, state, segment_ids, implementation):
    def run(state, segment_ids, g, i):
        *found, final = running_max(g, i, initial_state=state, segment_ids=segment_ids, implementation=implementation)
        return found, final

    def total(segment_ids, g, i):
        _, own = run(jnp.full_like(i[:, 0], NOTHING), segment_ids, g, i)
        decay = jnp.sum(segments.zero_padding(g, segment_ids), axis=1)
        if segment_ids is not None:
            restarts = segments.expand(jnp.any(segments.is_start(segment_ids), axis=1), decay.ndim)
            decay = jnp.where(restarts, NOTHING, decay)
        return lax.stop_gradient((decay, own))

    tokens = ("batch", "length", *(None,) * (i.ndim - 2))
    found, final = sequence.recurrence(
        run,
        total,
        {"g": g, "i": i},
        {"g": tokens, "i": tokens},
        [(tokens, i.shape)] * 4,
        lax.stop_gradient(state),
        ("batch", *(None,) * (i.ndim - 2)),
        segment_ids,
        act=jnp.add,
        add=jnp.maximum,
        void=NOTHING,
    )
    return Scaled(*found, final)


def _maxima(form, g, i, state, start):
    """m_t and m_{t-1}."""
    if start is not None:
        g = jnp.where(start, NOTHING, g)
    if form != "associative" or i.shape[1] == 1:
        _, m = lax.scan(_step, state, (jnp.moveaxis(g, 1, 0), jnp.moveaxis(i, 1, 0)))
        m = jnp.moveaxis(m, 0, 1)
    else:
        total, m = lax.associative_scan(_compose, (g, i), axis=1)
        m = jnp.maximum(m, total + state[:, None])
    before = jnp.concatenate([state[:, None], m[:, :-1]], axis=1)
    return m, before if start is None else jnp.where(start, NOTHING, before)


def _step(m, token):
    g, i = token
    m = jnp.maximum(g + m, i)
    return m, m


def _compose(earlier, later):
    """Two maps m -> max(g + m, i), one after the other."""
    (g1, i1), (g2, i2) = earlier, later
    return g1 + g2, jnp.maximum(g2 + i1, i2)
