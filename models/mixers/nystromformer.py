"""Nystromformer: softmax attention from landmarks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least, head_size
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, normal, param, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.dispatch import matmul_precision
from ops.products import factor_dtype, product
from ops.projection import project, project_each
from ops.short_convolution import short_convolution


class Nystromformer(Mixer):
    """y = softmax(q K'^T) A^+ softmax(Q' k^T) v + conv(v), A = softmax(Q' K'^T) (arXiv 2102.03902, section 3).

    Q' and K' are m landmarks, the means of m runs of consecutive queries and keys; q and k are scaled by K^(-1/4) before.
    The Moore-Penrose inverse is six steps of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from
    Z = A^T / (|A|_1 |A|_inf). The convolution runs along the sequence, its taps shared by the channels of a head.

    Departures. The authors divide by the largest |A|_1 of the whole batch, so that outputs depend on the other rows;
    here every matrix has its own. Run s holds the positions p with floor(p m / n) = s, n being the document's length,
    which are the paper's runs where m divides n and of nearly equal lengths elsewhere. A document of less than m tokens
    has as many landmarks as tokens.

    Args:
      heads: number of heads.
      landmarks: m.
      kernel: taps of the convolution, an odd number.
      iterations: steps of the inverse.
    """

    causal = False
    bidirectional = True
    streaming = False
    packing = False
    position_aware = False
    paper = "Nystromformer, arXiv 2102.03902"
    primitive = "attention"
    sequence_parallel = ()  # landmarks are means along the whole length
    complexity = "T landmarks"
    tiny = {"landmarks": 4, "kernel": 5}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        landmarks: int = 64,
        kernel: int = 33,
        iterations: int = 6,
    ):
        size = head_size(width, heads, "width")
        at_least(1, landmarks=landmarks)
        at_least(0, iterations=iterations)
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"`kernel` must be an odd number of taps, got {kernel}")
        self.landmarks = landmarks
        self.iterations = iterations
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.conv = param(rngs, normal(kernel**-0.5), (kernel, heads), (None, "heads"), decay=False)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(self, x: Tokens, state: None, *, segment_ids: Ids | None, positions: Ids) -> tuple[Tokens, None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        q, k = (a * a.shape[-1] ** -0.25 for a in (q, k))
        mean = lambda weights, a: product("btm,bthk->bmhk", weights, a, factor_dtype(a)).astype(a.dtype)
        average, exists = runs(segment_ids, positions, min(self.landmarks, x.shape[1]))
        queries, keys = (mean(average, a) for a in (q, k))
        tokens, marks = (None, None) if segment_ids is None else (jnp.sign(segment_ids), exists.astype(jnp.int32))

        summary = attention(queries, k, v, scale=1.0, causal=False, segment_ids=marks, key_segment_ids=tokens)
        scores = product("bmhk,bnhk->bhmn", queries, keys, factor_dtype(queries, keys))
        A = jax.nn.softmax(jnp.where(exists[:, None, None], scores, -1e30), -1)
        A = jnp.where(exists[:, None, None] & exists[:, None, :, None], A, 0)
        inverse = pseudo_inverse(A, self.iterations)
        summary = product("bhmn,bnhv->bmhv", inverse, summary).astype(v.dtype)
        y = attention(q, keys, summary, scale=1.0, causal=False, segment_ids=tokens, key_segment_ids=marks)
        return project(y + self.convolve(v), self.w_o[...], inputs=2), state

    def convolve(self, v):
        """The two-sided convolution, as a causal one that is read later. Padding is zero in v."""
        taps = jnp.repeat(self.conv[...], v.shape[-1], axis=1)
        after = len(taps) // 2
        y, _ = short_convolution(jnp.pad(v.reshape(*v.shape[:2], -1), ((0, 0), (0, after), (0, 0))), taps)
        return y[:, after:].reshape(v.shape)


def runs(segment_ids, positions, count):
    """The runs of consecutive tokens that landmarks stand for: weights of the means [B, T, count], and which there are."""
    if segment_ids is None:
        length = jnp.full((positions.shape[0], 1), positions.shape[1], jnp.int32)
        real = jnp.ones(positions.shape, bool)
    else:
        real = segment_ids != 0
        length = jnp.maximum(jnp.sum(real, 1, keepdims=True, dtype=jnp.int32), 1)
    present = jnp.minimum(length, count)
    run = positions * present // length
    member = (run[..., None] == jnp.arange(count)) & real[..., None]
    size = jnp.sum(member, 1, keepdims=True)
    return member / jnp.maximum(size, 1), size[:, 0] > 0


def pseudo_inverse(A: Float[Array, "... M M"], iterations: int) -> Float[Array, "... M M"]:
    """A^+ of matrices of non-negative numbers whose rows sum to 1 (or 0), by an iteration of third order."""
    dot = lambda a, b: jnp.matmul(a, b, precision=matmul_precision(A.dtype))
    identity = jnp.eye(A.shape[-1], dtype=A.dtype)
    columns = jnp.max(jnp.sum(A, -2), -1)[..., None, None]

    def step(Z, _):
        AZ = dot(A, Z)
        return dot(0.25 * Z, 13 * identity - dot(AZ, 15 * identity - dot(AZ, 7 * identity - AZ))), None

    start = jnp.swapaxes(A, -1, -2) / jnp.maximum(columns, 1e-6)  # columns are 0 only if all is padding
    return jax.lax.scan(step, start, length=iterations)[0]
