"""Multi-head latent attention."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import check_choice
from models.checks import at_least, check_rotated, head_size, positive, unused
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.elementwise import gate
from ops.projection import project, project_blocks
from ops.rotary import rotary
from ops.rotary_scaling import frequencies

sigmoid_gate = functools.partial(gate, jax.nn.sigmoid)


class MultiHeadLatentAttention(Mixer):
    """Keys and values of all heads are maps of one latent vector c of each token (arXiv 2405.04434, section 2.1).

    q = W_uq norm(W_dq x), or W_q x;  c = norm(W_dkv x);  k_h = [W_uk,h c, rotated(W_kr x)],  v_h = W_uv,h c, and
    y = W_o softmax(q k^T / sqrt(K_n + K_r)) v. The rotated part of the keys is one for all heads; of each query the last K_r
    channels are rotated.

    The carry holds (c, rotated key) only, kv_rank + rotary_channels numbers for each token. A short piece attends to it as it
    is: q_h . W_uk,h c = (W_uk,h^T q_h) . c, and sum_j p_j W_uv,h c_j = W_uv,h sum_j p_j c_j, so that all heads share one key and
    one value (section 2.1.2). A longer piece, and a whole sequence, expands it into keys and values.

    The norms' eps is 1e-6, as in the authors' code whatever the model's is. DeepSeek scales the softmax of models whose context
    was extended: give it as `scale`.

    Args:
      heads: H.
      q_rank: size of the queries' latent; None for queries straight from x.
      kv_rank: size of c.
      nope_channels: K_n, channels of queries and keys that are not rotated; by default width / H.
      rotary_channels: K_r.
      value_channels: channels of a head's values; by default width / H.
      positions: "rotary", "none", or "nope": none, and "auto" of the model's `position_embedding` adds none (Kimi Linear).
      rotary_base: base of the rotary frequencies; pairs are neighbouring channels.
      rotary_scaling: a rule of `ops.rotary_scaling`.
      scale: of the scores, (K_n + K_r)^-0.5 by default.
      output_gate: "none", "full" (sigmoid(W_g x) on every channel before W_o) or "head" (one for each head; Ling).
    """

    bidirectional = True
    constant_carry = False
    paper = "DeepSeek-V2 (MLA), arXiv 2405.04434"
    primitive = "attention"
    sequence_parallel = ("causal", "two-sided")
    complexity = "T^2"
    # A piece of 11 tokens is expanded, one of a single token is not.
    tiny = {"q_rank": 8, "kv_rank": 16, "nope_channels": 4, "rotary_channels": 4, "value_channels": 6}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        q_rank: int | None = None,
        kv_rank: int = 128,
        nope_channels: int | None = None,
        rotary_channels: int = 32,
        value_channels: int | None = None,
        positions: str = "rotary",
        rotary_base: float = 10000.0,
        rotary_scaling: str = "none",
        scale: float | None = None,
        output_gate: str = "none",
    ):
        at_least(1, heads=heads, q_rank=q_rank, kv_rank=kv_rank, rotary_channels=rotary_channels)
        at_least(1, nope_channels=nope_channels, value_channels=value_channels)
        positive(rotary_base=rotary_base, scale=scale)
        check_choice("positions", positions, ("rotary", "none", "nope"))
        check_choice("output_gate", output_gate, ("none", "full", "head"))
        check_rotated(rotary_channels, "the rotated part of a head", "rotary_channels")
        if positions != "rotary":
            unused(
                "leave it at its default, or set `positions` to 'rotary'",
                rotary_base=rotary_base != 10000,
                rotary_scaling=rotary_scaling != "none",
            )
        frequencies(rotary_channels, rotary_base, rotary_scaling)  # an error of it belongs here
        size = head_size(width, heads, "width") if None in (nope_channels, value_channels) else 0
        self.causal = causal
        self.rotated = positions == "rotary"
        self.position_aware = positions != "none"
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        self.nope_channels = size if nope_channels is None else nope_channels
        self.value_channels = size if value_channels is None else value_channels
        self.q_rank, self.kv_rank, self.rotary_channels = q_rank, kv_rank, rotary_channels
        key = self.nope_channels + rotary_channels
        self.scale = key**-0.5 if scale is None else scale
        if q_rank is None:
            self.w_dq, self.q_norm = None, None
        else:
            self.w_dq, self.q_norm = dense(rngs, (width, q_rank), ("embed", None)), RMSNorm(q_rank, rngs=rngs)
        self.w_q = dense(rngs, (q_rank or width, heads, key), (None if q_rank else "embed", "heads", None))
        self.w_dkv = dense(rngs, (width, kv_rank), ("embed", None))
        self.w_kr = dense(rngs, (width, rotary_channels), ("embed", None))
        self.kv_norm = RMSNorm(kv_rank, rngs=rngs)
        self.w_uk = dense(rngs, (kv_rank, heads, self.nope_channels), (None, "heads", None))
        self.w_uv = dense(rngs, (kv_rank, heads, self.value_channels), (None, "heads", None))
        self.w_o = residual_output(rngs, (heads, self.value_channels, width), ("heads", None, "embed"), depth)
        gates = {"none": None, "full": (heads, self.value_channels), "head": (heads, 1)}[output_gate]
        self.w_g = None if gates is None else dense(rngs, (width, *gates), ("embed", "heads", None))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q = project(x if self.w_dq is None else self.q_norm(project(x, self.w_dq[...])), self.w_q[...])
        q, q_r = jnp.split(constrain(q, "batch", "length", "heads", None), [self.nope_channels], axis=-1)
        q = jnp.concatenate([q, self.rotate(q_r, positions)], axis=-1)
        k_r = self.rotate(project(x, self.w_kr[...])[:, :, None], positions)
        latent = jnp.concatenate([self.kv_norm(project(x, self.w_dkv[...]))[:, :, None], k_r], axis=-1)
        where = {"scale": self.scale, "causal": self.causal, "segment_ids": segment_ids}
        if state is not None:
            where["query_offset"] = state["length"]
            state = extend(state, {"latent": latent, "segment": segment_ids})
            where["key_segment_ids"] = state["segment"]
            latent = held(state, "latent", latent.dtype)
        if state is not None and self.absorbing_is_cheaper(x.shape[1]):
            y = self.absorbed(q, latent, where)
        else:
            y = self.expanded(q, latent, where)
        if self.w_g is not None:
            y = sigmoid_gate(constrain(project(x, self.w_g[...]), "batch", "length", "heads", None), y)
        return project(y, self.w_o[...], inputs=2), state

    def rotate(self, a, positions):
        """The rotated part of queries or keys [B, T, heads, K_r]."""
        if not self.rotated:
            return a
        theta, magnitude = frequencies(self.rotary_channels, self.rotary_base, self.rotary_scaling)
        return rotary(a, positions, frequencies=theta, magnitude=magnitude, layout="interleaved")

    def absorbing_is_cheaper(self, length: int) -> bool:
        """Whether so many queries cost less against latents, which are longer than keys, than against keys to be expanded."""
        expansion = self.nope_channels + self.value_channels
        return length * (2 * self.kv_rank + self.rotary_channels - expansion) <= self.kv_rank * expansion

    def expanded(
        self, q: Float[Array, "B T H K"], latent: Float[Array, "B S 1 C"], where: dict
    ) -> Float[Array, "B T H V"]:
        """Attention to the keys and values of every head."""
        c, k_r = latent[:, :, 0, : self.kv_rank], latent[..., self.kv_rank :]
        k = constrain(project(c, self.w_uk[...]), "batch", "length", "heads", None)
        v = constrain(project(c, self.w_uv[...]), "batch", "length", "heads", None)
        k_r = jnp.broadcast_to(k_r, (*k.shape[:3], self.rotary_channels))
        return attention(q, jnp.concatenate([k, k_r], axis=-1), v, **where)

    def absorbed(
        self, q: Float[Array, "B T H K"], latent: Float[Array, "B S 1 C"], where: dict
    ) -> Float[Array, "B T H V"]:
        """Attention of all heads to one key and value, the latent; that its rotated part is summed, too, saves a copy."""
        q_c = project_blocks(q[..., : self.nope_channels], self.w_uk[...].transpose(1, 2, 0))
        q = jnp.concatenate([q_c, q[..., self.nope_channels :]], axis=-1)
        y = attention(q, latent, latent, **where)[..., : self.kv_rank]
        return project_blocks(y, self.w_uv[...].transpose(1, 0, 2))

    def initial_state(self, batch: int, capacity: int) -> dict:
        return buffers(batch, capacity, latent=(1, self.kv_rank + self.rotary_channels))
