"""Performer: softmax attention by random features (FAVOR+)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import check_choice
from models.checks import at_least, head_size
from models.kernel_attention import kernel_attention, running_scale, segment_scale
from models.mixer import Context, Ids, Mixer, Tokens
from models.params import dense, param, residual_output
from models.partitioning import constrain
from ops import segments
from ops.projection import project, project_each
from ops.running_max import NOTHING


class Performer(Mixer):
    """y_t = sum_{s<=t} (phi(q_t) . phi(k_s)) v_s / sum_{s<=t} phi(q_t) . phi(k_s), with M features
    phi(x)_i = exp(w_i . x~ - |x~|^2 / 2) / sqrt(M), x~ = x / K^(1/4), so that phi(q) . phi(k) is exp(q . k / sqrt(K)) in
    expectation (Rethinking Attention with Performers, arXiv 2009.14794, lemma 1 and sections 2.3, 2.4). Two-sided: the sums
    run over all s. With `kernel="relu"` phi(x)_i = relu(w_i . x~) + eps, the paper's generalised attention.

    The M rows w_i are Gaussian, orthogonal in blocks of K, and belong to all heads. They are not trained: in training new ones
    are drawn at every step, in evaluation one fixed draw is used.

    Exponentials need a stabiliser: a factor that cancels between numerator and denominator. A query's is the maximum over its
    own features. The authors take a key's over the whole sequence, which looks ahead; here the sums are kept in units of the
    running maximum over keys and features (two-sided: the segment's), so that the causal form is causal, and the same in
    whole sequences and streams. Then some feature's sum of keys is at least 1, and eps added to the features of queries alone
    keeps the denominator positive. The authors add 1e-4 to the features of queries and of keys alike.

    Args:
      heads: number of heads.
      features: M.
      kernel: "softmax" or "relu".
      eps: see above; by default 1e-6 (softmax; 1e-4 in the authors' code) or 1e-3 (relu, as there).
      redraw: draw new w at every training step; else the fixed ones are used in training as well.
    """

    bidirectional = True
    position_aware = False
    uses_context = True
    random = True
    paper = "Performer, arXiv 2009.14794"
    primitive = "linear_attention"
    tiny = {"features": 20}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        features: int = 256,
        kernel: str = "softmax",
        eps: float | None = None,
        redraw: bool = True,
    ):
        check_choice("kernel", kernel, ("softmax", "relu"))
        at_least(1, features=features)
        at_least(0, eps=eps)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.kernel = kernel
        self.eps = {"softmax": 1e-6, "relu": 1e-3}[kernel] if eps is None else eps
        self.redraw = redraw
        self.random = redraw
        self.sizes = (heads, features, size + 1)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        shape = (features, size)
        self.w = param(rngs, orthogonal_rows, shape, (None, None), decay=False, group="fixed", keep_float32=True)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        w = jax.lax.stop_gradient(self.w[...])
        if self.redraw and context.key is not None:
            w = orthogonal_rows(context.key, w.shape, w.dtype)
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        q, k = (a.astype(jnp.float32) * a.shape[-1] ** -0.25 for a in (q, k))
        features = lambda a: jnp.einsum("bthk,mk->bthm", a, w, precision="highest")
        maximum, sums = (None, None) if state is None else (state["maximum"], state["sums"])
        log_decay = None
        if self.kernel == "relu":
            q, k = (jax.nn.relu(features(a)) + self.eps for a in (q, k))
        else:
            q = features(q)  # -|q~|^2 / 2 cancels as well
            q = jnp.exp(q - jnp.max(q, -1, keepdims=True)) + self.eps
            k = features(k) - 0.5 * jnp.sum(jnp.square(k), -1, keepdims=True)
            largest = jnp.max(k, -1)
            if self.causal:
                scale, log_decay = running_scale(largest, maximum, segment_ids)
                maximum = scale[:, -1]
            else:
                scale = segment_scale(largest, segment_ids)
            # At padding the scale may be `NOTHING`, whose difference from k would overflow.
            k = jnp.exp(segments.zero_padding(k - scale[..., None], segment_ids))
        y, sums = kernel_attention(q, k, v, log_decay, causal=self.causal, initial_state=sums, segment_ids=segment_ids)
        state = None if state is None else {"maximum": maximum, "sums": sums}
        return project(y, self.w_o[...], inputs=2), state, context.stream

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`.

        They are in the units of exp(q . k / sqrt(K)) and not of running maxima, and (softmax) they have no eps.
        """
        q, k = (a.astype(jnp.float32) * a.shape[-1] ** -0.25 for a in project_each(x, self.w_qkv[:, :2]))
        features = lambda a: jnp.einsum("bthk,mk->bthm", a, self.w[...], precision="highest")
        if self.kernel == "relu":
            phi = lambda a: jax.nn.relu(features(a)) + self.eps
        else:
            phi = lambda a: jnp.exp(features(a) - 0.5 * jnp.sum(jnp.square(a), -1, keepdims=True))
        return jnp.einsum("bthm,bshm->bhts", phi(q), phi(k)) / len(self.w[...]), "sum"

    def initial_state(self, batch: int, capacity: int) -> dict:
        return {
            "maximum": jnp.full((batch, self.sizes[0]), NOTHING, jnp.float32),
            "sums": jnp.zeros((batch, *self.sizes), jnp.float32),
        }


def orthogonal_rows(key, shape, dtype):
    """[M, K]: rows each N(0, I_K), those of a block of K orthogonal to each other: directions uniform, lengths chi(K)."""
    rows, size = shape
    directions, lengths = jax.random.split(key)
    blocks = orthonormal(jax.random.normal(directions, (-(-rows // size), size, size), dtype))
    norms = jnp.linalg.norm(jax.random.normal(lengths, shape, dtype), axis=-1, keepdims=True)
    return blocks.reshape(-1, size)[:rows] * norms


def orthonormal(z: Float[Array, "N K K"]) -> Float[Array, "N K K"]:
    """Q of z = Q R with a positive diagonal of R, by Gram-Schmidt, twice for each column. That of LAPACK, as in
    `jax.random.orthogonal`, waits inside a step for threads that its other devices may hold: on CPUs it would wait for ever."""
    product = functools.partial(jnp.einsum, precision="highest")

    def add(i, q):
        column = jax.lax.dynamic_index_in_dim(z, i, axis=2, keepdims=False)
        for _ in range(2):
            column = column - product("nij,nj->ni", q, product("nij,ni->nj", q, column))
        return q.at[:, :, i].set(column / jnp.linalg.norm(column, axis=-1, keepdims=True))

    return jax.lax.fori_loop(0, z.shape[-1], add, jnp.zeros_like(z))
