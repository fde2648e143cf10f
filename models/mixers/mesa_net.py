"""MesaNet, test-time regression to the optimum."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, head_size, positive
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import constant, dense, inverse_softplus, param, residual_output, time_scale, zeros
from models.partitioning import constrain
from models.short_convolution import ConvolvedProjection, convolve
from ops.elementwise import silu_gate
from ops.kept import keep
from ops.linear_attention import linear_attention
from ops.projection import project


class MesaNet(Mixer):
    """H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T, G_t = exp(g_t) G_{t-1} + beta_t k_t v_t^T,
    o_t = G_t^T (H_t + Diag(lambda))^-1 q_t, y = W_o norm(o) (arXiv 2506.05233, section 3).

    The output is what the ridge regression of the values on their keys, weighted by age, predicts at q; the delta rule takes one
    step of descent towards it. q, k = l2norm(silu(conv(W x))), v = W x, g = log sigmoid(W x + b), beta = sigmoid(W x + b), and
    lambda = bound + softplus(l) is learned for each head and channel of the key.

    The systems of all tokens are solved together by conjugate gradients: their products with H are one linear attention, and no H
    is formed but the carry's. The gradient is that of the solution, by a second solve, and not of the iterations. Both solves
    are in float32 and start at 0 (the authors' decoding starts at q / (diag H + lambda)). As many steps are taken when tokens
    come one by one as when they come together.

    Args:
      heads: number of heads.
      conv_size: taps of the short convolutions.
      lower_bound: the least lambda, which is 1 at initialisation.
      steps: of conjugate gradients; as many as a key has channels solve exactly, up to rounding.
      gate: y = W_o (silu(W_g x) * norm(o)).
      eps: of the norm.
    """

    paper = "MesaNet, arXiv 2506.05233"
    primitive = "linear_attention"
    complexity = "T steps"
    tiny = {"steps": 12}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        conv_size: int = 4,
        lower_bound: float = 0.25,
        steps: int = 30,
        gate: bool = False,
        eps: float = 1e-5,
    ):
        at_least(1, steps=steps)
        at_least(0, eps=eps)
        positive(lower_bound=lower_bound)
        size = head_size(width, heads, "width")
        self.sizes = (heads, size, size)
        self.steps = steps
        self.lower_bound = lower_bound
        self.gate = gate
        self.q, self.k = (ConvolvedProjection(width, heads, size, conv_size, rngs=rngs) for _ in range(2))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_gates = dense(rngs, (width, 2, heads), ("embed", None, None))
        self.b_gates = param(rngs, zeros, (2, heads), (None, None), decay=False, keep_float32=True)
        start = inverse_softplus(constant(max(1 - lower_bound, 1e-3)))
        self.ridge = time_scale(rngs, start, (heads, size), ("heads", None))
        if gate:
            self.w_g = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.norm = RMSNorm(size, rngs=rngs, eps=eps)
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        initial = dict.fromkeys(("conv", "keys", "memory")) if state is None else state
        (q, k), conv = convolve((self.q, self.k), x, initial["conv"], segment_ids)
        q, k = (l2_normalize(a.astype(jnp.float32)) for a in (q, k))
        v = constrain(project(x, self.w_v[...]), "batch", "length", "heads", None)
        gates = project(x, self.w_gates[...]).astype(jnp.float32) + self.b_gates[...]
        log_decay, beta = jax.nn.log_sigmoid(gates[:, :, 0]), jax.nn.sigmoid(gates[:, :, 1])
        ridge = self.lower_bound + jax.nn.softplus(self.ridge[...])

        solution = ridge_solve(self.steps, q, k, beta, log_decay, ridge, initial["keys"], segment_ids)
        where = {"segment_ids": segment_ids}
        _, keys = linear_attention(k, k, beta[..., None] * k, log_decay, initial_state=initial["keys"], **where)
        v = (beta[..., None] * v).astype(x.dtype)
        o, memory = linear_attention(solution, k, v, log_decay, initial_state=initial["memory"], **where)
        o = self.norm(o)
        if self.gate:
            o = silu_gate(project(x, self.w_g[...]), o)
        return project(o, self.w_o[...], inputs=2), {"conv": conv, "keys": keys, "memory": memory}

    def initial_state(self, batch: int, capacity: int) -> dict:
        memory = jnp.zeros((batch, *self.sizes), jnp.float32)
        return {
            "conv": [projection.initial_state(batch) for projection in (self.q, self.k)],
            "keys": memory,
            "memory": memory,
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ridge_solve(
    steps: int,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    ridge: Float[Array, "H K"],
    state: Float[Array, "B H K K"] | None,
    segment_ids: Ids | None,
) -> Float[Array, "B T H K"]:
    """(H_t + Diag(ridge))^-1 q_t at every token, by `steps` conjugate gradients from 0, for the H_t of `MesaNet` that begin at
    `state`."""
    return conjugate_gradients(steps, lambda x: product(x, k, beta, log_decay, ridge, state, segment_ids), q)


def _forward(steps, q, *matrix):
    solution = keep(ridge_solve(steps, q, *matrix))
    return solution, (solution, matrix)


def _backward(steps, kept, cotangent):
    """H x = q: the cotangent u of q solves H u = dx, since H is symmetric, and that of H is -u x^T."""
    solution, (*matrix, segment_ids) = kept
    u = conjugate_gradients(steps, lambda x: product(x, *matrix, segment_ids), cotangent)
    _, pull_back = jax.vjp(lambda *matrix: product(solution, *matrix, segment_ids), *matrix)
    return u, *pull_back(-u), None


ridge_solve.defvjp(_forward, _backward)


def product(x, k, beta, log_decay, ridge, state, segment_ids):
    """(H_t + Diag(ridge)) x_t."""
    y, _ = linear_attention(x, k, beta[..., None] * k, log_decay, initial_state=state, segment_ids=segment_ids)
    return y + ridge * x


def conjugate_gradients(steps, apply, target):
    """Solves apply(x) = target over the last axis, where `apply` is symmetric and positive; 0 where the target is."""
    dot = lambda a, b: jnp.sum(a * b, -1, keepdims=True)
    # Where a residual has vanished altogether there is nothing to divide.
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def step(carry, _):
        x, residual, direction, size = carry
        applied = apply(direction)
        length = ratio(size, dot(direction, applied))
        x, residual = x + length * direction, residual - length * applied
        rest = dot(residual, residual)
        return (x, residual, residual + ratio(rest, size) * direction, rest), None

    start = (jnp.zeros_like(target), target, target, dot(target, target))
    (x, *_), _ = jax.lax.scan(step, start, length=steps)
    return x
