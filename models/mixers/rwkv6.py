"""RWKV-6's time mixing."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from models.checks import at_least, head_size
from models.mixer import Ids, Mixer, Tokens
from models.norms import layer_normalize
from models.params import constant, param, uniform, zeros
from models.partitioning import constrain
from ops.elementwise import silu_gate
from ops.linear_attention import linear_attention
from ops.projection import project
from ops.token_shift import token_shift


class RWKV6(Mixer):
    """S_t = Diag(w_t) S_{t-1} + k_t v_t^T, o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t, y = W_o (silu(g) * norm(o))
    (Finch, arXiv 2404.05892, section 4).

    k, v, r, g and the decay w_t = exp(-exp(w_0 + tanh(x^w A) B)) are maps of data-dependent mixtures of x_t and x_{t-1}:
    with d = x_{t-1} - x_t, x^c = x + d (mu_c + tanh((x + d mu_x) M_c) N_c) for c in w, k, v, r, g. The norm is a LayerNorm for
    each head. The initial values go by layer and channel as in the authors' code; W_o starts at zero.

    This is time mixing alone; the paper's channel mixing, which shifts tokens too, is `rwkv_channel_mix`.

    Args:
      heads: number of heads; by default one for every 64 channels.
      mix_rank: rank of each M_c N_c.
      decay_rank: rank of A B.
      eps: of the norm.
    """

    paper = "RWKV-6 (Finch), arXiv 2404.05892"
    primitive = "linear_attention"
    tiny = {"heads": 2, "mix_rank": 4, "decay_rank": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        layer: int | Int[Array, ""] = 0,
        layers: int = 1,
        heads: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        eps: float = 64e-5,
    ):
        at_least(1, heads=heads, mix_rank=mix_rank, decay_rank=decay_rank)
        at_least(0, eps=eps)
        heads = max(1, width // 64) if heads is None else heads
        size = head_size(width, heads, "width")
        self.heads = heads
        shape, axes = (width, heads, size), ("embed", "heads", None)
        self.eps = eps
        deep, left = layer / max(layers - 1, 1), 1 - layer / layers  # 0 to 1, and 1 to almost 0
        channel = jnp.arange(width)
        place, fraction = channel / width, channel / max(width - 1, 1)
        self.mu_x = param(rngs, constant(1 - place**left), (width,), (None,), decay=False)
        mu = jnp.stack([place**left, place**left, place**left + 0.3 * deep, place ** (left / 2), place ** (left / 2)])
        self.mu = param(rngs, constant(1 - mu), (5, width), (None, None), decay=False)
        self.mix_in = param(rngs, zeros, (width, 5, mix_rank), ("embed", None, None))
        self.mix_out = param(rngs, uniform(-0.01, 0.01), (5, mix_rank, width), (None, None, None))
        facts = {"decay": False, "keep_float32": True}
        w_0 = (-6 + 5 * fraction ** (0.7 + 1.3 * deep)).reshape(heads, size)
        self.w_0 = param(rngs, constant(w_0), (heads, size), ("heads", None), **facts)
        self.decay_in = param(rngs, zeros, (width, decay_rank), ("embed", None))
        self.decay_out = param(rngs, uniform(-0.01, 0.01), (decay_rank, heads, size), (None, "heads", None))
        u = (deep * (1 - fraction) + 0.1 * ((channel + 1) % 3 - 1)).reshape(heads, size)
        self.u = param(rngs, constant(u), (heads, size), ("heads", None), **facts)
        orthogonal = jax.nn.initializers.orthogonal
        self.w_k = param(rngs, flat(orthogonal(0.1)), shape, axes)
        self.w_v = param(rngs, flat(orthogonal(1.0)), shape, axes)
        self.w_r = param(rngs, flat(orthogonal(1.0)), shape, axes)
        self.w_g = param(rngs, flat(orthogonal(0.1)), shape, axes)
        norm = constant(((1 + layer) / layers) ** 0.7)
        self.norm_weight = param(rngs, norm, (heads, size), ("heads", None), **facts)
        self.norm_bias = param(rngs, zeros, (heads, size), ("heads", None), **facts)
        self.w_o = param(rngs, zeros, (heads, size, width), ("heads", None, "embed"))

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        initial = {"shift": None, "memory": None} if state is None else state
        before, last = token_shift(x, initial_state=initial["shift"], segment_ids=segment_ids)
        d = before - x
        low = jnp.tanh(project(x + d * self.mu_x[...], self.mix_in[...]))
        x_w, x_k, x_v, x_r, x_g = (
            x + d * (mu + project(low[:, :, i], w))
            for i, (mu, w) in enumerate(zip(self.mu[...], self.mix_out[...], strict=True))
        )

        to_heads = lambda x, w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        k, v, r, g = to_heads(x_k, self.w_k), to_heads(x_v, self.w_v), to_heads(x_r, self.w_r), to_heads(x_g, self.w_g)
        decay = project(jnp.tanh(project(x_w, self.decay_in[...])), self.decay_out[...])
        o, memory = linear_attention(
            r,
            k,
            v,
            -jnp.exp(self.w_0[...] + decay.astype(jnp.float32)),
            bonus=self.u[...],
            initial_state=initial["memory"],
            segment_ids=segment_ids,
        )
        y = silu_gate(g, self.norm(o))
        return project(y, self.w_o[...], inputs=2), {"shift": last, "memory": memory}

    def norm(self, o):
        """LayerNorm of each head."""
        y = layer_normalize(o.astype(jnp.float32), self.eps)
        return (y * self.norm_weight[...] + self.norm_bias[...]).astype(o.dtype)

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size = self.u.shape
        return {
            "shift": jnp.zeros((batch, heads * size), jnp.float32),
            "memory": jnp.zeros((batch, heads, size, size), jnp.float32),
        }


def flat(init):
    """An initialiser of matrices, for a matrix whose columns are split into heads."""
    return lambda key, shape, dtype: init(key, (shape[0], shape[1] * shape[2]), dtype).reshape(shape)
