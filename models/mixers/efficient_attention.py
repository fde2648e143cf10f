"""Efficient attention: softmax over the features of queries and over the positions of keys."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import head_size
from models.kernel_attention import running_scale, segment_scale, two_sided
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops import segments
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_each
from ops.running_max import NOTHING


class EfficientAttention(Mixer):
    """y_t = C_t^T softmax_K(q_t), C_t = sum_s p_s v_s^T, p_s = exp(k_s) / sum_s exp(k_s) for each feature (Efficient Attention,
    arXiv 1812.01243, section 3.2, softmax normalisation).

    The paper's form is two-sided: s runs over the whole sequence, so p is a softmax over positions. Causal: s <= t in both
    sums, that is, each feature's softmax runs with t. Its sums are kept in units of exp(max_{s<=t} k_s), which makes the
    carry (maximum, sum of weights, sum of weighted values) exact whatever the size of k.

    Args:
      heads: number of heads.
    """

    bidirectional = True
    position_aware = False
    paper = "Efficient attention, arXiv 1812.01243"
    primitive = "linear_attention"

    def __init__(self, width: int, *, rngs: nnx.Rngs, causal: bool = True, depth: int = 1, heads: int = 4):
        size = head_size(width, heads, "width")
        self.causal = causal
        self.sizes = (heads, size)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        q, k = jax.nn.softmax(q.astype(jnp.float32), -1), k.astype(jnp.float32)
        v = v.astype(jnp.float32)
        if self.causal:
            y, state = causal(q, k, v, state, segment_ids)
        else:
            y = two_sided(q, softmax_over_positions(k, segment_ids), v, segment_ids)
        return project(y.astype(x.dtype), self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size = self.sizes
        return {
            "maximum": jnp.full((batch, heads, size), NOTHING, jnp.float32),
            "weights": jnp.zeros((batch, heads, size), jnp.float32),
            "values": jnp.zeros((batch, heads, size, size), jnp.float32),
        }


def causal(q, k, v, state, segment_ids):
    """The running softmax. Division by the sum of weights is the query's part: it is the same for all values."""
    state = dict.fromkeys(("maximum", "weights", "values")) if state is None else state
    maximum, log_decay = running_scale(k, state["maximum"], segment_ids)
    weight = jnp.exp(segments.zero_padding(k - maximum, segment_ids))
    total, weights = linear_recurrence(
        jnp.exp(log_decay), weight, initial_state=state["weights"], segment_ids=segment_ids, axis="heads"
    )
    if segment_ids is not None:
        total = jnp.where((segment_ids == 0)[..., None, None], 1, total)
    y, values = linear_attention(
        q / total, weight, v, log_decay, initial_state=state["values"], segment_ids=segment_ids
    )
    return y, {"maximum": maximum[:, -1], "weights": weights, "values": values}


def softmax_over_positions(k, segment_ids):
    """exp(k_t) over its sum in t's segment."""
    weight = jnp.exp(segments.zero_padding(k - segment_scale(k, segment_ids), segment_ids))
    if segment_ids is None:
        return weight / jnp.sum(weight, 1, keepdims=True)
    ones = jnp.ones(k.shape[2:], k.dtype)
    past, _ = linear_recurrence(ones, weight, segment_ids=segment_ids, axis="heads")
    future, _ = linear_recurrence(ones, segments.reverse(weight, segment_ids), segment_ids=segment_ids, axis="heads")
    total = past + segments.reverse(future, segment_ids) - weight
    return weight / jnp.where((segment_ids == 0)[..., None, None], 1, total)
