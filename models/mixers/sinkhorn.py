"""Sparse Sinkhorn attention: local attention to keys whose blocks are sorted by a learned, soft permutation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from common.errors import UserError
from models.checks import at_least, head_size, positive
from models.kv_cache import buffers, extend, held
from models.mixer import Context, Ids, Mixer, Tokens
from models.params import dense, normal, param, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.dispatch import matmul_precision
from ops.projection import project, project_blocks, project_each


class Sinkhorn(Mixer):
    """y = Attn(q, k_i, v_i) + Attn(q, k'_i, v'_i) in every block i, k'_i = sum_j P_ij k_j and v'_i = sum_j P_ij v_j
    (arXiv 2002.11296, section 3). Attn is softmax(q k^T / sqrt(K)) v inside the block; there are two of them, added.

        P = Sinkhorn((W s_i + gumbel noise) / temperature)     s_i: summary of block i, one P for each head

    Two-sided, s_i is the mean of the block's keys, and Sinkhorn normalises rows, then columns, `iterations` times, which
    makes P doubly stochastic. Causal, s_i is the mean of all keys up to the first one of block i, only j < i take
    part, and a softmax over them is all: the sum of a column over later blocks would tell earlier ones of them. (The
    paper masks the sums but sums over all rows; the port of the Long Range Arena also has a softmax by default.)

    The paper sums where means are taken here, which would let the logits of the causal form grow with the length. The
    noise is drawn in training only. W has a column for each block, which ties it to a greatest length. Of documents that
    are shorter than a block, the sorted block has as many keys as the document.

    Args:
      heads: number of heads.
      block: tokens of a block.
      iterations: of the normalisation, two-sided; 0 for a softmax over the rows.
      temperature: divides the logits of P.
      gumbel: whether there is noise in training.
    """

    bidirectional = True
    packing = False
    constant_carry = False
    fixed_length = True
    position_aware = False
    uses_context = True
    random = True
    paper = "Sparse Sinkhorn Attention, arXiv 2002.11296"
    primitive = "attention"
    sequence_parallel = ()  # blocks of keys are sorted along the length
    complexity = "T block + T^2 / block"
    tiny = {"block": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        length: int = 512,
        heads: int = 4,
        block: int = 64,
        iterations: int = 5,
        temperature: float = 0.75,
        gumbel: bool = True,
    ):
        size = head_size(width, heads, "width")
        at_least(1, block=block)
        at_least(0, iterations=iterations)
        positive(temperature=temperature)
        self.causal = causal
        self.length = length
        self.block = block
        self.iterations = iterations
        self.temperature = temperature
        self.gumbel = gumbel
        self.random = gumbel
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_sort = param(rngs, normal(size**-0.5), (heads, size, -(-length // block)), ("heads", None, None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        T, block = x.shape[1], self.block
        if T > self.length:
            raise UserError(f"sinkhorn was built for length {self.length}, got {T}; build the model for a greater one")
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        if segment_ids is None:
            count = jnp.full((x.shape[0], 1), T, jnp.int32)
            q, k, v, real = (to_blocks(a, block) for a in (q, k, v, jnp.arange(T) < count))
            P = self.sort(k, real, context.key)
            return self.out(attend(q, k, v, P, real, real, count, self.causal)[:, :T]), state, context.stream

        key_segments = segment_ids
        if state is not None:
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            k, v, key_segments = held(state, "key", k.dtype), held(state, "value", v.dtype), state["segment"]
        # The document's blocks start at its first token, whatever padding is before it.
        start, count = extent(key_segments)
        slots = jnp.arange(min(k.shape[1], self.w_sort.shape[2] * block))
        k, v = (jnp.where((slots < count)[..., None, None], take(a, slots + start), 0) for a in (k, v))
        k, v, real = (to_blocks(a, block) for a in (k, v, slots < count))
        P = self.sort(k, real, context.key)
        # The piece touches so many blocks, from `row` on, and begins at the slot `offset` of the first.
        rows = k.shape[1] if state is None else (T + block - 2) // block + 1
        first, length = extent(segment_ids)
        row, offset = jnp.divmod(take(positions, first), block)
        slots = jnp.arange(rows * block)
        seen = (slots >= offset) & (slots < offset + length)
        q, seen = (to_blocks(a, block) for a in (take(q, slots - offset + first), seen))
        touched = row + jnp.arange(rows)
        P = jnp.swapaxes(take(jnp.swapaxes(P, 1, 2), touched), 1, 2)
        y = attend(q, k, v, P, seen, real, count, self.causal, touched)
        y = take(y, jnp.arange(T) - first + offset)
        return self.out(jnp.where((positions < self.length)[..., None, None], y, jnp.nan)), state, context.stream

    def out(self, y):
        return project(y, self.w_o[...], inputs=2)

    def initial_state(self, batch: int, capacity: int) -> dict:
        shape = self.w_qkv.shape[2:]
        return buffers(batch, capacity, key=shape, value=shape)

    def sort(self, k, real, key):
        """P [B, H, blocks, blocks] from the keys [B, blocks, block, H, K]."""
        k = k.astype(jnp.float32)
        if self.causal:
            total = jnp.cumsum(jnp.sum(k, 2), 1)
            before = jnp.pad(total[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
            summary = (before + k[:, :, 0]) / (self.block * jnp.arange(k.shape[1]) + 1)[:, None, None]
        else:
            summary = jnp.sum(k, 2) / jnp.maximum(jnp.sum(real, 2), 1)[..., None, None]
        blocks = k.shape[1]
        w = self.w_sort[..., :blocks].astype(jnp.float32)
        logits = jnp.swapaxes(project_blocks(summary, w), 1, 2)
        if self.gumbel and key is not None:
            logits += jax.random.gumbel(key, logits.shape)
        logits /= self.temperature
        exists = real[:, :, 0]
        allowed = (exists[:, :, None] & exists[:, None, :])[:, None]
        if self.causal:
            return normalize(logits, allowed & jnp.tri(blocks, k=-1, dtype=bool), 0)
        return normalize(logits, allowed, self.iterations)


def normalize(
    logits: Float[Array, "... N N"], allowed: Bool[Array, "... N N"], iterations: int
) -> Float[Array, "... N N"]:
    """exp(logits) where allowed, else 0, after `iterations` times a normalisation of the rows, then of the columns; for
    0 iterations after one of the rows alone. In log space; rows and columns in which nothing is allowed stay 0."""
    mask = lambda a: jnp.where(allowed, a, -1e30)
    divide = lambda a, axis: mask(a - jax.nn.logsumexp(a, axis, keepdims=True))
    if iterations == 0:
        logits = divide(mask(logits), -1)
    else:
        step = lambda a, _: (divide(divide(a, -1), -2), None)
        logits, _ = jax.lax.scan(step, mask(logits), length=iterations)
    return jnp.where(allowed, jnp.exp(logits), 0)


def attend(q, k, v, P, seen, real, count, causal, rows=None):
    """The two attentions. q and `seen`, the real queries, are the blocks `rows` [B, rows] (None: all) of those of k, v and
    `real`; a document has `count` [B, 1] tokens. Returns [B, rows * block, H, K]."""
    precision = matmul_precision(v.dtype)
    move = lambda a: jnp.einsum("bhij,bjthk->bithk", P.astype(a.dtype), a, precision=precision)
    sources = jnp.broadcast_to((jnp.arange(k.shape[2]) < count)[:, None], q.shape[:3])
    y = inside(q, move(k), move(v), seen, sources, causal=False)
    if rows is not None:
        k, v, real = (take(a, rows) for a in (k, v, real))
    y += inside(q, k, v, seen, real, causal=causal)
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def inside(q, k, v, seen, real, causal):
    """Attention inside blocks [B, blocks, block, H, K]; `seen` and `real` tell the real queries and keys."""
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    ids = {"segment_ids": flat(seen).astype(jnp.int32), "key_segment_ids": flat(real).astype(jnp.int32)}
    return attention(flat(q), flat(k), flat(v), causal=causal, **ids).reshape(q.shape)


def to_blocks(x, size):
    """[B, T, ...] as [B, blocks, size, ...], with zeros behind the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def extent(segment_ids):
    """Where the document of each row begins, and how many tokens it has, [B, 1] each."""
    real = segment_ids != 0
    return jnp.argmax(real, 1)[:, None], jnp.sum(real, 1, keepdims=True, dtype=jnp.int32)


def take(x, index):
    """x[b, index[b]] along the second axis; an index beyond the ends takes the last entry there."""
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), 1)
