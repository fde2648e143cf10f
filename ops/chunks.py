"""What the chunked forms of the decayed recurrences share.

A sequence [B, T, H, ...] is cut into N chunks of C tokens, [N, B, H, C, ...]. G is the cumulative sum of the
log-decays from the start of a chunk, its own token included: [N, B, H, C, K], or [N, B, H, C, 1] where the channels of
a head share one decay. Leading axes may be 1 where a decay does not depend on the batch or the head.

Every exponent is a difference G_i - G_j with j <= i inside one chunk, so it is <= 0 and nothing overflows, however
strong the decay. (exp(-G) alone overflows float32 after 64 steps of 1.4 nats.) G is kept in two parts, `Sums`: behind a token
that forgets all, a single float32 would have lost the digits of what follows.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from common.errors import UserError
from ops.dispatch import on_cpu
from ops.products import product


def fit(chunk_size: int, length: int) -> int:
    """The chunk size to use: `chunk_size`, or the next power of two of the length if that is less.

    Raises:
      UserError: if `chunk_size` is not a power of two.
    """
    check_size(chunk_size)
    return min(chunk_size, 1 << (length - 1).bit_length())


def check_size(chunk_size: int) -> None:
    """Raises a UserError if `chunk_size` is not a power of two."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise UserError(f"chunk_size must be a power of two; got {chunk_size}")


def bounded(log_decay: Float[Array, "..."]) -> Float[Array, "..."]:
    """Raises log-decays to a bound at which exp is 0 already, so that sums and differences of them stay finite."""
    return jnp.maximum(log_decay, -_bound(log_decay.dtype))


def _bound(dtype: DTypeLike) -> float:
    return 750.0 if dtype == jnp.float64 else 110.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Cumulative log-decays G = coarse + fine, of which differences have the digits of small ones.

    Attributes:
      coarse: sums of multiples of a power of two so large that no digit of them is lost. Without a gradient.
      fine: sums of what is left, less than that power for each token.
    """

    coarse: Float[Array, "... C K"]
    fine: Float[Array, "... C K"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fine.shape

    def __getitem__(self, index: Any) -> "Sums":
        return Sums(self.coarse[index], self.fine[index])

    def __sub__(self, other: "Sums") -> Float[Array, "... C K"]:
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def exp(self) -> Float[Array, "... C K"]:
        """The decays from the start of the chunk."""
        return jnp.exp(self.coarse + self.fine)

    def apply(self, function: Any) -> "Sums":
        """A function that moves elements (a reshape, a transposition) of both parts."""
        return Sums(function(self.coarse), function(self.fine))


def cumulative(log_decay: Float[Array, "... C K"]) -> Sums:
    """The sums of `bounded` log-decays over the tokens of a chunk, the second axis from the end."""
    size = log_decay.shape[-2]
    digits = jnp.finfo(log_decay.dtype).nmant + 1
    step = 2.0 ** (math.ceil(math.log2(size * _bound(log_decay.dtype))) - digits)
    coarse = jax.lax.stop_gradient(step * jnp.round(log_decay / step))
    return Sums(jnp.cumsum(coarse, -2), jnp.cumsum(log_decay - coarse, -2))


def split(x: Shaped[Array, "B T H ..."], chunk: int) -> Shaped[Array, "N B H C ..."]:
    """Cuts the time axis into chunks; zeros fill the last one."""
    batch, length, heads, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, -1, chunk, heads, *rest)
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def join(x: Shaped[Array, "N B H C ..."], length: int) -> Shaped[Array, "B T H ..."]:
    """Undoes `split`: puts the chunks together and drops what follows `length` tokens."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    batch, count, chunk, *rest = x.shape
    return x.reshape(batch, count * chunk, *rest)[:, :length]


class SegmentMasks(NamedTuple):
    """Who reaches whom when the state restarts inside a chunk.

    Attributes:
      same: [..., C, C] tokens i and j belong to one segment.
      enters: [..., C] the state that enters the chunk reaches token i.
      leaves: [..., C] what token j writes reaches the state that leaves the chunk.
      passes: [...] the state that enters reaches the state that leaves.
    """

    same: Bool[Array, "... C C"]
    enters: Bool[Array, "... C"]
    leaves: Bool[Array, "... C"]
    passes: Bool[Array, "..."]


def segment_masks(start: Bool[Array, "... C"]) -> SegmentMasks:
    """Masks of chunks from `start`, which is true where the state restarts before a token."""
    run = jnp.cumsum(start.astype(jnp.int32), axis=-1)
    last = run[..., -1:]
    return SegmentMasks(run[..., :, None] == run[..., None, :], run == 0, run == last, run[..., -1] == 0)


def boundary_decays(
    G: Sums, masks: SegmentMasks | None = None
) -> tuple[Float[Array, "... C K"], Float[Array, "... C K"], Float[Array, "... K"]]:
    """Decays between a chunk's tokens and its two ends: (end of the chunk before -> i, j -> end, end -> end)."""
    last = G[..., -1:, :]
    enter, leave, through = G.exp(), jnp.exp(last - G), last[..., 0, :].exp()
    if masks is None:
        return enter, leave, through
    return (
        jnp.where(masks.enters[..., None], enter, 0),
        jnp.where(masks.leaves[..., None], leave, 0),
        jnp.where(masks.passes[..., None], through, 0),
    )


def dot(
    spec: str, a: Float[Array, "... _ _"], b: Float[Array, "... _ _"], dtype: DTypeLike | None = None
) -> Float[Array, "... _ _"]:
    """Matrix product over broadcast leading axes.

    On a CPU the leading axes become one: XLA has no fast kernel for products with more (and aborts at rank 8).
    Elsewhere they stay apart, because merging a batch axis with a head axis loses the sharding of both.

    Args:
      spec: which of the last two axes meet, as in "ik,jk->ij" or "ki,kj->ij".
      a, b: the factors.
      dtype: of the factors, as of `products.product`.
    """
    left, right, out = spec.replace("->", ",").split(",")
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    equation = f"...{left},...{right}->...{out}"
    if dtype == jnp.bfloat16 or (on_cpu() and len(lead) > 1):
        a, b = (jnp.broadcast_to(x, lead + x.shape[-2:]) for x in (a, b))
    if not on_cpu() or len(lead) <= 1:
        return product(equation, a, b, dtype)
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    y = product(equation, a, b, dtype)
    return y.reshape(lead + y.shape[-2:])


def matmul(
    x: Float[Array, "... I K"], y: Float[Array, "... K J"], dtype: DTypeLike | None = None
) -> Float[Array, "... I J"]:
    """`dot` of rows and columns."""
    return dot("ik,kj->ij", x, y, dtype)


def transpose(x: Shaped[Array, "... I J"]) -> Shaped[Array, "... J I"]:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def rows_before(x: Float[Array, "... C K"], first: float) -> Float[Array, "... C K"]:
    """Each row is that of the token before; the first is filled with a number."""
    return jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], -2)


def lower(chunk: int, strict: bool = False) -> Bool[Array, "C C"]:
    """True where j <= i, or j < i if strict."""
    return jnp.tril(jnp.ones((chunk, chunk), bool), -1 if strict else 0)


def pair_decays(G: Sums, *, strict: bool = False) -> Float[Array, "... C C"]:
    """exp(G_i - G_j) for j <= i (j < i if strict), else 0, of one decay for each token."""
    keep = lower(G.shape[-2], strict)
    # Masked before exp as well: above the diagonal the difference is positive, and an infinity there would turn the
    # gradient into NaN.
    difference = jnp.where(keep, G - G.apply(transpose), 0)
    return jnp.where(keep, jnp.exp(difference), 0)


def decayed_scores(
    a: Float[Array, "... C K"],
    b: Float[Array, "... C K"],
    G: Sums,
    *,
    strict: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "... C C"]:
    """P_ij = sum_k a_ik b_jk exp(G_ik - G_jk) for j <= i (j < i if strict), else 0.

    With one decay per head this is a product of two matrices. With one per channel the chunk is halved recursively: in
    the lower left block every pair is separated by the middle, so the decay factors into two with exponents <= 0 and
    the block is one matmul; blocks of 4 tokens are summed pair by pair.

    Args:
      a, b: rows i and columns j; C is a power of two.
      G: `cumulative` log-decays; [..., C, 1] for one decay per head.
      strict: leave out the diagonal.
      dtype: of the factors of matmuls, as of `dot`.
    """
    if G.shape[-1] == 1:
        return dot("ik,jk->ij", a, b, dtype) * pair_decays(G, strict=strict)
    lead = () if on_cpu() else a.shape[:-2]  # as in `dot`
    block = lambda x: jnp.broadcast_to(x, a.shape).reshape(*lead, -1, *a.shape[-2:])
    P = _halving(block(a), block(b), G.apply(block), strict, dtype)
    return P.reshape(*a.shape[:-1], a.shape[-2])


def _halving(a, b, G, strict, dtype):
    """`decayed_scores` of blocks [..., n, C, K]. The halves become 2n blocks, so the rank stays the same."""
    *lead, n, size, K = a.shape
    if size <= 4:
        return _pairwise(a, b, G, strict)
    half = size // 2
    halve = lambda x: x.reshape(*lead, 2 * n, half, K)
    diagonal = _halving(halve(a), halve(b), G.apply(halve), strict, dtype).reshape(*lead, n, 2, half, half)
    middle = G[..., half - 1 : half, :]
    rows = a[..., half:, :] * jnp.exp(G[..., half:, :] - middle)
    columns = b[..., :half, :] * jnp.exp(middle - G[..., :half, :])
    corner = dot("ik,jk->ij", rows, columns, dtype)
    upper = jnp.concatenate([diagonal[..., 0, :, :], jnp.zeros_like(corner)], -1)
    return jnp.concatenate([upper, jnp.concatenate([corner, diagonal[..., 1, :, :]], -1)], -2)


def _pairwise(a, b, G, strict):
    """`decayed_scores` of small blocks, a row at a time so that the upper triangle costs nothing."""
    size = a.shape[-2]
    rows = []
    for i in range(size):
        upto = slice(0, i if strict else i + 1)
        decay = jnp.exp(G[..., i : i + 1, :] - G[..., upto, :])
        row = jnp.sum(a[..., i : i + 1, :] * b[..., upto, :] * decay, -1)
        rows.append(jnp.pad(row, ((0, 0),) * (row.ndim - 1) + ((0, size - row.shape[-1]),)))
    return jnp.stack(rows, -2)
