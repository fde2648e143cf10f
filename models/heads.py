"""What turns the last layer into a result: pooling, pairs, regression."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from common.errors import UserError
from models.params import dense, param, zeros
from models.real_nvp import RealNVP
from ops.elementwise import gelu
from ops.projection import project

POOLINGS = ("mean", "last", "first")
LOSSES = ("squared", "absolute", "laplace", "rle", "rle_authors")
SMALLEST_SCALE = 1e-3
# Points along each axis of the grid that a two-dimensional integral is taken on: within 1 % for flows that training makes.
GRID = 32


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
    """logits = W_2 gelu(W_1 [a, b, a - b, a * b] + b_1) + b_2 for two rows a and b.

    The features are those of LRA's retrieval task in the Nystromformer and S4 repositories. The activation is a GELU; S4's
    `RetrievalHead` has a ReLU by default.
    """

    def __init__(self, width: int, targets: int, *, rngs: nnx.Rngs):
        self.w_1 = dense(rngs, (4, width, width), (None, "embed", "mlp"), inputs=2)
        self.b_1 = param(rngs, zeros, (width,), ("mlp",))
        self.w_2 = dense(rngs, (width, targets), ("mlp", None))
        self.b_2 = param(rngs, zeros, (targets,), (None,))

    def __call__(self, x: Float[Array, "B 2 D"]) -> Float[Array, "B V"]:
        a, b = x[:, 0], x[:, 1]
        features = jnp.stack([a, b, a - b, a * b], 1)
        hidden = gelu(project(features, self.w_1[...], inputs=2) + self.b_1[...])
        return (project(hidden, self.w_2[...]) + self.b_2[...]).astype(jnp.float32)


class Regression(nnx.Module):
    """Real numbers y = W x + b and the loss that fits them to targets. With e = targets - y, summed over the K targets:

    squared   e^2
    absolute  |e|
    laplace   |e| / sigma + log(2 sigma), the negative log-likelihood of a Laplace distribution of predicted scale
    rle       -log P(e / sigma) + log sigma, residual log-likelihood estimation (arXiv 2107.11291): the targets are K / 2
              points of a plane, and the residual r = e / sigma of a point has the density P(r) = Q(r) G(r) / Z. Q is the
              Laplace density above with scale 1; G is that of a `RealNVP`, which is learned with the rest, shared by all
              points and not used for predictions; Z = integral of Q G.

    sigma = softplus(W_s x + b_s) + 1e-3 for each target: losses with a scale want targets of the order of 1. W_s starts at a
    hundredth of the usual size, as in the authors' code, so that all start near sigma = 0.69.

    "rle" is the likelihood of the paper's equations, with its constant s = 1 / Z, and not the loss of the authors' code
    (Jeff-sjtu/res-loglikelihood-regression, rlepose/models/{regression_nf,criterion}.py), which
    - has no Z: it adds the negative log-likelihoods of two models of the residual, Q and G, each with its log sigma;
    - counts log G twice, as log sigma [B, K/2, 2] - log G [B, K/2, 1] broadcasts. Where G fits the residuals, the two log
      sigma then cancel against the two log G, and nothing but the sigmoid's bound of 1 keeps sigma from growing;
    - has a Q whose integral is 2 / sqrt(pi) instead of 1 (log sigma + log sqrt(2 pi) + |e| / (sqrt(2) sigma)): constants;
    - has sigma = sigmoid(.), which presumes targets in image units, and divides W x by |x|: the last norm's task here.
    A likelihood can be compared with "laplace", does not degenerate, and integrates to 1. Without Z, but with one log
    sigma, it would do neither. "rle_authors" is that loss, with all but the division by |x|: for targets of image units,
    and to compare with numbers of that code. For an error of (.1, -.2) and sigma .1 it is 3.69 where "rle" is 1.32, with
    the same flow.

    Raises:
      UserError: for an unknown loss, and an odd number of targets with "rle".
    """

    def __init__(self, width: int, targets: int, loss: str, *, rngs: nnx.Rngs):
        if loss not in LOSSES:
            raise UserError(f"loss={loss!r} must be one of {', '.join(LOSSES)}")
        if loss in ("rle", "rle_authors") and targets % 2:
            raise UserError(
                f"loss={loss!r} fits points of a plane, and {targets} targets are no pairs; use loss='laplace'"
            )
        self.loss = loss
        self.w = dense(rngs, (width, targets), ("embed", None))
        self.b = param(rngs, zeros, (targets,), (None,))
        if loss in ("laplace", "rle", "rle_authors"):
            self.w_scale = dense(rngs, (width, targets), ("embed", None), gain=0.01)
            self.b_scale = param(rngs, zeros, (targets,), (None,))
        if loss in ("rle", "rle_authors"):
            self.flow = RealNVP(rngs=rngs)

    def __call__(
        self, x: Float[Array, "... D"], targets: Float[Array, "... K"] | None = None
    ) -> Float[Array, "... K"] | tuple[Float[Array, "... K"], Float[Array, "..."]]:
        """Returns the predictions in float32; given targets, also the loss."""
        predictions = (project(x, self.w[...]) + self.b[...]).astype(jnp.float32)
        if targets is None:
            return predictions
        error = targets - predictions
        if self.loss == "squared":
            return predictions, jnp.sum(jnp.square(error), -1)
        if self.loss == "absolute":
            return predictions, jnp.sum(jnp.abs(error), -1)
        raw_scale = (project(x, self.w_scale[...]) + self.b_scale[...]).astype(jnp.float32)
        if self.loss == "rle_authors":
            return predictions, authors_loss(self.flow, error, jax.nn.sigmoid(raw_scale))
        scale = jax.nn.softplus(raw_scale) + SMALLEST_SCALE
        residual = error / scale
        loss = jnp.sum(jnp.abs(residual) + jnp.log(2 * scale), -1)
        if self.loss == "rle":
            log_g = self.flow.log_prob(residual.reshape(*residual.shape[:-1], -1, 2))
            loss = loss + jnp.sum(log_overlap(self.flow) - log_g, -1)
        return predictions, loss


def authors_loss(flow: RealNVP, error: Float[Array, "... K"], sigma: Float[Array, "... K"]) -> Float[Array, "..."]:
    """The loss of the authors' code, summed over the targets: of each, log sigma - log G(r) with the density of its point, and
    log(sqrt(2 pi) sigma) + |e| / (sqrt(2) sigma)."""
    residual = -error / sigma  # theirs is prediction less target
    log_g = flow.log_prob(residual.reshape(*residual.shape[:-1], -1, 2))
    log_q = -jnp.log(math.sqrt(2 * math.pi) * sigma) - jnp.abs(error) / (math.sqrt(2) * sigma + 1e-9)
    return jnp.sum(jnp.log(sigma) - log_q, -1) - 2 * jnp.sum(log_g, -1)


def log_overlap(flow: RealNVP) -> Float[Array, ""]:
    """log of the integral of G Q, where G is the flow's density and Q(r) = exp(-|r_1| - |r_2|) / 4.

    The mean of Q over a grid of equally probable points of G. The points follow G, wherever training moves it: on a grid
    that does not, an unlucky G between its points would seem to have no overlap, and so an unbounded likelihood.
    """
    z = jax.scipy.special.ndtri((jnp.arange(GRID) + 0.5) / GRID)
    r = flow.from_noise(jnp.stack(jnp.meshgrid(z, z), -1).reshape(-1, 2))
    return jax.nn.logsumexp(-jnp.sum(jnp.abs(r), -1)) - math.log(4 * len(r))
