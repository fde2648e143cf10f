"""Channel mixers: what acts on each token by itself."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.params import dense
from models.partitioning import constrain


class MLP(nnx.Module):
    """W_2 gelu(W_1 x), with a hidden size of `expansion` * width."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, expansion: float = 4.0, depth: int = 1):
        hidden = int(expansion * width)
        self.w_in = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_out = dense(rngs, (hidden, width), ("mlp", "embed"), gain=(2 * depth) ** -0.5)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h = constrain(jax.nn.gelu(x @ self.w_in[...]), "batch", "length", "mlp")
        return h @ self.w_out[...]


class SwiGLU(nnx.Module):
    """W_3 (silu(W_1 x) * W_2 x) (arXiv 2002.05202), with 2/3 of the MLP's hidden size: the same number of parameters."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, expansion: float = 4.0, depth: int = 1):
        hidden = int(expansion * width * 2 / 3)
        self.w_in = dense(rngs, (width, 2, hidden), ("embed", None, "mlp"))
        self.w_out = dense(rngs, (hidden, width), ("mlp", "embed"), gain=(2 * depth) ** -0.5)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, value = jnp.moveaxis(jnp.einsum("btd,dgf->btgf", x, self.w_in[...]), 2, 0)
        h = constrain(jax.nn.silu(gate) * value, "batch", "length", "mlp")
        return h @ self.w_out[...]


CHANNEL_MIXERS = {"mlp": MLP, "swiglu": SwiGLU}
