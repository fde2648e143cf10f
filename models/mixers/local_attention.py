"""Sliding-window softmax attention."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import at_least
from models.mixer import Ids, Tokens
from models.softmax_attention import SoftmaxAttention
from ops.attention import add_sinks, attention_with_logsumexp, merge


class LocalAttention(SoftmaxAttention):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j over a window (arXiv 2004.05150, section 3.1).

    Causal: j in (i - window, i], that is `window` keys, the token's own included. Two-sided: |i - j| <= window / 2.
    The window is exact (each query sees as many keys as any other), not made of blocks. The first `sink_tokens` of a document
    are seen from everywhere in it (StreamingLLM, arXiv 2309.17453), with the positions that they have in the document, where the
    authors count positions in the cache. The hyperparameters beside these two are those of `SoftmaxAttention`.

    Args:
      window: size of the window.
      sink_tokens: number of tokens that stay visible.
    """

    paper = "Longformer (sliding window), arXiv 2004.05150"
    complexity = "T window"
    tiny = {"window": 5}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_channels: int | None = None,
        window: int = 128,
        sink_tokens: int = 0,
        positions: str = "rotary",
        rotary_base: float = 10000.0,
        rotary_fraction: float = 1.0,
        rotary_scaling: str = "none",
        qk_norm: bool = False,
        qk_norm_span: str = "head",
        qk_norm_eps: float = 1e-6,
        qk_norm_offset: float = 0.0,
        qkv_bias: bool = False,
        bias: bool = False,
        scale: float | None = None,
        score_cap: float = 0.0,
        sinks: bool = False,
        output_gate: str = "none",
    ):
        at_least(1, window=window)
        at_least(0, sink_tokens=sink_tokens)
        if sink_tokens and positions == "alibi":
            raise UserError(
                "`sink_tokens` are seen from any distance, ALiBi hides what is far; change it or `positions`"
            )
        super().__init__(
            width,
            rngs=rngs,
            causal=causal,
            depth=depth,
            heads=heads,
            kv_heads=kv_heads,
            head_channels=head_channels,
            positions=positions,
            rotary_base=rotary_base,
            rotary_fraction=rotary_fraction,
            rotary_scaling=rotary_scaling,
            qk_norm=qk_norm,
            qk_norm_span=qk_norm_span,
            qk_norm_eps=qk_norm_eps,
            qk_norm_offset=qk_norm_offset,
            qkv_bias=qkv_bias,
            bias=bias,
            scale=scale,
            score_cap=score_cap,
            sinks=sinks,
            output_gate=output_gate,
        )
        self.window = window
        self.sink_tokens = sink_tokens
        # The first tokens of documents, which all see, are not passed on; scores of ALiBi are known for near keys.
        self.sequence_parallel = () if sink_tokens else type(self).sequence_parallel

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k, v = self.queries_keys_values(x, positions)
        piece = {"key": k, "value": v, "segment": segment_ids}
        first = {**piece, "position": positions}
        if state is None and segment_ids is None:
            first = {name: None if a is None else a[:, : self.sink_tokens] for name, a in first.items()}
        if state is not None:
            # The keys that the first tokens of this piece still see, then the piece's own.
            old_first = {name: state.get(f"first_{name}") for name in first}
            piece = _joined({name: state[name] for name in piece}, piece)
            state = {name: a[:, a.shape[1] - (self.window - 1) :] for name, a in piece.items()}
            if self.sink_tokens:
                first = _joined(old_first, first)
                state |= {f"first_{name}": a for name, a in self.first_of_last_document(first, segment_ids).items()}
        where = {
            "causal": self.causal,
            "window": self.window,
            "segment_ids": segment_ids,
            "key_segment_ids": piece["segment"],
            "query_offset": piece["key"].shape[1] - q.shape[1],
        }
        if self.sink_tokens:
            y = self.attend_with_first(q, piece, first, positions, where)
        else:
            y = self.attend(q, piece["key"], piece["value"], **where)
        return self.output(x, y), state

    def attend_with_first(self, q, near, first, positions, where):
        """The softmax over the window and, outside of it, the first tokens of the document."""
        reach = self.window if self.causal else self.window // 2 + 1

        def outside(query, key):
            distance = query - key if self.causal else jnp.abs(query - key)
            return (key < self.sink_tokens) & (distance >= reach)

        parts = [
            attention_with_logsumexp(q, near["key"], near["value"], **self.options(), **where),
            attention_with_logsumexp(
                q,
                first["key"],
                first["value"],
                **self.options(),
                causal=False,  # by positions, which say more here than the order of the keys
                mask=outside,
                query_labels=positions,
                key_labels=first["position"],
                segment_ids=where["segment_ids"],
                key_segment_ids=first["segment"],
            ),
        ]
        y, log = merge(parts)
        return y if self.sinks is None else add_sinks(y, log, self.sinks[...])

    def first_of_last_document(self, first, segment_ids):
        """Of the keys at hand, those of the first tokens of the document that the piece ends in, by position."""
        here = (first["segment"] == segment_ids[:, -1:]) & (segment_ids[:, -1:] != 0)
        slots = jnp.arange(self.sink_tokens)[:, None]
        match = here[:, None] & (first["position"][:, None] == slots)  # [B, slots, keys]
        place = jnp.argmax(match, axis=-1)

        def pick(a):
            shape = (...,) + (None,) * (a.ndim - 2)
            return jnp.where(jnp.any(match, -1)[shape], jnp.take_along_axis(a, place[shape], axis=1), 0)

        return {name: pick(a) for name, a in first.items()}

    def frequencies(self):
        if self.rotary_scaling == "none":  # in float32, as they always were here
            return self.rotary_base ** (-jnp.arange(0, self.rotated, 2) / self.rotated), 1.0
        return super().frequencies()

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        distance = jnp.abs(positions[:, :, None] - positions[:, None])
        near = distance < self.window if self.causal else distance <= self.window // 2
        near |= (positions < self.sink_tokens)[:, None]
        return jnp.where(near[:, None], self.scores(x, positions), -jnp.inf), "softmax"

    def initial_state(self, batch: int, capacity: int) -> dict:
        def empty(slots):
            return {
                "key": jnp.zeros((batch, slots, *self.sizes), jnp.float32),
                "value": jnp.zeros((batch, slots, *self.sizes), jnp.float32),
                "segment": jnp.zeros((batch, slots), jnp.int32),
            }

        state = empty(self.window - 1)
        if self.sink_tokens:
            first = empty(self.sink_tokens) | {"position": jnp.zeros((batch, self.sink_tokens), jnp.int32)}
            state |= {f"first_{name}": a for name, a in first.items()}
        return state


def _joined(old, new):
    return {name: jnp.concatenate([old[name].astype(a.dtype), a], 1) for name, a in new.items()}
