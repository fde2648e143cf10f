"""Gated attention unit, FLASH-Quad."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.kv_cache import buffers, extend
from models.mixer import Mixer
from models.params import dense, normal, param, zeros
from models.partitioning import constrain
from ops import segments
from ops.attention import attention
from ops.rotary import rotary


class GatedAttentionUnit(Mixer):
    """o = W_o (u * A v), A = relu(q k^T / n + b)^2 (Transformer Quality in Linear Time, arXiv 2202.10447, section 3).

    u = silu(W_u x) and v = silu(W_v x) have `expansion` times the width; q and k are two scaled and shifted copies of
    the shared z = silu(W_z x), then rotated; there is one head and no normalisation of the rows. The bias is
    b_ij = rope(a)_i . rope(c)_j with learned a and c, the paper's form for long sequences, which it is here at every
    length (for n <= 512 the paper has a table of 2n - 1 entries instead).

    The paper's n is the length of the (full) sequence. A stream has no length, so n is a constant here; take the training
    length. `normalizer="count"` is the length-independent relu(q k^T / sqrt(s) + b)^2 / n_i, with n_i the number of
    keys that row i sees.

    Args:
      expansion: size of u and v over the width.
      key_size: s, the size of z.
      normalizer: "length" or "count", as above.
      length: n for `normalizer="length"`.
    """

    bidirectional = True
    constant_carry = False
    replaces_channel_mixer = True
    paper = "FLASH (GAU, FLASH-Quad), arXiv 2202.10447"
    primitive = "attention"
    complexity = "T^2"
    tiny = {"key_size": 16, "length": 8}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        expansion: float = 2.0,
        key_size: int = 128,
        normalizer: str = "length",
        length: int = 512,
    ):
        if normalizer not in ("length", "count"):
            raise ValueError(f"gau's normalizer must be 'length' or 'count', got {normalizer!r}")
        hidden = int(expansion * width)
        self.causal = causal
        self.normalizer = normalizer
        self.length = length
        self.sizes = (2 * key_size, hidden)
        self.w_u = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_v = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_z = dense(rngs, (width, key_size), ("embed", None))
        self.w_o = dense(rngs, (hidden, width), ("mlp", "embed"))
        self.gamma = param(rngs, normal(0.02), (2, key_size), (None, None), decay=False)
        self.beta = param(rngs, zeros, (2, key_size), (None, None), decay=False)
        self.bias = param(rngs, normal(0.02), (2, key_size), (None, None), decay=False)

    def mix(self, x, state, *, segment_ids, positions):
        u = constrain(jax.nn.silu(x @ self.w_u[...]), "batch", "length", "mlp")
        v = constrain(jax.nn.silu(x @ self.w_v[...]), "batch", "length", "mlp")[:, :, None]
        z = jax.nn.silu(x @ self.w_z[...])
        q, k = (rotary((z * self.gamma[i] + self.beta[i])[:, :, None], positions) for i in (0, 1))
        bias = jnp.broadcast_to(self.bias[...][:, None, None, None], (2, *q.shape))
        b_q, b_k = (rotary(bias[i].astype(q.dtype), positions) for i in (0, 1))
        count = self.count(segment_ids, positions)
        q = q / self.length if self.normalizer == "length" else q * q.shape[-1] ** -0.5
        # [q, rope(a)] . [k, rope(c)] = q . k + b
        q, k = jnp.concatenate([q, b_q], -1), jnp.concatenate([k, b_k], -1)
        if state is None:
            y = attention(q, k, v, activation="relu2", scale=1.0, causal=self.causal, segment_ids=segment_ids)
        else:
            offset = state["length"]
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            y = attention(
                q,
                state["key"].astype(q.dtype),
                state["value"].astype(v.dtype),
                activation="relu2",
                scale=1.0,
                segment_ids=segment_ids,
                key_segment_ids=state["segment"],
                query_offset=offset,
            )
        y = y[:, :, 0]
        if self.normalizer == "count":
            y = (y / count[..., None]).astype(x.dtype)
        return (u * y) @ self.w_o[...], state

    def count(self, segment_ids, positions):
        """Number of keys that each row sees."""
        if self.causal:
            return positions + 1
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        index = segments.positions(ids)
        return index + segments.reverse(index, ids) + 1

    def initial_state(self, batch, capacity):
        key, hidden = self.sizes
        return buffers(batch, capacity, key=(1, key), value=(1, hidden))
