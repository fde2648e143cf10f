"""RWKV-7's time mixing."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from models.checks import at_least, head_size
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import l2_normalize, layer_normalize
from models.params import constant, param, zeros
from models.partitioning import constrain
from ops.delta_rule import delta_rule
from ops.projection import project
from ops.token_shift import token_shift


class NoValue(nnx.Module):
    """The values before the first layer: none yet."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: Tokens, *, segment_ids: Ids | None, positions: Ids):
        return jnp.zeros_like(x)


class RWKV7(Mixer):
    """S_t = (Diag(w_t) - (a_t * n_t) n_t^T) S_{t-1} + k'_t v_t^T, o_t = S_t^T r_t,
    y = W_o (g * (norm(o) + (r . (r_k * k')) v)) (Goose, arXiv 2503.14456, section 4).

    n is k * k_k with each head of unit length and k' = k (1 + (a - 1) k_a); what is removed is what the state held before it
    decayed. All inputs are maps of x + mu (x_{t-1} - x), with a mu for each: r, k, v linear; and, of low rank,
    w = exp(-e^(-1/2) sigmoid(w_0 + tanh(. W_1) W_2)), the in-context learning rate a = sigmoid(a_0 + . A_1 A_2) and the gate
    g = sigmoid(. G_1) G_2. From the second layer on, v moves towards the first layer's values by the share
    sigmoid(v_0 + . V_1 V_2). The norm is a LayerNorm for each head. The initial values go by layer and channel as in the
    authors' training script: W_r, W_k and W_v orthogonal with gains 1, 0.1 and 1, the norm's weight ((1 + l) / L)^0.7; W_o and
    the first factors start at zero.

    This is time mixing alone; the paper's channel mixing, which shifts tokens too, is `rwkv_channel_mix` without its gate.

    Args:
      heads: number of heads; by default one for every 64 channels.
      decay_rank, rate_rank, value_rank, gate_rank: ranks of W, A, V and G; by default 2.5, 2.5, 1.7 and 5 times
        sqrt(width), rounded to a multiple of 32.
      eps: of the norm.
    """

    paper = "RWKV-7 (Goose), arXiv 2503.14456"
    primitive = "delta_rule"
    uses_context = True
    Shared: ClassVar[type[nnx.Module]] = NoValue
    tiny = {"heads": 2, "decay_rank": 4, "rate_rank": 4, "value_rank": 4, "gate_rank": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        layer: int | Int[Array, ""] = 0,
        layers: int = 1,
        heads: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        eps: float = 64e-5,
    ):
        at_least(1, heads=heads, decay_rank=decay_rank, rate_rank=rate_rank, value_rank=value_rank, gate_rank=gate_rank)
        at_least(0, eps=eps)
        heads = max(1, width // 64) if heads is None else heads
        size = head_size(width, heads, "width")
        self.heads = heads
        shape, axes = (heads, size), ("heads", None)
        self.eps = eps
        deep, left = layer / max(layers - 1, 1), 1 - layer / layers  # 0 to 1, and 1 to almost 0
        channel = jnp.arange(width)
        place, fraction = channel / width, channel / max(width - 1, 1)
        linear = (fraction - 0.5).reshape(shape)
        across = (2 * jnp.arange(size) - (size - 1)) / max(size - 1, 1)  # -1 to 1 over a head
        zigzag = jnp.broadcast_to(across * jnp.abs(across), shape)
        facts = {"decay": False, "keep_float32": True}
        vector = lambda value: param(rngs, constant(value), shape, axes, **facts)

        powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])  # of r, w, k, v, a, g
        mu = 1 - place ** (powers[:, None] * left)
        self.mu = param(rngs, constant(mu), (6, width), (None, None), decay=False)
        for name, gain in (("w_r", 1.0), ("w_k", 0.1), ("w_v", 1.0)):
            setattr(self, name, param(rngs, orthogonal(gain), (width, heads, size), ("embed", *axes)))

        def low_rank(rank, factor):
            """The rank, and the two maps; for None the usual one."""
            usual, base = (max(32, 32 * round(factor * math.sqrt(w) / 32)) for w in (width, base_width))
            # Rows of length 0.1. Where the width has grown, what comes out is as large as in the base.
            grown = width / base_width * (base / usual if rank is None else 1.0)
            rank = usual if rank is None else rank
            first = param(rngs, zeros, (width, rank), ("embed", None))
            return rank, first, param(rngs, orthogonal(0.1 * grown**0.5), (rank, heads, size), (None, *axes))

        self.decay_rank, self.decay_in, self.decay_out = low_rank(decay_rank, 2.5)
        self.rate_rank, self.rate_in, self.rate_out = low_rank(rate_rank, 2.5)
        self.value_rank, self.value_in, self.value_out = low_rank(value_rank, 1.7)
        self.gate_rank, self.gate_in, self.gate_out = low_rank(gate_rank, 5.0)
        self.w_0 = vector((-6 + 6 * fraction ** (1 + deep**0.3)).reshape(shape) + 0.5 + 2.5 * zigzag)
        self.a_0 = vector(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.v_0 = vector(0.73 - 0.4 * linear)
        self.k_k = vector(0.71 - 0.1 * linear)
        self.k_a = vector(1.02)
        self.r_k = vector(-0.04)
        self.norm_weight = vector(((1 + layer) / layers) ** 0.7)
        self.norm_bias = param(rngs, zeros, shape, axes, **facts)
        self.w_o = param(rngs, zeros, (*shape, width), (*axes, "embed"))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        initial = {"shift": None, "memory": None} if state is None else state
        before, last = token_shift(x, initial_state=initial["shift"], segment_ids=segment_ids)
        mixed = x + (before - x) * self.mu[...][:, None, None]
        x_r, x_w, x_k, x_v, x_a, x_g = constrain(mixed, None, "batch", "length", None)
        to_heads = lambda x, w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        r, k, v = to_heads(x_r, self.w_r), to_heads(x_k, self.w_k), to_heads(x_v, self.w_v)
        w = self.w_0[...] + to_heads(jnp.tanh(project(x_w, self.decay_in[...])), self.decay_out).astype(jnp.float32)
        a = jax.nn.sigmoid(self.a_0[...] + to_heads(project(x_a, self.rate_in[...]), self.rate_out).astype(jnp.float32))
        g = to_heads(jax.nn.sigmoid(project(x_g, self.gate_in[...])), self.gate_out)

        share = jax.nn.sigmoid(
            self.v_0[...] + to_heads(project(x_v, self.value_in[...]), self.value_out).astype(jnp.float32)
        )
        first = context.stream.reshape(v.shape)
        later = (v + (first - v) * share).astype(v.dtype)
        v, stream = jnp.where(context.layer == 0, v, later), jnp.where(context.layer == 0, v, first)

        n = l2_normalize(k.astype(jnp.float32) * self.k_k[...], 1e-12)
        k = (k * (1 + (a - 1) * self.k_a[...])).astype(x.dtype)
        o, memory = delta_rule(
            r,
            k,
            v,
            log_decay=-math.exp(-0.5) * jax.nn.sigmoid(w),
            a=a * n,
            b=-n,
            initial_state=initial["memory"],
            segment_ids=segment_ids,
        )
        own = jnp.sum(r.astype(jnp.float32) * k * self.r_k[...], -1, keepdims=True) * v
        y = g * (self.norm(o) + own).astype(x.dtype)
        y = project(y, self.w_o[...], inputs=2)
        return y, {"shift": last, "memory": memory}, stream.reshape(x.shape)

    def norm(self, o):
        """LayerNorm of each head, in float32."""
        return layer_normalize(o.astype(jnp.float32), self.eps) * self.norm_weight[...] + self.norm_bias[...]

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size = self.r_k.shape
        return {
            "shift": jnp.zeros((batch, heads * size), jnp.float32),
            "memory": jnp.zeros((batch, heads, size, size), jnp.float32),
        }


def orthogonal(gain):
    """An orthogonal matrix, its columns split into heads, times gain sqrt(max(1, rows / columns))."""

    def draw(key, shape, dtype):
        rows, columns = shape[0], math.prod(shape[1:])
        init = jax.nn.initializers.orthogonal(gain * math.sqrt(max(1, rows / columns)))
        return init(key, (rows, columns), dtype).reshape(shape)

    return draw
