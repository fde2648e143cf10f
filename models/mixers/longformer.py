"""Longformer: a sliding window and global tokens."""

import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.attention import attention, attention_with_logsumexp, merge
from ops.projection import project


class Longformer(Mixer):
    """Two-sided attention to a window and to a few global tokens, which themselves attend to all (arXiv 2004.05150, section 3.1).

        y_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j       over |i - j| <= window / 2 or j global,   i not global
        y_i = sum_j softmax_j(q'_i . k'_j / sqrt(K)) v'_j    over all j,                               i global

    with separate projections q', k', v' for the rows of the global tokens. Which tokens are global is the task's choice in
    the paper (the classification token, the question); here they are the first ones of each document. The paper's causal
    models have the window alone, which is `local_attention`. There are no dilated windows. Positions are an embedding at the
    model's input. In packed rows, where the global tokens are anywhere, a mask over blocks of scores picks the pairs.

    Args:
      heads: number of heads.
      window: size of the window, the same in each layer.
      global_tokens: how many tokens at the start of a document are global.
    """

    causal = False
    bidirectional = True
    streaming = False
    position_aware = False
    paper = "Longformer, arXiv 2004.05150"
    primitive = "attention"
    complexity = "T (window + global_tokens)"
    tiny = {"window": 6, "global_tokens": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = False,
        depth: int = 1,
        heads: int = 4,
        window: int = 512,
        global_tokens: int = 1,
    ):
        size = head_size(width, heads, "width")
        at_least(1, window=window)
        if global_tokens < 1:
            raise UserError(f"`global_tokens` must be at least 1, got {global_tokens}; `local_attention` has none")
        self.causal = causal
        self.window = window
        self.global_tokens = global_tokens
        self.w_q, self.w_k, self.w_v, self.w_q_global, self.w_k_global, self.w_v_global = (
            dense(rngs, (width, heads, size), ("embed", "heads", None)) for _ in range(6)
        )
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(self, x: Tokens, state: None, *, segment_ids: Ids | None, positions: Ids) -> tuple[Tokens, None]:
        to_heads = lambda x, w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        q, k, v = (to_heads(x, w) for w in (self.w_q, self.w_k, self.w_v))
        k_global, v_global = to_heads(x, self.w_k_global), to_heads(x, self.w_v_global)
        n = self.global_tokens
        local = {"mask": lambda i, j: j >= n, "window": self.window, "causal": False}
        if segment_ids is None:
            first = attention_with_logsumexp(q, k[:, :n], v[:, :n], causal=False)
            y, _ = merge([first, attention_with_logsumexp(q, k, v, **local)])
            y_global = attention(to_heads(x[:, :n], self.w_q_global), k_global, v_global, causal=False)
            y = jnp.concatenate([y_global, y[:, n:]], axis=1)
        else:
            where = {"query_labels": positions, "segment_ids": segment_ids}
            first = attention_with_logsumexp(q, k, v, causal=False, mask=lambda i, j: j < n, **where)
            y, _ = merge([first, attention_with_logsumexp(q, k, v, **local, **where)])
            q_global = to_heads(x, self.w_q_global)
            y_global = attention(q_global, k_global, v_global, causal=False, mask=lambda i, j: i < n, **where)
            y = jnp.where((positions < n)[:, :, None, None], y_global, y)
        return project(y, self.w_o[...], inputs=2), state
