"""Luna: attention packed into, and unpacked from, a short extra sequence."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, head_size
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import LayerNorm
from models.params import dense, normal, param, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.linear_attention import linear_attention
from ops.products import factor_dtype, product
from ops.projection import project


class InitialMemory(nnx.Module):
    """P before the first layer: learned, N(0, 1/D), with the D of the base of a model that is scaled from one."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, base_width: int, causal: bool = True, memory: int = 16):
        at_least(1, memory=memory)
        self.causal = causal
        self.p = param(rngs, normal(base_width**-0.5), (memory, width), (None, "embed"), decay=False)

    def __call__(self, x: Tokens, *, segment_ids: Ids | None, positions: Ids):
        p = self.p[...].astype(x.dtype)
        return p if self.causal else jnp.broadcast_to(p, (x.shape[0], *p.shape))


class Luna(Mixer):
    """Two nested attentions through an extra sequence P of l tokens (arXiv 2106.01540, section 3).

    Two-sided, with softmax(Q K^T / sqrt(K)) V for Attn and keys that are also the values:

        Y_P = Attn(W_pq P, W_pc x, W_pc x)         P packs the sequence
        y   = W_o Attn(W_q x, W_c Y_P, W_c Y_P)    which is unpacked again
        P  <- LayerNorm(P + Y_P)                   for the next layer

    Causal, with c_t = W_c x_t, everything per head and divided by the number t of tokens so far:

        a_t = omega(W_pc x_t . W_pq P / sqrt(K))   in R^l, elementwise
        w_t = softmax((1/t) sum_{s<=t} (W_q x_t . c_s / sqrt(K)) a_s)
        y_t = W_o (1/t) sum_{s<=t} (w_t . a_s) c_s

    that is two linear attentions, with the state of l numbers per channel twice. omega(z) = log2(1 + 2^z); the authors also
    use elu(z) + 1. P is the same in all layers then, as in the authors' decoder without an encoder.

    Two-sided, the row has one P: documents packed into one row would share it, so that it declares no packing. The causal
    form takes packed rows.

    The maps start as N(0, 1/D); the authors' as xavier / √2, with a deviation 0.71 times as large.

    Args:
      heads: number of heads of both attentions.
      memory: l.
    """

    bidirectional = True
    packing = False
    position_aware = False
    uses_context = True
    Shared: ClassVar[type[nnx.Module]] = InitialMemory
    paper = "Luna, arXiv 2106.01540"
    primitive = "linear_attention"
    tiny = {"memory": 5}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        memory: int = 16,
    ):
        size = head_size(width, heads, "width")
        at_least(1, memory=memory)
        self.causal = causal
        self.packing = causal
        self.sizes = (heads, size, memory)
        self.w_pq = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_pc = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_c = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.norm = None if causal else LayerNorm(width, rngs=rngs)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        to_heads = lambda w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        p = context.stream
        q, packed = to_heads(self.w_q), to_heads(self.w_pc)
        if self.causal:
            y, state = self.recur(q, packed, to_heads(self.w_c), p, state, segment_ids, positions)
        else:
            tokens = memory = None
            if segment_ids is not None:
                tokens = jnp.sign(segment_ids)
                memory = jnp.ones(p.shape[:2], tokens.dtype)
            where = {"causal": False, "segment_ids": memory, "key_segment_ids": tokens}
            y_p = attention(project(p, self.w_pq[...]), packed, packed, **where).reshape(p.shape)
            c = project(y_p, self.w_c[...])
            y = attention(q, c, c, causal=False, segment_ids=tokens, key_segment_ids=memory)
            p = self.norm(p + y_p)
        return project(y, self.w_o[...], inputs=2), state, p

    def recur(self, q, packed, c, p, state, segment_ids, positions):
        scale = q.shape[-1] ** -0.5
        memory = scale * project(p, self.w_pq[...])
        z = product("bthk,lhk->bthl", packed, memory, factor_dtype(packed, memory))
        a = jax.nn.softplus(math.log(2) * z) / math.log(2)
        count = (positions + 1)[:, :, None, None]
        first, second = (None, None) if state is None else (state["keys"], state["values"])
        # The softmax is blind to what all of a_t share, which is most of it: omega(0) = 1. Without it, rounding is smaller.
        apart = a - jnp.mean(a, -1, keepdims=True)
        scores, first = linear_attention(q, c, apart, scale=scale, initial_state=first, segment_ids=segment_ids)
        w = jax.nn.softmax(scores / count, -1)
        y, second = linear_attention(w, a, c.astype(jnp.float32), initial_state=second, segment_ids=segment_ids)
        return (y / count).astype(q.dtype), None if state is None else {"keys": first, "values": second}

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size, memory = self.sizes
        zeros = lambda *shape: jnp.zeros((batch, heads, *shape), jnp.float32)
        return {"keys": zeros(size, memory), "values": zeros(memory, size)}
