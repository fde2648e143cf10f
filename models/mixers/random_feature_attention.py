"""Random feature attention, with or without the gate."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size
from models.kernel_attention import kernel_attention
from models.mixer import Context, Ids, MatrixState, Mixer, Tokens
from models.norms import l2_normalize
from models.params import dense, normal, ones, param, residual_output, zeros
from models.partitioning import constrain
from ops.projection import project, project_blocks, project_each


class RandomFeatureAttention(Mixer):
    """y_t = phi(q_t)^T S_t / max(phi(q_t) . z_t, floor), S_t = sum_{s<=t} phi(k_s) v_s^T, z_t = sum_{s<=t} phi(k_s),
    phi(x) = c [sin(W x^), cos(W x^)], x^ = x / |x| (Random Feature Attention, arXiv 2103.02143, section 3.1): an estimate
    of attention with the Gaussian kernel, and as lengths are 1, of softmax attention. Two-sided: the sums run over all s.

    `gate=True` is RFA-Gate (section 3.2): S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T and z_t likewise, with
    g_t = sigmoid(w_g . x_t + b_g) for each head.

    W = sigma * G with G Gaussian [D, K] of each head and sigma [K] learned, from 1. G is not trained: in training a new one is
    drawn at every step (the authors choose from a bank of 500), in evaluation one fixed draw is used. Denominators are
    estimates and may be negative; so their floor is part of the method. As in the authors' code c = 0.1 and the floor is 1. The
    gate, which that code lacks, makes the sums averages: then c = 1 / sqrt(D), with which the kernel lies between exp(-2) and 1,
    and the floor is 0.1.

    Args:
      heads: number of heads.
      features: D; phi has 2D components.
      gate: as above; causal only.
      redraw: draw a new G at every training step; else the fixed one is used in training as well.
    """

    bidirectional = True
    position_aware = False
    uses_context = True
    random = True
    paper = "Random feature attention, arXiv 2103.02143"
    primitive = "linear_attention"
    tiny = {"features": 12}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        heads: int = 4,
        features: int = 64,
        gate: bool = False,
        redraw: bool = True,
    ):
        if gate and not causal:
            raise UserError("`gate` has no two-sided form; set gate=False")
        at_least(1, features=features)
        size = head_size(width, heads, "width")
        self.causal = causal
        self.redraw = redraw
        self.random = redraw
        self.scale, self.floor = (features**-0.5, 0.1) if gate else (0.1, 1.0)
        self.sizes = (heads, 2 * features, size + 1)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        shape, axes = (heads, features, size), ("heads", None, None)
        self.directions = param(rngs, normal(1.0), shape, axes, decay=False, group="fixed", keep_float32=True)
        self.sigma = param(rngs, ones, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.w_g = dense(rngs, (width, heads), ("embed", None)) if gate else None
        self.b_g = param(rngs, zeros, (heads,), (None,), keep_float32=True) if gate else None
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, MatrixState | None, Any]:
        w = jax.lax.stop_gradient(self.directions[...])
        if self.redraw and context.key is not None:
            w = jax.random.normal(context.key, w.shape, w.dtype)
        w = w * self.sigma[...][:, None]
        *qk, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        qk = (project_blocks(l2_normalize(a.astype(jnp.float32)), jnp.swapaxes(w, 1, 2)) for a in qk)
        q, k = (self.scale * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1) for angle in qk)
        log_decay = None
        if self.w_g is not None:
            gate = project(x, self.w_g[...]).astype(jnp.float32) + self.b_g[...]
            log_decay = jax.nn.log_sigmoid(gate)
            k = k * jax.nn.sigmoid(-gate)[..., None]
        y, state = kernel_attention(
            q,
            k,
            v,
            log_decay,
            causal=self.causal,
            floor=self.floor,
            initial_state=state,
            segment_ids=segment_ids,
        )
        return project(y, self.w_o[...], inputs=2), state, context.stream

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)
