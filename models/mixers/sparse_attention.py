"""Sparse Transformer: softmax attention to a factorised pattern."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError, check_choice
from models.checks import at_least, head_size
from models.kv_cache import buffers, extend, held
from models.mixer import Context, Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.attention import attention, attention_with_logsumexp, merge
from ops.projection import project


class SparseAttention(Mixer):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j over a sparse set of keys (arXiv 1904.10509, section 4.3).

    With stride l, summary c and positions counted in each document, the two factors of the pattern are, for j <= i,

        strided   A1 = {j : i - j < l}                       A2 = {j : (i - j) mod l = 0}
        fixed     A1 = {j : floor(j / l) = floor(i / l)}     A2 = {j : j mod l >= l - c}

    The paper's text has i - j <= l in the strided A1; its code, as here, has l keys. Factors are combined as in section 5.1:
    "merged", one softmax over the union; "alternate", A1 in the layers 0, 2, ... and A2 in the others; or "heads", A1 in
    the first half of the heads and A2 in the others. A query that sees no key (A2 of "fixed", before the first
    summary) gives 0.

    Whole sequences are folded so that only what is seen is computed. Packed rows and pieces of a stream mask the scores
    of all pairs instead. As in the paper, positions are an embedding at the model's input.

    With the fixed pattern all heads read the same summary columns; OpenAI's code gives heads different ones of a block.

    Args:
      heads: number of heads.
      pattern: "strided" or "fixed".
      combine: "merged", "alternate" or "heads".
      stride: l, best near the square root of the length.
      summary: c, at the end of each block of l, for the fixed pattern.
    """

    constant_carry = False
    position_aware = False
    uses_context = True
    paper = "Sparse Transformer, arXiv 1904.10509"
    primitive = "attention"
    sequence_parallel = ()  # keys are gathered along the length
    complexity = "T (stride + T summary / stride)"
    tiny = {"stride": 4, "summary": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        pattern: str = "fixed",
        combine: str = "merged",
        stride: int = 128,
        summary: int = 32,
    ):
        size = head_size(width, heads, "width")
        check_choice("pattern", pattern, ("strided", "fixed"))
        check_choice("combine", combine, ("merged", "alternate", "heads"))
        at_least(1, stride=stride)
        if combine == "heads" and heads % 2:
            raise UserError(f"`combine`='heads' needs an even number of heads, got heads={heads}")
        if pattern == "fixed" and not 1 <= summary <= stride:
            raise UserError(f"1 <= `summary` <= `stride` must hold, got summary={summary} and stride={stride}")
        self.pattern = pattern
        self.combine = combine
        self.stride = stride
        self.summary = summary
        self.sizes = (heads, size)
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        q, k, v = (
            constrain(project(x, w[...]), "batch", "length", "heads", None) for w in (self.w_q, self.w_k, self.w_v)
        )
        if state is None and segment_ids is None:
            attend = self.folded
        else:
            where = {"segment_ids": segment_ids, "query_labels": positions}
            if state is not None:
                where["query_offset"] = state["length"]
                state = extend(state, {"key": k, "value": v, "position": positions, "segment": segment_ids})
                k, v = held(state, "key", k.dtype), held(state, "value", v.dtype)
                where |= {"key_labels": state["position"], "key_segment_ids": state["segment"]}
            attend = lambda factors, q, k, v: attention(q, k, v, mask=functools.partial(self.seen, factors), **where)
        if self.combine == "merged":
            y = attend((1, 2), q, k, v)
        elif self.combine == "heads":
            halves = zip(*(jnp.split(a, 2, axis=2) for a in (q, k, v)), strict=True)
            y = jnp.concatenate([attend((factor,), *half) for factor, half in enumerate(halves, 1)], axis=2)
        else:
            factors = (functools.partial(attend, (1,)), functools.partial(attend, (2,)))
            y = jax.lax.cond(context.layer % 2 == 0, *factors, q, k, v)
        return project(y, self.w_o[...], inputs=2), state, context.stream

    def seen(self, factors, i, j):
        """Whether position i sees j <= i in one of the factors of the pattern."""
        if self.pattern == "strided":
            sets = {1: i - j < self.stride, 2: (i - j) % self.stride == 0}
        else:
            sets = {1: i // self.stride == j // self.stride, 2: j % self.stride >= self.stride - self.summary}
        return functools.reduce(jnp.logical_or, (sets[factor] for factor in factors))

    def folded(self, factors, q, k, v):
        """The same of whole sequences, at the cost of the pairs that are seen."""
        first, second = (self.window, self.columns) if self.pattern == "strided" else (self.blocks, self.summaries)
        if len(factors) == 2:
            return merge([first(q, k, v), second(q, k, v, fresh=True)])[0]
        return (first if factors == (1,) else functools.partial(second, fresh=False))(q, k, v)[0]

    # The factors give (y, logsumexp). With `fresh` the second one leaves out the keys that are in the first as well.

    def window(self, q, k, v):
        """The first factor of "strided": each query sees the `stride` keys up to its own."""
        return attention_with_logsumexp(q, k, v, window=self.stride)

    def columns(self, q, k, v, fresh):
        """Positions that are equal modulo the stride are the sequences of a batch; `fresh` leaves out the query's own."""
        B, T = q.shape[:2]
        split = lambda a: cut(a, self.stride).swapaxes(1, 2).reshape(B * self.stride, -1, *a.shape[2:])
        join = lambda a: a.reshape(B, self.stride, -1, *a.shape[2:]).swapaxes(1, 2).reshape(B, -1, *a.shape[2:])[:, :T]
        y, log = attention_with_logsumexp(split(q), split(k), split(v), query_offset=-1 if fresh else 0)
        return join(y), join(log)

    def blocks(self, q, k, v):
        """The first factor of "fixed": blocks are the sequences of a batch."""
        B, T = q.shape[:2]
        split = lambda a: cut(a, self.stride).reshape(-1, self.stride, *a.shape[2:])
        join = lambda a: a.reshape(B, -1, *a.shape[2:])[:, :T]
        y, log = attention_with_logsumexp(split(q), split(k), split(v))
        return join(y), join(log)

    def summaries(self, q, k, v, fresh):
        """The second factor of "fixed": the last keys of each block; `fresh` leaves out the query's own block."""
        B, T = q.shape[:2]
        pick = lambda a: cut(a, self.stride)[:, :, self.stride - self.summary :].reshape(B, -1, *a.shape[2:])
        i = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        j = pick(jnp.pad(i, ((0, 0), (0, -T % self.stride)), constant_values=T))
        if fresh:
            mask = lambda i, j: j // self.stride < i // self.stride
        else:
            mask = lambda i, j: j <= i
        return attention_with_logsumexp(q, pick(k), pick(v), causal=False, mask=mask, query_labels=i, key_labels=j)

    def initial_state(self, batch: int, capacity: int) -> dict:
        state = buffers(batch, capacity, key=self.sizes, value=self.sizes)
        return state | {"position": jnp.zeros((batch, capacity), jnp.int32)}


def cut(a, size):
    """[B, T, ...] to blocks [B, N, size, ...], padded with zeros at the end."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(a.shape[0], -1, size, *a.shape[2:])
