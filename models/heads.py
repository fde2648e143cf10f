"""What turns the last layer into a result: pooling, pairs, regression."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.params import dense, param, zeros

POOLINGS = ("mean", "last", "first")
LOSSES = ("squared", "absolute")


def pool(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, how: str) -> Float[Array, "B D"]:
    """One vector for each row: the mean of its tokens, its last or its first one; padding (id 0) left out."""
    valid = jnp.ones(x.shape[:2], jnp.float32) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
    if how == "mean":
        weight = valid / jnp.maximum(jnp.sum(valid, 1, keepdims=True), 1)
    else:
        index = jnp.arange(x.shape[1]) * valid
        where = jnp.argmax(index if how == "last" else valid, 1)
        weight = jax.nn.one_hot(where, x.shape[1])
    return jnp.einsum("bt,btd->bd", weight, x.astype(jnp.float32)).astype(x.dtype)


class PairHead(nnx.Module):
    """logits = W_2 gelu(W_1 [a, b, a - b, a * b] + b_1) + b_2 for two rows a and b (as in the Nystromformer and S4 repositories'
    retrieval task)."""

    def __init__(self, width: int, targets: int, *, rngs: nnx.Rngs):
        self.w_1 = dense(rngs, (4, width, width), (None, "embed", "mlp"), inputs=2)
        self.b_1 = param(rngs, zeros, (width,), ("mlp",))
        self.w_2 = dense(rngs, (width, targets), ("mlp", None))
        self.b_2 = param(rngs, zeros, (targets,), (None,))

    def __call__(self, x: Float[Array, "B 2 D"]) -> Float[Array, "B V"]:
        a, b = x[:, 0], x[:, 1]
        features = jnp.stack([a, b, a - b, a * b], 1)
        hidden = jax.nn.gelu(jnp.einsum("bfd,fdh->bh", features, self.w_1[...]) + self.b_1[...])
        return (hidden @ self.w_2[...] + self.b_2[...]).astype(jnp.float32)


class Regression(nnx.Module):
    """Real numbers and the loss that fits them: "squared" (sum of squares) or "absolute" (sum of absolute values)."""

    def __init__(self, width: int, targets: int, loss: str, *, rngs: nnx.Rngs):
        self.loss = loss
        self.w = dense(rngs, (width, targets), ("embed", None))
        self.b = param(rngs, zeros, (targets,), (None,))

    def __call__(self, x: Float[Array, "... D"], targets: Float[Array, "... K"] | None = None):
        """Predictions [..., K] in float32; given targets, also the loss [...]."""
        predictions = (x @ self.w[...] + self.b[...]).astype(jnp.float32)
        if targets is None:
            return predictions
        error = predictions - targets
        return predictions, jnp.sum(jnp.square(error) if self.loss == "squared" else jnp.abs(error), -1)
