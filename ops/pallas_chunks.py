"""What the TPU kernels of `linear_attention` and `delta_rule` share: decays in a chunk, and what a chunk has of each array.

The grid goes over batch, heads and, innermost and in order, chunks of C tokens. Arrays of tokens are [B, T, H, K] outside and
[B, T, H K] for a kernel, so that nothing is transposed; as many heads as fill the lanes of a register share a point of the grid.
In a kernel rows are the tokens of a chunk. G is the sum of the log-decays from the start of a chunk to a token, its own included.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from ops import dispatch

CHUNK = 128  # tokens: as many as a matrix unit has rows
LEAST = 16  # rows of a tile of bfloat16
LANES = 128  # of a register
MOST = 8  # heads of a point of the grid, each of which is compiled by itself
# What has been compiled in float32 with a decay for each channel, where a core's memory is short first.
MEMORY = 32 * 2**20  # bytes of it that a kernel may use; compilers leave it 16 MiB by default
WIDEST = 1152  # channels of the keys and values of all of them
LARGEST = 2 * 192 * 192  # numbers of their states

# Logical axes of tokens [B, T, H, K], of a number for each of them [B, H, N, 1, C], of restarts, of a state, of those of chunks.
TOKENS = ("batch", None, "heads", None)
ROWS = ("batch", "heads", None, None, None)
RUNS = ("batch", None, None, None)
STATE = ("batch", "heads", None, None)
STATES = ("batch", "heads", None, None, None)


def supports(q: Array, v: Array, dtype: jnp.dtype) -> bool:
    """Whether kernels take heads like those of q [B, T, H, K] and v [B, T, H, V], with a state of this type."""
    heads, K, V = q.shape[2], q.shape[-1], v.shape[-1]
    at_once = heads_at_once(heads, K, V)
    fits = at_once <= MOST and at_once * (K + V) <= WIDEST and at_once * K * V <= LARGEST
    # A TPU's compiler refuses products over one channel of bfloat16.
    return dtype == jnp.float32 and K > 1 and V > 0 and fits


def heads_at_once(heads: int, *sizes: int) -> int:
    """How many heads a point of the grid has: the fewest that fill whole registers, or all."""
    fill = lambda n: heads % n == 0 and all(n * size % LANES == 0 for size in sizes)
    return next((n for n in range(1, heads) if fill(n)), heads)


def in_rows(x: Float[Array, "B T H"], chunk: int) -> Float[Array, "B H N 1 C"]:
    """A number for each token, as rows of chunks."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, 1, chunk)


def from_rows(x: Float[Array, "B H N 1 C"]) -> Float[Array, "B T H"]:
    """Undoes `in_rows`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 1, 2)


def restarts(start: Bool[Array, "B T"], chunk: int) -> Int[Array, "B N 1 C"]:
    """How often the state has restarted in a chunk up to each token."""
    return jnp.cumsum(start.reshape(start.shape[0], -1, 1, chunk).astype(jnp.int32), -1)


def decays(g: Float[Array, "B T H #K"], chunk: int) -> tuple[Float[Array, "..."], tuple[str | None, ...]]:
    """Log-decays as kernels take them, and their logical axes: G as rows where channels share a decay, else g as it is."""
    return (jnp.cumsum(in_rows(g[..., 0], chunk), -1), ROWS) if g.shape[-1] == 1 else (g, TOKENS)


class Blocks(NamedTuple):
    """The grid, and what a point of it has of the arrays."""

    grid: tuple[int, int, int]
    heads: int
    tokens: Callable[[int], pl.BlockSpec]  # of [B, T, H K], for a K
    rows: pl.BlockSpec
    runs: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec

    def decays(self, g: Array) -> pl.BlockSpec:
        """Of what `decays` returns, flat."""
        return self.rows if g.ndim == 5 else self.tokens(g.shape[-1] // (self.grid[1] * self.heads))


def blocks(q: Float[Array, "B T H K"], v: Float[Array, "B T H V"], chunk: int, reverse: bool = False) -> Blocks:
    """For heads like those of q and v; the chunks from the last to the first if `reverse`."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    heads, count = heads_at_once(H, K, V), T // chunk
    at = (lambda n: count - 1 - n) if reverse else (lambda n: n)
    return Blocks(
        (B, H // heads, count),
        heads,
        tokens=lambda size: pl.BlockSpec((None, chunk, heads * size), lambda b, h, n: (b, at(n), h)),
        rows=pl.BlockSpec((None, heads, None, 1, chunk), lambda b, h, n: (b, h, at(n), 0, 0)),
        runs=pl.BlockSpec((None, None, 1, chunk), lambda b, h, n: (b, at(n), 0, 0)),
        state=pl.BlockSpec((None, heads, K, V), lambda b, h, n: (b, h, 0, 0)),
        states=pl.BlockSpec((None, heads, None, K, V), lambda b, h, n: (b, h, at(n), 0, 0)),
    )


def call(kernel: Callable, name: str, at: Blocks, state: tuple[int, int], interpret: bool, **options) -> Callable:
    """`pl.pallas_call` of a kernel that has the states [heads, K, V] of its heads in memory from chunk to chunk."""
    kernel = pl.pallas_call(
        kernel,
        grid=at.grid,
        scratch_shapes=[pltpu.VMEM((at.heads, *state), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        interpret=interpret,
        name=name,
        **options,
    )
    return jax.named_scope(name)(kernel)


def flat(x: Float[Array, "B T *_"]) -> Float[Array, "B T *_"]:
    """Arrays of tokens [B, T, H, K] as kernels take them; others as they are."""
    return x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x


# ------------------------------------------------------------------------------------------------------ in a kernel


def dot(a: Array, b: Array, over: tuple[int, int], factors=jnp.float32) -> Float[Array, "I J"]:
    """A product of two matrices over an axis of each, of factors of a type, with sums in float32."""
    precision = dispatch.matmul_precision(factors)
    a, b = a.astype(factors), b.astype(factors)
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision, jnp.float32)


def total(x: Float[Array, "I J"]) -> Float[Array, "I 1"]:
    """The sums of rows."""
    return jnp.sum(x, axis=1, keepdims=True)


def part(head: int, size: int) -> tuple[slice, slice]:
    """Where a block of tokens has the channels of a head."""
    return slice(None), slice(head * size, (head + 1) * size)


def places(size: int) -> tuple[Int[Array, "C C"], Int[Array, "C C"]]:
    """The number of its row and that of its column at each place of a square."""
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def column(row: Array) -> Array:
    """[1, C] as [C, 1]."""
    i, j = places(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, jnp.zeros((), row.dtype)), axis=1, keepdims=True)


def row(column: Array) -> Array:
    """[C, 1] as [1, C]."""
    i, j = places(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, jnp.zeros((), column.dtype)), axis=0, keepdims=True)


def pairs(size: int, block: int) -> Bool[Array, "C C"]:
    """Where the row is in the second and the column in the first half of one of the squares of 2 `block` on the diagonal."""
    i, j = places(size)
    apart = i ^ j
    return (i > j) & (apart >= block) & (apart < 2 * block)


class Decays:
    """The decays of a chunk of one head.

    Args:
      g: G as a row [1, C] where channels share a decay, else the log-decays [C, K].
      runs: [1, C], as of `restarts`.

    Attributes:
      shared: whether channels share a decay.
      enter: [C, 1 or K], from the end of the chunk before to each token.
      leave: [C, 1 or K], from each token to the end of the chunk.
      through: [1 or K, 1], from end to end, as the rows of a state have it.
    """

    def __init__(self, g: Float[Array, "_ _"], runs: Int[Array, "1 C"]):
        i, j = places(runs.shape[1])
        run, last = column(runs), jnp.max(runs, axis=1, keepdims=True)
        self._reached = (i >= j) & (run == runs)
        self.shared = g.shape[0] == 1
        before, after, whole = self._of_head(g) if self.shared else self._of_channels(g)
        number = lambda condition: jnp.where(condition, 1.0, 0.0)
        self.enter = number(run == 0) * jnp.exp(before)
        self.leave = number(run == last) * jnp.exp(after)
        through = number(last == 0) * jnp.exp(whole)
        self.through = through if self.shared else column(through)

    def _of_head(self, G):
        i, j = places(G.shape[1])
        earlier, G_column = self._reached & (i > j), column(G)
        self._pairs = jnp.where(earlier, jnp.exp(jnp.where(earlier, G_column - G, 0.0)), 0.0)
        last = jnp.min(G, axis=1, keepdims=True)
        return G_column, last - G_column, last

    def _of_channels(self, g):
        """The decay between two tokens is a product of what is before the first half and behind the second of the smallest block
        that has both: exponents are sums of log-decays of that block, and none is a difference.

        `before` sums from the start of a block to a token, its own included, `after` from behind a token to the end.
        """
        C = g.shape[0]
        number = lax.broadcasted_iota(jnp.int32, g.shape, 0)
        before, after, self._levels = g, jnp.zeros_like(g), []
        block = 1
        while block < C:
            second = (number & block) != 0
            decay = jnp.exp(jnp.where(second, before, after))
            self._levels.append((pairs(C, block) & self._reached, decay))
            whole = before + after
            before += jnp.where(second, pltpu.roll(whole, block, 0), 0.0)
            after += jnp.where(second, 0.0, pltpu.roll(whole, C - block, 0))
            block *= 2
        return before, after, before[C - 1 :]

    def scores(self, a: Float[Array, "C K"], b: Float[Array, "C K"], factors) -> Float[Array, "C C"]:
        """sum_k a_ik b_jk exp(G_ik - G_jk) for j < i of one segment, else 0, of factors of a type."""
        if self.shared:
            return dot(a, b, (1, 1), factors) * self._pairs
        found = jnp.zeros_like(self._reached, jnp.float32)
        for of_level, decay in self._levels:
            found = jnp.where(of_level, dot(a * decay, b * decay, (1, 1), factors), found)
        return found

    def pull(self, d: Float[Array, "C C"], a, b, factors) -> tuple[Float[Array, "C K"], Float[Array, "C K"]]:
        """The gradients of a and b, from that of `scores`."""
        if self.shared:
            d = d * self._pairs
            return dot(d, b, (1, 0), factors), dot(d, a, (0, 0), factors)
        da, db = jnp.zeros_like(a), jnp.zeros_like(b)
        for of_level, decay in self._levels:
            of_pairs = jnp.where(of_level, d, 0.0)
            da += decay * dot(of_pairs, b * decay, (1, 0), factors)
            db += decay * dot(of_pairs, a * decay, (0, 0), factors)
        return da, db

    def gradient(self, dG, leaving, S, D) -> Float[Array, "_ _"]:
        """The gradient of the log-decays.

        dL/dG is, per channel, what a token reads by its gradient, minus what it writes by its own; that of g is the sum of what
        follows in the segment. The last token's write leaves undecayed, and is left out. See `ops.linear_attention`.

        Args:
          dG: [C, K], without what goes from chunk to chunk.
          leaving: [C, K], what a token writes into the state that leaves, by its gradient.
          S, D: [K, V], the state that enters and the gradient of the one that leaves.

        Returns:
          [1, C] or [C, K], without regard to restarts before the tokens themselves.
        """
        at_end = lax.broadcasted_iota(jnp.int32, leaving.shape, 0) == leaving.shape[0] - 1
        leaving = jnp.where(at_end, 0.0, leaving)
        passing = row(self.through * total(S * D)) + jnp.sum(leaving, axis=0, keepdims=True)
        dG = dG - leaving + jnp.where(at_end, passing, 0.0)
        if self.shared:
            return jnp.sum(jnp.where(self._reached, total(dG), 0.0), axis=0, keepdims=True)
        return dot(jnp.where(self._reached, 1.0, 0.0), dG, (0, 0))


def of_head(head: int, g_ref, runs: Int[Array, "1 C"], size: int) -> Decays:
    """The decays of one of a point's heads, which have `size` channels."""
    return Decays(g_ref[head] if len(g_ref.shape) == 3 else g_ref[part(head, size)], runs)


def set_gradient(ref, head: int, dg: Float[Array, "_ _"]) -> None:
    """Writes the gradient of a head's log-decays where `of_head` read them."""
    ref[head if len(ref.shape) == 3 else part(head, dg.shape[1])] = dg


def take(first_ref, state_ref) -> None:
    """The state from outside, at the first of the chunks in order."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]


def give(state_ref, last_ref) -> None:
    """Gives the state back, at the last of the chunks in order."""

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = state_ref[...]
