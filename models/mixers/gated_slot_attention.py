"""Gated slot attention."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, head_size, positive
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import dense, residual_output
from models.partitioning import constrain
from ops import chunks, kept, segments
from ops.elementwise import silu
from ops.linear_attention import linear_attention
from ops.products import factor_dtype
from ops.projection import project, project_each

CHUNK = 16  # of tokens that are compared pair by pair, for each slot


class GatedSlotAttention(Mixer):
    """K~_t = Diag(f_t) K~_{t-1} + (1 - f_t) k_t^T, V~_t = Diag(f_t) V~_{t-1} + (1 - f_t) v_t^T,
    o_t = V~_t^T softmax(K~_t q_t), y = W_o norm(silu(o)) (arXiv 2409.07146, section 3).

    Softmax attention over M slots, each of which holds a running average of keys and one of values. q, k, v = silu(W x), and
    f = sigmoid(W_f x)^(1/tau) forgets, for each slot. The scores are not scaled, and the norm is over the whole width, as in
    flash-linear-attention's layer.

    The second pass, V~ read by the softmax, is linear attention whose key channels are the slots. In the first pass the slots
    decay but are what is read, not what is asked for; see `slot_scores`.

    Args:
      heads: number of heads.
      slots: M.
      gate_temperature: tau.
      eps: of the norm.
    """

    paper = "Gated Slot Attention, arXiv 2409.07146"
    primitive = "linear_attention"
    sequence_parallel = ()  # its slots are scanned chunk by chunk
    complexity = "T slots"
    tiny = {"slots": 6}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        slots: int = 64,
        gate_temperature: float = 8.0,
        eps: float = 1e-5,
    ):
        at_least(1, slots=slots)
        at_least(0, eps=eps)
        positive(gate_temperature=gate_temperature)
        size = head_size(width, heads, "width")
        self.sizes = (heads, slots, size)
        self.gate_temperature = gate_temperature
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_f = dense(rngs, (width, heads, slots), ("embed", "heads", None))
        self.norm = RMSNorm(width, rngs=rngs, axis="heads", eps=eps)
        self.w_o = residual_output(rngs, (width, width), ("heads", "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        initial = dict.fromkeys(("keys", "values")) if state is None else state
        q, k, v = (silu(constrain(a, "batch", "length", "heads", None)) for a in project_each(x, self.w_qkv[...]))
        log_f = jax.nn.log_sigmoid(project(x, self.w_f[...]).astype(jnp.float32)) / self.gate_temperature
        write = -jnp.expm1(log_f)
        scores, keys = slot_scores(q, k, write, log_f, initial["keys"], segment_ids)
        o, values = linear_attention(
            jax.nn.softmax(scores, -1), write, v, log_f, initial_state=initial["values"], segment_ids=segment_ids
        )
        o = self.norm(silu(o).reshape(x.shape))
        return project(o, self.w_o[...]), {"keys": keys, "values": values}

    def initial_state(self, batch: int, capacity: int) -> dict:
        memory = jnp.zeros((batch, *self.sizes), jnp.float32)
        return {"keys": memory, "values": memory}


def slot_scores(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    write: Float[Array, "B T H M"],
    log_f: Float[Array, "B T H M"],
    state: Float[Array, "B H M K"] | None,
    segment_ids: Ids | None,
) -> tuple[Float[Array, "B T H M"], Float[Array, "B H M K"]]:
    """K~_t q_t for K~_t = Diag(exp(log_f_t)) K~_{t-1} + write_t k_t^T that begins at `state`, and the last K~; in float32.

    Tokens of a chunk meet pair by pair, with the decay of each slot between them; all exponents are <= 0. What enters a chunk is
    kept for the backward pass, the rest is computed again.
    """
    length, factors = q.shape[1], factor_dtype(q, k)
    chunk = chunks.fit(CHUNK, length)
    q, k = (segments.zero_padding(a, segment_ids).astype(jnp.float32) for a in (q, k))
    log_f = segments.zero_padding(chunks.bounded(log_f), segment_ids)
    if state is None:
        state = jnp.zeros((q.shape[0], *write.shape[2:], k.shape[-1]), jnp.float32)
    start = None if segment_ids is None else segments.is_start(segment_ids)[:, :, None]
    xs = jax.tree.map(lambda a: chunks.split(a, chunk), (q, k, write, log_f, start))
    state, scores = kept.scan(functools.partial(_chunk, factors), state, xs)
    return chunks.join(scores, length), state


def _chunk(factors, state, x):
    """A chunk [B, H, C, ...] from the state that enters it."""
    q, k, write, log_f, start = x
    G = chunks.cumulative(log_f)
    masks = None if start is None else chunks.segment_masks(start)
    enter, leave, through = chunks.boundary_decays(G, masks)
    before = chunks.lower(q.shape[-2])
    seen = before if masks is None else before & masks.same
    pairs = jnp.where(seen, chunks.matmul(q, chunks.transpose(k), factors), 0)
    decay = jnp.exp(jnp.where(before[..., None], G[..., :, None, :] - G[..., None, :, :], 0))
    inside = jnp.sum(pairs[..., None] * decay * write[..., None, :, :], -2)
    scores = enter * chunks.matmul(q, chunks.transpose(state), factors) + inside
    state = through[..., None] * state + chunks.matmul(chunks.transpose(leave * write), k, factors)
    return state, scores
