"""Gated attention unit, FLASH-Quad."""

import math

import jax.numpy as jnp
from flax import nnx

from common.errors import UserError, check_choice
from models.checks import even, scaled
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, normal, ones, param, zeros
from models.partitioning import constrain
from ops import segments
from ops.attention import attention
from ops.elementwise import silu
from ops.projection import project
from ops.rotary import rotary


class GatedAttentionUnit(Mixer):
    """o = W_o (u * A v), A = relu(q k^T / n + b)^2 (Transformer Quality in Linear Time, arXiv 2202.10447, section 3).

    u = silu(W_u x) and v = silu(W_v x) have `expansion` times the width; q and k are two scaled and shifted copies of
    the shared z = silu(W_z x), then rotated; there is one head and no normalisation of the rows. The bias is
    b_ij = rope(a)_i . rope(c)_j with learned a and c, the paper's form for long sequences, which it is here at every
    length (for n <= 512 the paper has a table of 2n - 1 entries instead).

    The paper's n is the length of the (full) sequence. A stream has no length, so n is the length that the model is built
    for. `normalizer="count"` is the length-independent relu(q k^T / sqrt(s) + b)^2 / n_i, with n_i the number of
    keys that row i sees.

    `normalizer="softmax"` is GAU-alpha's A = softmax((log n_i / log n) q k^T / sqrt(s)), n being its training length of 512
    and n_i at least 16. It has no bias, and its q and k are scaled copies of z without a shift, the scales 1 at first.

    Args:
      expansion: size of u and v over the width.
      key_size: s, the size of z.
      normalizer: "length", "count" or "softmax", as above.
    """

    bidirectional = True
    constant_carry = False
    replaces_channel_mixer = True
    paper = "FLASH (GAU, FLASH-Quad), arXiv 2202.10447"
    primitive = "attention"
    sequence_parallel = ("causal", "two-sided")
    complexity = "T^2"
    tiny = {"key_size": 16}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        length: int = 512,
        expansion: float = 2.0,
        key_size: int = 128,
        normalizer: str = "length",
    ):
        check_choice("normalizer", normalizer, ("length", "count", "softmax"))
        if normalizer == "softmax" and length < 2:
            raise UserError(f"`normalizer`='softmax' divides by the logarithm of the length, got length={length}")
        even(key_size=key_size)
        hidden = scaled(width, expansion=expansion)
        self.causal = causal
        self.normalizer = normalizer
        self.length = length
        softmax = normalizer == "softmax"
        self.sizes = (key_size if softmax else 2 * key_size, hidden)
        self.w_u = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_v = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_z = dense(rngs, (width, key_size), ("embed", None))
        self.w_o = dense(rngs, (hidden, width), ("mlp", "embed"))
        pair = lambda init: param(rngs, init, (2, key_size), (None, None), decay=False)
        self.gamma = pair(ones if softmax else normal(0.02))
        self.beta = None if softmax else pair(zeros)
        self.bias = None if softmax else pair(normal(0.02))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        u = constrain(silu(project(x, self.w_u[...])), "batch", "length", "mlp")
        v = constrain(silu(project(x, self.w_v[...])), "batch", "length", "mlp")[:, :, None]
        z = silu(project(x, self.w_z[...]))
        q, k, count = *self.queries_and_keys(z, positions), self.count(segment_ids, positions)[..., None]
        options = {"activation": "relu2", "scale": 1.0}
        if self.normalizer == "softmax":
            scale = jnp.log(jnp.maximum(count, 16).astype(jnp.float32)) / math.log(self.length)
            q = (q * scale[..., None]).astype(q.dtype)
            options = {"activation": "softmax", "scale": z.shape[-1] ** -0.5}
        if state is None:
            y = attention(q, k, v, **options, causal=self.causal, segment_ids=segment_ids)
        else:
            offset = state["length"]
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            y = attention(
                q,
                held(state, "key", q.dtype),
                held(state, "value", v.dtype),
                **options,
                segment_ids=segment_ids,
                key_segment_ids=state["segment"],
                query_offset=offset,
            )
        y = y[:, :, 0]
        if self.normalizer == "count":
            y = (y / count).astype(x.dtype)
        return project(u * y, self.w_o[...]), state

    def queries_and_keys(self, z, positions):
        """The rotated copies of z, with the bias (if any) as further channels: [q, rope(a)] . [k, rope(c)] = q . k + b."""
        if self.normalizer == "softmax":
            return [rotary((z * self.gamma[i])[:, :, None], positions) for i in (0, 1)]
        q, k = (rotary((z * self.gamma[i] + self.beta[i])[:, :, None], positions) for i in (0, 1))
        q = q / self.length if self.normalizer == "length" else q * q.shape[-1] ** -0.5
        bias = jnp.broadcast_to(self.bias[...][:, None, None, None], (2, *q.shape))
        b_q, b_k = (rotary(bias[i].astype(q.dtype), positions) for i in (0, 1))
        return jnp.concatenate([q, b_q], -1), jnp.concatenate([k, b_k], -1)

    def count(self, segment_ids, positions):
        """Number of keys that each row sees."""
        if self.causal:
            return positions + 1
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        return segments.lengths(ids)

    def initial_state(self, batch: int, capacity: int) -> dict:
        key, hidden = self.sizes
        return buffers(batch, capacity, key=(1, key), value=(1, hidden))
