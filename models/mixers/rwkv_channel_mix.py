"""RWKV's channel mixing."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.checks import scaled
from models.mixer import Ids, Mixer, Tokens
from models.params import constant, dense, param, residual_output
from models.partitioning import constrain
from ops.projection import project
from ops.token_shift import token_shift


class RWKVChannelMix(Mixer):
    """y = sigmoid(W_r r) * W_v relu(W_k k)^2 with k = mu_k x_t + (1 - mu_k) x_{t-1} and r likewise
    (RWKV-4, arXiv 2305.13048, equations 14 and 15); without the gate it is that of RWKV-7 (arXiv 2503.14456, section 4).

    It stands where other models have an MLP, but looks one token back, and so it is a mixer here: RWKV's layers are the
    pattern ("rwkv4", "rwkv_channel_mix"), two blocks each. By itself it sees no further than the layers are deep.
    mu starts by layer l of L and channel i as in the authors' code: (i / D)^(1 - l/L) with the gate and
    (i / D)^((1 - l/L)^4) without. There W_r and W_v are zero at first; here they are not, so that the gate may be left out.

    Args:
      expansion: hidden size over the width.
      gate: whether there is W_r.
    """

    replaces_channel_mixer = True
    paper = "RWKV-4 (channel mixing), arXiv 2305.13048"
    primitive = "token_shift"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        layer: int | Int[Array, ""] = 0,
        layers: int = 1,
        expansion: float = 4.0,
        gate: bool = True,
    ):
        hidden = scaled(width, expansion=expansion)
        left = 1 - layer / layers
        mu = (jnp.arange(width) / width) ** (left if gate else left**4)
        self.mu = param(rngs, constant(mu), (2 if gate else 1, width), (None, None), decay=False)
        self.w_k = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_v = residual_output(rngs, (hidden, width), ("mlp", "embed"), depth)
        self.w_r = dense(rngs, (width, width), ("embed", None)) if gate else None

    def mix(
        self, x: Tokens, state: Float[Array, "B D"] | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, Float[Array, "B D"] | None]:
        before, last = token_shift(x, initial_state=state, segment_ids=segment_ids)
        k, *r = (before + mu.astype(x.dtype) * (x - before) for mu in self.mu[...])
        k = constrain(project(k, self.w_k[...]), "batch", "length", "mlp")
        y = project(jnp.square(jax.nn.relu(k)), self.w_v[...])
        return (y if self.w_r is None else jax.nn.sigmoid(project(r[0], self.w_r[...])) * y), last

    def initial_state(self, batch: int, capacity: int) -> Float[Array, "B D"]:
        return jnp.zeros((batch, self.mu.shape[-1]), jnp.float32)
