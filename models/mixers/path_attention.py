"""PaTH attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, grouped_heads
from models.kv_cache import buffers, extend, held, nan_if_overfull, of_document, replace
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import conv_taps, dense, param, residual_output, time_scale, zeros
from models.partitioning import constrain
from ops.attention import attention_with_logsumexp, merge
from ops.elementwise import silu
from ops.path_attention import path_attention
from ops.projection import project
from ops.short_convolution import short_convolution


class PaTHAttention(Mixer):
    """y_i = W_o sum_j softmax_j((q_i^T H_i H_{i-1} ... H_{j+1} k_j + c_i - c_j) / sqrt(K)) v_j, H_t = I - beta_t w_t w_t^T
    (arXiv 2505.16381, section 2).

    The map between a key and a query is made of the tokens between them, where rotary embedding turns by their number: products
    of reflections (beta = 2) and projections (beta = 1) follow states that fixed rotations cannot.
    w = l2norm(silu(conv(W_2 W_1 x))) and beta = 2 sigmoid(W_b x + b_b), one for each key-value head. With `forget_gate`
    (PaTH-FoX) c is the running sum of log sigmoid(W_f x + b_f), one for each head, which here is divided by sqrt(K) with the rest
    of the score; else c = 0.

    The carry holds all keys as the last token sees them, so that every token maps all of them: k_j <- H_t k_j.

    Query head h reads key-value head floor(h G / H). Maps start as elsewhere here; the authors start all as N(0, 0.02^2). With
    `qk_norm` queries and keys are normalised in decoding, too, which fla's layer leaves out.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H.
      head_channels: K; by default width / H.
      rank: of the map to w; None for one map W in place of W_2 W_1, as the authors have for grouped heads.
      conv_size: taps of the convolution.
      forget_gate: whether scores fall with c.
      qk_norm: whether queries and keys are normalised, with a weight for each channel of a head.
    """

    constant_carry = False
    paper = "PaTH Attention, arXiv 2505.16381"
    primitive = "path_attention"
    sequence_parallel = ()  # transitions are multiplied along the length
    complexity = "T^2"
    tiny = {"kv_heads": 2, "rank": 6, "forget_gate": True, "qk_norm": True}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        rank: int | None = 32,
        conv_size: int = 3,
        forget_gate: bool = False,
        qk_norm: bool = False,
    ):
        at_least(1, heads=heads, head_channels=head_channels, rank=rank)
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        self.kv_heads, self.head_channels, self.conv_size, self.rank = kv_heads, size, conv_size, rank
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_1 = None if rank is None else dense(rngs, (width, rank), ("embed", None))
        self.w_2 = dense(rngs, (rank or width, kv_heads * size), (None if rank else "embed", "kv_heads"))
        self.taps = conv_taps(rngs, conv_size, kv_heads * size, "kv_heads")
        self.w_beta = dense(rngs, (width, kv_heads), ("embed", None))
        self.b_beta = param(rngs, zeros, (kv_heads,), (None,), decay=False, keep_float32=True)
        self.w_f = dense(rngs, (width, heads), ("embed", "heads")) if forget_gate else None
        self.b_f = time_scale(rngs, zeros, (heads,), ("heads",)) if forget_gate else None
        self.q_norm = RMSNorm(size, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(size, rngs=rngs) if qk_norm else None
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        # What `tensor` does not split comes first, and the gradients of the others are summed over it together.
        beta = 2 * jax.nn.sigmoid(project(x, self.w_beta[...]).astype(jnp.float32) + self.b_beta[...])
        scale, decay = self.head_channels**-0.5, None
        if self.w_f is not None:
            log_f = jax.nn.log_sigmoid(project(x, self.w_f[...]).astype(jnp.float32) + self.b_f[...])
            decay = scale * jnp.cumsum(log_f, axis=1)
            if state is not None:
                decay = state["sum"][:, None] + decay
        u = x if self.w_1 is None else project(x, self.w_1[...])
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        taps = None if state is None else of_document(state, "conv", segment_ids)
        u, taps = short_convolution(
            project(u, self.w_2[...]), self.taps[...], initial_state=taps, segment_ids=segment_ids
        )
        w = l2_normalize(silu(u).reshape(k.shape).astype(jnp.float32))
        path = path_attention(q, k, v, w, beta, decay=decay, scale=scale, segment_ids=segment_ids)
        y = path.y
        if state is not None:
            y, _ = merge([(y, path.log), self.attend_to_past(state, path.queries, v, decay, segment_ids)])
            keys = jnp.einsum(
                "bgkl,bsgl->bsgk", path.through, held(state, "key", jnp.float32), precision=jax.lax.Precision.HIGHEST
            )
            new = {"key": path.keys, "value": v, "segment": segment_ids} | ({} if decay is None else {"decay": decay})
            last = {"conv": taps} | ({} if decay is None else {"sum": decay[:, -1]})
            state = extend(replace(state, "key", keys), new) | last
            y = nan_if_overfull(state, y)
        return project(y.astype(x.dtype), self.w_o[...], inputs=2), state

    def attend_to_past(self, state, q, v, decay, segment_ids):
        """Attention to the tokens before the piece, whose keys are mapped to its start, as its queries are."""
        return attention_with_logsumexp(
            q.astype(v.dtype),
            held(state, "key", v.dtype),
            held(state, "value", v.dtype),
            scale=self.head_channels**-0.5,
            decay=decay,
            key_decay=None if decay is None else held(state, "decay", jnp.float32),
            segment_ids=segment_ids,
            key_segment_ids=state["segment"],
            query_offset=state["length"],
        )

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, sizes = self.w_q.shape[1], (self.kv_heads, self.head_channels)
        gate = {"decay": (heads,)} if self.w_f is not None else {}
        state = buffers(batch, capacity, key=sizes, value=sizes, **gate)
        state["conv"] = jnp.zeros((batch, self.conv_size - 1, self.taps.shape[1]), jnp.float32)
        return state | ({"sum": jnp.zeros((batch, heads), jnp.float32)} if gate else {})
