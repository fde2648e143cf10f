"""The lightning indexer of DeepSeek: scores by which each query chooses keys, and what they learn from (arXiv 2512.02556)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops.products import factor_dtype, product
from ops.selected_attention import are_few, marked, over_queries, spans


def index_scores(
    q: Float[Array, "B C I D"], w: Float[Array, "B C I"], k: Float[Array, "B ... D"]
) -> Float[Array, "B C N"]:
    """sum_j w_j relu(q_j . k), in float32; the keys are the same for all queries, or each query has its own. Zeros are +0."""
    s = jax.nn.relu(product(f"bcid,{'bnd' if k.ndim == 3 else 'bcnd'}->bcin", q, k, factor_dtype(q, k)))
    s = product("bci,bcin->bcn", w, s)
    return jnp.where(s == 0, 0.0, s)


def index_divergence(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    log: Float[Array, "B T H"],
    qi: Float[Array, "B T I D"],
    ki: Float[Array, "B S D"],
    w: Float[Array, "B T I"],
    chosen: Int[Array, "B T N"],
    valid: Bool[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, ""]:
    """The divergence of the softmax over the chosen keys' index scores from the heads' mean attention to them, over tokens.

    Args:
      q, k: of the attention, through which no gradient goes.
      log: the normaliser of the attention to the chosen keys, as `ops.selected_attention` returns it.
      qi, ki, w: index queries, keys and weights.
      chosen: the keys, -1 for none.
      valid: tokens that count.
      scale: factor of q . k.
    """
    q, k, log = jax.lax.stop_gradient((q, k, log))
    (S, groups), N = k.shape[1:3], chosen.shape[-1]
    few = are_few(N, S)
    cols = N if few else S

    def one(block):
        q, log, qi, w, chosen = block
        B, C, H, K = q.shape
        if few:
            seen = chosen >= 0
            pick = lambda a: spans(a, jnp.maximum(chosen, 0).reshape(B, C * N), 1).reshape(B, C, N, *a.shape[2:])
            keys, index_keys, equation = pick(k), pick(ki), "bcgrk,bcngk->bcgrn"
        else:
            seen, keys, index_keys, equation = marked(chosen, S), k, ki, "bcgrk,bngk->bcgrn"
        s = product(equation, q.reshape(B, C, groups, -1, K), keys, factor_dtype(q))
        p = jnp.exp(scale * s.reshape(B, C, H, cols) - log[..., None])
        p = jnp.mean(jnp.where(seen[:, :, None], p, 0), 2)
        log_i = jax.nn.log_softmax(jnp.where(seen, index_scores(qi, w, index_keys), -1e30))
        return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_i), 0), -1)

    per_query = N * groups * q.shape[-1] if few else S * q.shape[2]
    size = max(1, min(128, 2**22 // (q.shape[0] * per_query)))
    divergence = over_queries(one, size, (q, log, qi, w, chosen))
    return jnp.sum(jnp.where(valid, divergence, 0)) / jnp.maximum(jnp.sum(valid), 1)
