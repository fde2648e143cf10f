"""Differential attention, versions 1 and 2."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least, check_rotated, head_size, positive
from models.kv_cache import buffers, extend, held
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import rms_normalize
from models.params import dense, normal, param, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.projection import project
from ops.rotary import rotary


class DifferentialAttention(Mixer):
    """o = (softmax(q1 k1^T / sqrt(K)) - lambda softmax(q2 k2^T / sqrt(K))) v, y = W_o o (arXiv 2410.05258, section 2.1).

    Version 1: K = D / (2 heads), values of 2 K channels, and one lambda for each layer,
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init, lambda_init = 0.8 - 0.6 exp(-0.3 layer), with layers of this mixer
    counted from 0; o <- (1 - lambda_init) o / rms(o) for each head, eps 1e-5. The authors' later code has a weight for each
    channel behind this norm, which all heads share; their first code and transformers' DiffLlama have none.

    Version 2 (the authors' code in microsoft/unilm, `Diff-Transformer-V2`): K = D / heads, each head has two queries and one key
    and value, k1 = k2, lambda = sigmoid(W_lambda x) for each token and head, and there is no norm.

    Positions are rotary, in pairs of neighbouring channels as in the authors' code; transformers' DiffLlama pairs the halves of a
    head, and of the heads. Maps start as elsewhere here, the authors' as PyTorch's; the vectors of lambda start as theirs,
    N(0, 0.1^2).

    Args:
      heads: number of pairs of queries.
      kv_heads: number of (pairs of) keys, a divisor of `heads`; by default `heads`.
      version: 1 or 2.
      rotary_base: base of the rotary frequencies.
    """

    bidirectional = True
    constant_carry = False
    uses_context = True
    paper = "Differential Transformer, arXiv 2410.05258"
    primitive = "attention"
    sequence_parallel = ("causal", "two-sided")
    complexity = "T^2"
    tiny = {"kv_heads": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        version: int = 1,
        rotary_base: float = 10000.0,
    ):
        at_least(1, heads=heads)
        positive(rotary_base=rotary_base)
        if version not in (1, 2):
            raise UserError(f"`version` must be 1 or 2, got {version}")
        kv_heads = heads if kv_heads is None else kv_heads
        head_size(heads, kv_heads, "the number of query heads", "kv_heads")
        size = head_size(
            width, 2 * heads if version == 1 else heads, "width", "halves of heads" if version == 1 else "heads"
        )
        check_rotated(size)
        self.causal = causal
        self.kv_heads = kv_heads
        self.version = version
        self.rotary_base = rotary_base
        key_heads, value = (2 * kv_heads, 2 * size) if version == 1 else (kv_heads, size)
        self.sizes = (key_heads, size), (kv_heads, value)
        self.w_q = dense(rngs, (width, 2 * heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, key_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, value), ("embed", "kv_heads", None))
        self.w_o = residual_output(rngs, (heads, value, width), ("heads", None, "embed"), depth)
        if version == 1:
            # Rows: queries and keys; columns: the two attentions.
            self.lambdas = param(rngs, normal(0.1), (2, 2, size), (None, None, None), decay=False, keep_float32=True)
        else:
            self.w_lambda = dense(rngs, (width, heads), ("embed", "heads"))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        q = constrain(project(x, self.w_q[...]), "batch", "length", "heads", None)
        k = constrain(project(x, self.w_k[...]), "batch", "length", "kv_heads", None)
        v = constrain(project(x, self.w_v[...]), "batch", "length", "kv_heads", None)
        q, k = (rotary(a, positions, base=self.rotary_base, layout="interleaved") for a in (q, k))
        where = {"causal": self.causal, "segment_ids": segment_ids}
        if state is not None:
            where["query_offset"] = state["length"]
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            k, v = (held(state, name, q.dtype) for name in ("key", "value"))
            where["key_segment_ids"] = state["segment"]
        if self.version == 1:
            first, second = (attention(q[:, :, i::2], k[:, :, i::2], v, **where) for i in (0, 1))
            start = 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(context.layer, jnp.float32))
            one, two = jnp.exp(jnp.sum(self.lambdas[0] * self.lambdas[1], axis=-1))
            y = rms_normalize(self.difference(first, one - two + start, second), eps=1e-5)
            y = ((1 - start) * y).astype(x.dtype)
        else:
            y = attention(q, k, v, **where)
            share = jax.nn.sigmoid(project(x, self.w_lambda[...]))[..., None]
            y = self.difference(y[:, :, 0::2], share, y[:, :, 1::2])
        return project(y, self.w_o[...], inputs=2), state, context.stream

    def difference(
        self, first: Float[Array, "B T H V"], share: Float[Array, "..."], second: Float[Array, "B T H V"]
    ) -> Float[Array, "B T H V"]:
        """What the first attention gives without a share of what the second does, in the first's dtype."""
        return (first - share * second).astype(first.dtype)

    def initial_state(self, batch: int, capacity: int) -> dict:
        key, value = self.sizes
        return buffers(batch, capacity, key=key, value=value)
