"""Attention with a kernel phi(q) . phi(k) for exp(q . k): what the kernelised linear attentions share.

    causal       y_t = sum_{s<=t} (q_t . k_s) v_s / sum_{s<=t} q_t . k_s          q, k: features, after phi
    two-sided    the sums run over all s of t's segment

The causal form is a recurrence (`ops.linear_attention`, or `ops.polynomial_attention`, which makes phi itself), the two-sided
one two matrix products.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import segments
from ops.dispatch import matmul_precision
from ops.linear_attention import linear_attention
from ops.polynomial_attention import Coefficients, features, polynomial_attention
from ops.running_max import NOTHING, running_max


def kernel_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T H F"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H F"] | None = None,
    *,
    causal: bool,
    polynomial: Coefficients | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    floor: float | None = None,
    initial_state: Float[Array, "B H K _"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K _"] | None]:
    """Causal or two-sided attention with features, with or without a denominator.

    Args:
      q, k: features of queries and keys; or, with `polynomial`, queries and keys.
      v: values.
      log_decay: g <= 0 of `ops.linear_attention`, only if `causal`. It acts on the numerator and the denominator.
      causal: False for the two-sided form, which has no state.
      polynomial: (c0, c1, c2) of the kernel c0 + c1 q.k + c2 (q.k)^2, whose features `ops.polynomial_attention` makes.
      normalize: divide by max(sum_s q_t . k_s, floor) + eps; else y_t = sum_s (q_t . k_s) v_s.
      eps, floor: guards of the denominator; none is needed where it is known to be positive.
      initial_state: state before the first token; zeros if None.
      segment_ids: 0 is padding; the sums stay inside the segments.

    Returns:
      y in v's dtype, zero at padding; and the final state, float32 [B, H, K, V + 1] (V if not `normalize`), None if
      two-sided. Its last column is the denominator's.
    """
    dtype = v.dtype
    if normalize:
        # A column of ones in v makes the denominator the last column of the sums.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1).astype(jnp.float32)
    if causal:
        attend = functools.partial(polynomial_attention, coefficients=polynomial) if polynomial else linear_attention
        y, state = attend(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids)
    else:
        q, k = (features(x, polynomial) if polynomial else x for x in (q, k))
        y, state = two_sided(q, k, v, segment_ids), None
    if normalize:
        y, total = y[..., :-1], y[..., -1:]
        if segment_ids is not None:
            total = jnp.where((segment_ids == 0)[..., None, None], 1, total)
        y = y / ((total if floor is None else jnp.maximum(total, floor)) + eps)
    return y.astype(dtype), state


def two_sided(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H V"]:
    """sum_s (q_t . k_s) v_s over the whole segment of t, in v's dtype; zero at padding."""
    if segment_ids is None:
        sums = jnp.einsum("bthk,bthv->bhkv", k, v, precision=matmul_precision(v.dtype))
        return jnp.einsum("bthk,bhkv->bthv", q, sums, precision=matmul_precision(v.dtype)).astype(v.dtype)
    past, _ = linear_attention(q, k, v, segment_ids=segment_ids)
    future, _ = linear_attention(*(segments.reverse(a, segment_ids) for a in (q, k, v)), segment_ids=segment_ids)
    own = segments.zero_padding(jnp.sum(q * k, -1, keepdims=True) * v, segment_ids)
    return past + segments.reverse(future, segment_ids) - own.astype(v.dtype)


def running_scale(
    log_weight: Float[Array, "B T ..."],
    initial_state: Float[Array, "B ..."] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B T ..."]]:
    """The units of a causal sum of exponentials in which it neither overflows nor vanishes.

    sum_{s<=t} exp(l_s) v_s = exp(m_t) S_t with S_t = exp(m_{t-1} - m_t) S_{t-1} + exp(l_t - m_t) v_t, m_t = max_{s<=t} l_s.
    What is made of such sums does not depend on m, so m has no gradient.

    Args:
      log_weight: l.
      initial_state: m before the first token; `NOTHING` if None.
      segment_ids: 0 is padding; the maximum is that of the segment.

    Returns:
      m, and the log-decay m_{t-1} - m_t, which is 0 where nothing has been summed.
    """
    no_decay = jnp.zeros(log_weight.shape[2:], jnp.float32)
    found = running_max(no_decay, log_weight, initial_state=initial_state, segment_ids=segment_ids)
    return found.maximum, jnp.where(found.before == NOTHING, 0, found.before - found.maximum)


def segment_scale(
    log_weight: Float[Array, "B T ..."], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B #T ..."]:
    """The maximum over each token's whole segment: `running_scale` for two-sided sums. It has no gradient."""
    if segment_ids is None:
        return jax.lax.stop_gradient(jnp.max(log_weight.astype(jnp.float32), 1, keepdims=True))
    past, _ = running_scale(log_weight, None, segment_ids)
    future, _ = running_scale(segments.reverse(log_weight, segment_ids), None, segment_ids)
    return jnp.maximum(past, segments.reverse(future, segment_ids))
