"""RWKV-4's time mixing."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from models.mixer import Ids, Mixer, Tokens
from models.params import constant, param, zeros
from models.partitioning import constrain
from ops.linear_recurrence import linear_recurrence
from ops.projection import project
from ops.running_max import NOTHING, running_max
from ops.token_shift import token_shift


class RWKV4(Mixer):
    """wkv_t = (sum_{s<t} e^{k_s - (t-1-s) w} v_s + e^{k_t + u} v_t) / (the same without v), y = W_o (sigmoid(r) * wkv)
    (arXiv 2305.13048, section 3.1).

    k, v and r are linear maps of mu x_t + (1 - mu) x_{t-1}, with a mu for each; w = exp(log_w) and u belong to a channel, and
    there are no heads. Both sums are one recurrence in units of a running maximum of the exponents. The initial values go by
    layer and channel as in the authors' code; those of W_k, W_r and W_o are zero.

    This is time mixing alone; the paper's channel mixing, which shifts tokens too, is `rwkv_channel_mix`.
    """

    paper = "RWKV-4, arXiv 2305.13048"
    primitive = "linear_recurrence"

    def __init__(self, width: int, *, rngs: nnx.Rngs, layer: int | Int[Array, ""] = 0, layers: int = 1):
        deep, left = layer / max(layers - 1, 1), 1 - layer / layers  # 0 to 1, and 1 to almost 0
        channel = jnp.arange(width)
        place, fraction = channel / width, channel / max(width - 1, 1)
        mu = jnp.stack([place**left, place**left + 0.3 * deep, place ** (0.5 * left)])
        self.mu = param(rngs, constant(mu), (3, width), (None, None), decay=False)
        facts = {"decay": False, "keep_float32": True}
        log_w = -5 + 8 * fraction ** (0.7 + 1.3 * deep)
        self.log_w = param(rngs, constant(log_w), (width,), ("mlp",), **facts)
        u = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
        self.u = param(rngs, constant(u), (width,), ("mlp",), **facts)
        self.w_k = param(rngs, zeros, (width, width), ("embed", "mlp"))
        self.w_v = param(rngs, jax.nn.initializers.orthogonal(), (width, width), ("embed", "mlp"))
        self.w_r = param(rngs, zeros, (width, width), ("embed", "mlp"))
        self.w_o = param(rngs, zeros, (width, width), ("mlp", "embed"))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        initial = {"shift": None, "sums": None, "maximum": None} if state is None else state
        before, last = token_shift(x, initial_state=initial["shift"], segment_ids=segment_ids)
        mixed = (before + mu.astype(x.dtype) * (x - before) for mu in self.mu[...])
        k, v, r = (project(x, w[...]) for x, w in zip(mixed, (self.w_k, self.w_v, self.w_r), strict=True))
        k, v, r = (constrain(a, "batch", "length", "mlp") for a in (k, v, r))
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        numbers = jnp.stack([v, jnp.ones_like(v)], -1)

        scaled = running_max(-jnp.exp(self.log_w[...]), k, initial_state=initial["maximum"], segment_ids=segment_ids)
        sums, final = linear_recurrence(
            jnp.broadcast_to(jnp.exp(scaled.log_decay)[..., None], numbers.shape),
            jnp.exp(scaled.log_weight)[..., None] * numbers,
            initial_state=initial["sums"],
            segment_ids=segment_ids,
            axis="mlp",
        )
        past, _ = token_shift(sums, initial_state=initial["sums"], segment_ids=segment_ids)
        own = k + self.u[...]
        top = jax.lax.stop_gradient(jnp.maximum(scaled.before, own))
        read = jnp.exp(scaled.before - top)[..., None] * past + jnp.exp(own - top)[..., None] * numbers
        wkv = (read[..., 0] / read[..., 1]).astype(x.dtype)
        y = project(jax.nn.sigmoid(r) * wkv, self.w_o[...])
        return y, {"shift": last, "sums": final, "maximum": scaled.final}

    def initial_state(self, batch: int, capacity: int) -> dict:
        width = self.u.shape[-1]
        return {
            "shift": jnp.zeros((batch, width), jnp.float32),
            "sums": jnp.zeros((batch, width, 2), jnp.float32),
            "maximum": jnp.full((batch, width), NOTHING, jnp.float32),
        }
