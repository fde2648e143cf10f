"""Softmax attention: multi-head, grouped-query or multi-query."""

from jaxtyping import Array, Float

from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Tokens
from models.softmax_attention import SoftmaxAttention


class Attention(SoftmaxAttention):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(K) + bias_ij) v_j (arXiv 1706.03762).

    Query head h reads key-value head floor(h G / H) (grouped queries, arXiv 2305.13245). Positions enter by rotary
    embedding (arXiv 2104.09864), by ALiBi (arXiv 2108.12409), by the causal mask alone ("nope", arXiv 2305.19466), or, with
    "none", by what the model adds to its inputs where its `position_embedding` is "auto".

    The hyperparameters are those of `SoftmaxAttention`, where also the equation with all options stands: biases (Qwen2),
    normalised queries and keys (Qwen3), a cap of the scores (Gemma 2, arXiv 2408.00118), sinks (gpt-oss, arXiv 2508.10925), a
    gate on the output (arXiv 2505.06708; Qwen3-Next), partial rotation, and rules for longer sequences.
    """

    constant_carry = False
    paper = "Attention Is All You Need, arXiv 1706.03762"
    complexity = "T^2"
    tiny = {"kv_heads": 2, "qk_norm": True}

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k, v = self.queries_keys_values(x, positions)
        if state is None:
            y = self.attend(q, k, v, causal=self.causal, segment_ids=segment_ids)
        else:
            offset = state["length"]
            state = extend(state, {"key": k, "value": v, "segment": segment_ids})
            y = self.attend(
                q,
                held(state, "key", q.dtype),
                held(state, "value", v.dtype),
                segment_ids=segment_ids,
                key_segment_ids=state["segment"],
                query_offset=offset,
            )
        return self.output(x, y), state

    def attention_scores(
        self, x: Tokens, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Float[Array, "B H T T"], str]:
        """How every query scores every key, for diagnostics; see `evaluation.diagnostics.measures.score_gradients`."""
        return self.scores(x, positions), "softmax"

    def initial_state(self, batch: int, capacity: int) -> dict:
        return buffers(batch, capacity, key=self.sizes, value=self.sizes)
