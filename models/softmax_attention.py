"""What the softmax attentions share: queries, keys and values, how positions enter, and the options of the models of 2024-26."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from common.errors import UserError, check_choice
from models.checks import at_least, check_rotated, finite, grouped_heads, positive, unused
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.attention import add_sinks, attention, attention_with_logsumexp
from ops.elementwise import gate
from ops.projection import project
from ops.rotary import alibi_slopes, rotary
from ops.rotary_scaling import frequencies

sigmoid_gate = functools.partial(gate, jax.nn.sigmoid)


class SoftmaxAttention(Mixer):
    """y_i = W_o (sigmoid(W_g x_i) * sum_j p_ij v_j), p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink)),
    s_ij = cap tanh(scale q_i . k_j / cap) + bias_ij; gate, sink, cap and bias are options.

    Args:
      heads: H.
      kv_heads: G, a divisor of H; by default H. 1 is multi-query attention.
      head_channels: K; by default width / H.
      positions: "rotary", "alibi", "none", or "nope": none, and "auto" of the model's `position_embedding` adds none.
      rotary_base: base of the rotary frequencies.
      rotary_fraction: share of each head's channels that are rotated, the first ones.
      rotary_scaling: a rule of `ops.rotary_scaling` for the frequencies, such as "llama3:factor=8,original_length=8192".
      qk_norm: RMS-normalise queries and keys, before the rotation.
      qk_norm_span: what a norm is over: each "head", or "all" heads of a token together (OLMo 2, arXiv 2501.00656).
      qk_norm_eps: added to the mean square.
      qk_norm_offset: 1 stores the norms' weights as their difference from 1.
      qkv_bias: whether the maps to queries, keys and values have biases.
      bias: whether the output map has a bias.
      scale: of the scores, K^-0.5 by default.
      score_cap: cap; 0 for none.
      sinks: whether each head has a sink, a learned score that takes part in the softmax and has no value.
      output_gate: "none", "full" (W_g has a channel for each of the values') or "head" (one for each head).
    """

    bidirectional = True
    primitive = "attention"
    sequence_parallel = ("causal", "two-sided")

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
        at_least(1, heads=heads, head_channels=head_channels)
        positive(rotary_base=rotary_base, qk_norm_eps=qk_norm_eps, scale=scale)
        at_least(0, score_cap=score_cap)
        finite(qk_norm_offset=qk_norm_offset)
        check_choice("positions", positions, ("rotary", "alibi", "none", "nope"))
        check_choice("output_gate", output_gate, ("none", "full", "head"))
        check_choice("qk_norm_span", qk_norm_span, ("head", "all"))
        if not qk_norm:
            unused(
                "it is of the norms of queries and keys: set `qk_norm`, too",
                qk_norm_span=qk_norm_span != "head",
                qk_norm_eps=qk_norm_eps != 1e-6,
                qk_norm_offset=qk_norm_offset != 0,
            )
        if positions != "rotary":
            unused(
                "leave it at its default, or set `positions` to 'rotary'",
                rotary_base=rotary_base != 10000,
                rotary_fraction=rotary_fraction != 1,
                rotary_scaling=rotary_scaling != "none",
            )
        if not 0 <= rotary_fraction <= 1:
            raise UserError(f"`rotary_fraction` must be between 0 and 1, got {rotary_fraction}")
        size, kv_heads = grouped_heads(width, heads, kv_heads, head_channels)
        if positions == "rotary" and rotary_fraction == 1:
            check_rotated(size, key="heads" if head_channels is None else "head_channels")
        self.causal = causal
        self.positions = positions
        if positions == "alibi":  # the ring does not know how far its keys are
            self.sequence_parallel = ()
        self.rotated = 2 * int(size * rotary_fraction / 2) if positions == "rotary" else 0
        self.position_aware = self.rotated > 0 or positions in ("alibi", "nope")
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        frequencies(self.rotated, rotary_base, rotary_scaling)  # an error of it belongs here
        self.kv_heads = kv_heads
        self.head_channels = size
        self.scale = size**-0.5 if scale is None else scale
        self.score_cap = score_cap
        self.sizes = (kv_heads, size)
        self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_k = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_v = dense(rngs, (width, kv_heads, size), ("embed", "kv_heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        self.b_o = param(rngs, zeros, (width,), (None,)) if bias else None
        self.qk_norm_span = qk_norm_span
        spans = {"head": ((size, None),) * 2, "all": ((heads * size, "heads"), (kv_heads * size, "kv_heads"))}
        self.q_norm, self.k_norm = (
            RMSNorm(channels, rngs=rngs, axis=axis, eps=qk_norm_eps, offset=qk_norm_offset) if qk_norm else None
            for channels, axis in spans[qk_norm_span]
        )
        of_heads = lambda count, axis: (
            param(rngs, zeros, (count, size), (axis, None), decay=False) if qkv_bias else None
        )
        self.b_q, self.b_k, self.b_v = (
            of_heads(heads, "heads"),
            of_heads(kv_heads, "kv_heads"),
            of_heads(kv_heads, "kv_heads"),
        )
        self.sinks = param(rngs, zeros, (heads,), ("heads",), keep_float32=True) if sinks else None
        gates = {"none": None, "full": (heads, size), "head": (heads, 1)}[output_gate]
        self.w_g = None if gates is None else dense(rngs, (width, *gates), ("embed", "heads", None))

    def queries_keys_values(
        self, x: Tokens, positions: Ids
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Queries and keys, normalised and rotated as the hyperparameters say, and values."""
        q, k = self.queries_and_keys(x, positions)
        return q, k, constrain(self.projected(x, self.w_v, self.b_v), "batch", "length", "kv_heads", None)

    def queries_and_keys(self, x: Tokens, positions: Ids) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"]]:
        """The first two of `queries_keys_values`."""
        q = constrain(self.projected(x, self.w_q, self.b_q), "batch", "length", "heads", None)
        k = constrain(self.projected(x, self.w_k, self.b_k), "batch", "length", "kv_heads", None)
        if self.q_norm is not None:
            q, k = self.normalized(self.q_norm, q), self.normalized(self.k_norm, k)
        if self.rotated:
            theta, magnitude = self.frequencies()
            q, k = (rotary(a, positions, frequencies=theta, magnitude=magnitude) for a in (q, k))
        return q, k

    def normalized(self, norm, a):
        """The norm of each head, or of all heads together."""
        return norm(a) if self.qk_norm_span == "head" else norm(a.reshape(*a.shape[:2], -1)).reshape(a.shape)

    def projected(self, x, w, b):
        """x w, and the bias where there is one."""
        y = project(x, w[...])
        return y if b is None else y + b[...]

    def frequencies(self) -> tuple[Float[Array, "F"] | np.ndarray, float]:
        """What turns the pairs of channels, and the factor of what is turned."""
        return frequencies(self.rotated, self.rotary_base, self.rotary_scaling)

    def slopes(self) -> Float[Array, "H"] | None:
        """ALiBi's slopes of the query heads, where positions enter by it."""
        return alibi_slopes(self.w_q.shape[1]) if self.positions == "alibi" else None

    def options(self) -> dict:
        """What the scores are, as arguments of `ops.attention`."""
        return {"scale": self.scale, "score_cap": self.score_cap or None, "slopes": self.slopes()}

    def attend(self, q, k, v, **where) -> Float[Array, "B T H K"]:
        """Attention with the options, where the arguments of `ops.attention` say."""
        if self.sinks is None:
            return attention(q, k, v, **self.options(), **where)
        return add_sinks(*attention_with_logsumexp(q, k, v, **self.options(), **where), self.sinks[...])

    def output(self, x: Tokens, y: Float[Array, "B T H K"]) -> Tokens:
        """The gate and the output map."""
        if self.w_g is not None:
            y = sigmoid_gate(constrain(project(x, self.w_g[...]), "batch", "length", "heads", None), y)
        y = project(y, self.w_o[...], inputs=2)
        return y if self.b_o is None else y + self.b_o[...]

    def scores(self, x: Tokens, positions: Int[Array, "B T"]) -> Float[Array, "B H T T"]:
        """How every query scores every key, before masks; a sink is not among the keys."""
        q, k = self.queries_and_keys(x, positions)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        scores = self.scale * jnp.einsum("bthk,bshk->bhts", q, k)
        if self.score_cap:
            scores = self.score_cap * jnp.tanh(scores / self.score_cap)
        if (slopes := self.slopes()) is not None:
            scores = scores - slopes[:, None, None] * jnp.abs(positions[:, :, None] - positions[:, None])[:, None]
        return scores
