"""TTT-Linear: a linear model trained at test time."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, check_rotated, head_size, positive
from models.mixer import Ids, Mixer, Tokens
from models.norms import LayerNorm
from models.params import conv_taps, dense, normal, ones, param, residual_output, zeros
from models.partitioning import constrain
from ops.elementwise import gate
from ops.projection import project
from ops.rotary import rotary
from ops.short_convolution import short_convolution
from ops.ttt_linear import ttt_linear


class TTTLinear(Mixer):
    """W_i = W_0 - sum_{j<=i} eta_ij grad l(W_0; k_j, v_j), l(W; k, v) = |f(k; W) - v|^2 / 2, o_i = f(q_i; W_i),
    f(x; W) = x + LN(x W + b), y = W_o (gelu(W_g x) * LN'(o)) (arXiv 2407.04620, sections 2.3 to 2.7).

    The state is a linear model (W and b in each head) that takes one gradient step for each mini-batch; i and j are places in
    the same mini-batch, and W_0 is where the one before ended. eta_ij = base_rate max(1/i + offset_i, 0) sigmoid(w_lr . x_j) / K.
    q = conv(W_qk x) and k = conv'(W_qk x) share a projection and are rotated by the place in the mini-batch; v = W_v x.
    The first W, b and the LN of each head are learned. W and w_lr start as N(0, 0.02^2).

    Departures from the authors' code: no biases in the convolutions and in the step size.

    Args:
      heads: number of heads.
      mini_batch: tokens that share a starting point W_0.
      base_rate: the largest step size.
      conv_size: taps of the short convolutions.
      rope_base: base of the rotary embedding.
    """

    paper = "TTT-Linear, arXiv 2407.04620"
    primitive = "ttt_linear"
    sequence_parallel = ()  # a nonlinear recurrence goes batch by batch
    tiny = {"mini_batch": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        depth: int = 1,
        heads: int = 4,
        mini_batch: int = 16,
        base_rate: float = 1.0,
        conv_size: int = 4,
        rope_base: float = 10000.0,
    ):
        at_least(1, mini_batch=mini_batch)
        at_least(0, base_rate=base_rate)
        positive(rope_base=rope_base)
        size = head_size(width, heads, "width")
        check_rotated(size)
        self.mini_batch = mini_batch
        self.base_rate = base_rate
        self.conv_size = conv_size
        self.rope_base = rope_base
        self.w_qk = dense(rngs, (width, width), ("embed", "heads"))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_g = dense(rngs, (width, width), ("embed", "heads"))
        self.conv_q = conv_taps(rngs, conv_size, width, "heads")
        self.conv_k = conv_taps(rngs, conv_size, width, "heads")
        std = 0.02 * (base_width / width) ** 0.5  # the authors', at the width that a wider model is scaled from
        self.w_lr = param(rngs, normal(std), (width, heads), ("embed", None))
        self.offset = param(rngs, zeros, (mini_batch,), (None,), decay=False, keep_float32=True)
        self.memory = param(rngs, normal(0.02), (heads, size, size), ("heads", None, None))
        self.memory_bias = param(rngs, zeros, (heads, size), ("heads", None), decay=False)
        self.head_norm = param(rngs, ones, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.head_norm_bias = param(rngs, zeros, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.norm = LayerNorm(width, rngs=rngs)
        self.w_o = residual_output(rngs, (width, width), ("heads", "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        heads, size = self.memory.shape[:2]
        new = {}
        shared = constrain(project(x, self.w_qk[...]), "batch", "length", "heads")

        def view(name, taps):
            initial = None if state is None else state[name]
            u, new[name] = short_convolution(shared, taps[...], initial_state=initial, segment_ids=segment_ids)
            u = u.reshape(*u.shape[:2], heads, size)
            return rotary(u, positions % self.mini_batch, base=self.rope_base, layout="interleaved")

        rate = jax.nn.sigmoid(project(x, self.w_lr[...]).astype(jnp.float32))
        place = jnp.maximum(1 / jnp.arange(1.0, self.mini_batch + 1) + self.offset[...], 0)
        o, (new["start"], new["gradient"]) = ttt_linear(
            view("conv_q", self.conv_q),
            view("conv_k", self.conv_k),
            project(x, self.w_v[...]),
            self.base_rate / size * rate,
            place,
            self.first(),
            self.head_norm[...],
            self.head_norm_bias[...],
            positions=None if state is None else positions,
            initial_state=None if state is None else (state["start"], state["gradient"]),
            segment_ids=segment_ids,
        )
        o = self.norm(o.reshape(x.shape))
        return project(gate(jax.nn.gelu, project(x, self.w_g[...]), o), self.w_o[...]), new

    def first(self):
        """W and b before the first token, as one matrix."""
        return jnp.concatenate([self.memory[...], self.memory_bias[...][:, None]], 1).astype(jnp.float32)

    def initial_state(self, batch: int, capacity: int) -> dict:
        start = self.first()
        start = jnp.broadcast_to(start, (batch, *start.shape))
        taps = jnp.zeros((batch, self.conv_size - 1, self.w_qk.shape[1]), jnp.float32)
        return {"conv_q": taps, "conv_k": taps, "start": start, "gradient": jnp.zeros_like(start)}
