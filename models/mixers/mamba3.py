"""Mamba-3, with a single input and output (SISO) or several (MIMO)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size, positive, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm
from models.params import constant, dense, ones, param, residual_output, step_bias, time_scale
from models.partitioning import constrain
from ops import segments
from ops.elementwise import silu_gate
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.projection import project, project_each
from ops.token_shift import token_shift


class Mamba3(Mixer):
    """S_t = alpha_t S_{t-1} + alpha_t (1 - lambda_t) dt_t B_{t-1} x_{t-1}^T + lambda_t dt_t B_t x_t^T, o_t = S_t^T C_t + D x_t,
    y = W_out (o * silu(z)) (arXiv 2603.15569, sections 3.1 and 3.2).

    alpha = exp(dt A): a trapezoid between two inputs in place of Mamba-2's step. A complex state is a rotation of B and C: of
    both, pairs of neighbouring channels are turned by angles theta_t = theta_{t-1} + pi dt_t tanh(W x). As in the authors' code,
    dt = softplus(W x + b), lambda = sigmoid(W x), -A = 1 + a for a = W x >= 0 and 1 / (1 - a) below (1e-4 at least), B and C are
    RMS-normalised maps of x shared by all heads, to which each head adds a bias, and a share of their channels is rotated.
    There is no short convolution. Until June 2026 their code had -A = softplus(a), as flash-linear-attention has: parameters of
    that time do not fit.

    B_s x_s^T reaches a later state with the sum of two weights, of which the second is known at s + 1; so it is written then
    (one token late) and the token's own term is added to what is read.

    With a `rank` R > 1 (MIMO) a token writes and reads R times: sum_r B_r (m_r * x)^T in place of B x^T, o_r = S^T C_r +
    D (m_r * x), and y = W_out sum_r n_r * o_r * silu(l_r * z), with learned l, m and n for each head, r and channel. The R pairs
    of a token are R steps of linear attention, of which the first decays; what step r has not read of the later ones is added.

    The maps of the input start 1.73 times as large as in the authors' code; see `models.params.dense`.

    Args:
      state: size of B and C.
      expand: channels over the width.
      heads: number of heads; by default one for every 64 channels.
      rotated: share of B's and C's channels that turn.
      rank: R, 4 in the paper's MIMO models.
      dt_min, dt_max: range of the step size at initialisation.
    """

    paper = "Mamba-3, arXiv 2603.15569"
    primitive = "linear_attention"
    tiny = {"state": 8, "heads": 2}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        state: int = 128,
        expand: float = 2.0,
        heads: int | None = None,
        rotated: float = 0.5,
        rank: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ):
        at_least(1, state=state, heads=heads, rank=rank)
        positive(rotated=rotated)
        inner = scaled(width, expand=expand)
        heads = max(1, inner // 64) if heads is None else heads
        channels = head_size(inner, heads, "the number of channels")
        angles = int(state * rotated) // 2
        if not 0 < angles <= state // 2:
            raise UserError(f"2 <= `state` * `rotated` <= `state` must hold, got state={state} and rotated={rotated}")
        self.heads = heads
        self.sizes = (heads, state, channels, angles)
        self.rank = rank
        several, axis = ((rank,), (None,)) if rank > 1 else ((), ())
        self.w_z = dense(rngs, (width, heads, channels), ("embed", "heads", None))
        self.w_x = dense(rngs, (width, heads, channels), ("embed", "heads", None))
        self.w_bc = dense(rngs, (width, 2, *several, state), ("embed", None, *axis, None))
        self.w_gates = dense(rngs, (width, 3, heads), ("embed", None, None))
        self.w_angle = dense(rngs, (width, angles), ("embed", None))
        facts = {"decay": False, "keep_float32": True}
        self.dt_bias = time_scale(rngs, step_bias(dt_min, dt_max), (heads,), (None,))
        self.b_norm = RMSNorm(state, rngs=rngs, eps=1e-5)
        self.c_norm = RMSNorm(state, rngs=rngs, eps=1e-5)
        self.b_bias = param(rngs, ones, (*several, heads, state), (*axis, "heads", None), **facts)
        self.c_bias = param(rngs, ones, (*several, heads, state), (*axis, "heads", None), **facts)
        self.d = param(rngs, ones, (heads,), (None,), **facts)
        if rank > 1:
            shape, axes = (rank, heads, channels), (None, "heads", None)
            self.rank_x = param(rngs, constant(1 / rank), shape, axes, decay=False)
            self.rank_z = param(rngs, ones, shape, axes, decay=False)
            self.rank_o = param(rngs, constant(1 / rank), shape, axes, decay=False)
        self.w_out = residual_output(rngs, (heads, channels, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        initial = dict.fromkeys(("b", "x", "weight", "turn", "memory")) if state is None else state
        new = {}

        def shift(name, value):
            value, new[name] = token_shift(value, initial_state=initial[name], segment_ids=segment_ids)
            return value

        # First what `tensor` does not split: the others' gradients of x are then one sum over its devices.
        b, c = project_each(x, self.w_bc[...])
        angle = jnp.tanh(project(x, self.w_angle[...]).astype(jnp.float32))[:, :, None]
        dt, a, mix = jnp.moveaxis(project(x, self.w_gates[...]).astype(jnp.float32), 2, 0)
        dt = jax.nn.softplus(dt + self.dt_bias[...])
        log_alpha = -dt * jnp.maximum(heavy_tail(a), 1e-4)
        mix = jax.nn.sigmoid(mix)
        to_heads = lambda w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        z, u = to_heads(self.w_z), to_heads(self.w_x)

        turn, new["turn"] = turns(math.pi * angle * dt[..., None], initial["turn"], segment_ids)
        turn = turn if self.rank == 1 else tuple(part[:, :, None] for part in turn)
        by_head = lambda a, bias: a.astype(jnp.float32)[..., None, :] + bias[...]
        b = rotate(by_head(self.b_norm(b), self.b_bias), turn)
        c = rotate(by_head(self.c_norm(c), self.c_bias), turn)

        own = mix * dt
        late = jnp.exp(log_alpha) * (shift("weight", own) + (1 - mix) * dt)
        past_b, past_x = shift("b", b), shift("x", u)
        if self.rank > 1:
            u, past_x = (a[:, :, None] * self.rank_x[...].astype(a.dtype) for a in (u, past_x))
            past_x = (late[:, :, None, :, None] * past_x).astype(x.dtype)
            o, new["memory"] = several_reads(c, past_b, past_x, log_alpha, initial["memory"], segment_ids)
            o = o + own[:, :, None, :, None] * weigh(scores(c, b), u) + self.d[...][:, None] * u
            o = silu_gate(z[:, :, None] * self.rank_z[...].astype(z.dtype), o.astype(x.dtype))
            o = jnp.sum(self.rank_o[...].astype(o.dtype) * o, 2)
            return project(o, self.w_out[...], inputs=2), new
        o, new["memory"] = linear_attention(
            c.astype(x.dtype),
            past_b.astype(x.dtype),
            (late[..., None] * past_x).astype(x.dtype),
            log_alpha,
            initial_state=initial["memory"],
            segment_ids=segment_ids,
        )
        read = own * jnp.sum(b * c, -1) + self.d[...]
        o = (o + read[..., None] * u).astype(x.dtype)
        return project(silu_gate(z, o), self.w_out[...], inputs=2), new

    def initial_state(self, batch: int, capacity: int) -> dict:
        heads, size, channels, angles = self.sizes
        zeros = lambda *shape: jnp.zeros((batch, heads, *shape), jnp.float32)
        turn = (zeros(angles) + 1, zeros(angles))
        memory = zeros(size, channels)
        b = zeros(size) if self.rank == 1 else jnp.zeros((batch, self.rank, heads, size), jnp.float32)
        return {"b": b, "x": zeros(channels), "weight": zeros(), "turn": turn, "memory": memory}


def several_reads(q, k, v, log_decay, state, segment_ids):
    """Linear attention of tokens that write R times and then read R times: q, k [B, T, R, H, N], v [B, T, R, H, P]."""
    rank = q.shape[2]
    fold = lambda a: a.reshape(a.shape[0], -1, *a.shape[3:])
    first = jnp.pad(log_decay[:, :, None], ((0, 0), (0, 0), (0, rank - 1), (0, 0)))
    o, state = linear_attention(
        fold(q.astype(v.dtype)),
        fold(k.astype(v.dtype)),
        fold(v),
        fold(first),
        initial_state=state,
        segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, rank, axis=1),
    )
    return o.reshape(v.shape) + weigh(jnp.triu(scores(q, k), 1), v), state


def scores(q, k):
    """The products of a token's R queries and R keys [B, T, H, R, R]."""
    return jnp.einsum("btrhn,btshn->bthrs", q, k, precision="highest")


def weigh(weights, v):
    """The sums over a token's R values [B, T, R, H, P]."""
    return jnp.einsum("bthrs,btshp->btrhp", weights, v.astype(weights.dtype), precision="highest")


def heavy_tail(a):
    """1 + a above 0 and 1 / (1 - a) below: positive, and slow to vanish."""
    return jnp.where(a >= 0, 1 + a, 1 / (1 - jnp.minimum(a, 0)))


def turns(angle, initial, segment_ids):
    """(cos, sin) of the sum of a segment's angles so far [B, T, H, N], by products of rotations: sums would lose digits."""
    step = (jnp.cos(angle), jnp.sin(angle))
    none = (jnp.ones_like(angle[:, 0]), jnp.zeros_like(angle[:, 0]))
    initial = none if initial is None else initial
    if segment_ids is None:
        return linear_recurrence(step, tuple(map(jnp.zeros_like, step)), initial_state=initial, axis="heads")
    # A restart, and padding, leave 0 of the product where 1 is meant.
    start = segments.is_start(segment_ids)[..., None, None]
    first = tuple(jnp.where(start, part, 0) for part in step)
    turn, final = linear_recurrence(step, first, initial_state=initial, segment_ids=segment_ids, axis="heads")
    empty = segment_ids[:, -1, None, None] == 0
    return turn, tuple(jnp.where(empty, a, b) for a, b in zip(none, final))


def rotate(x, turn):
    """Turns the first pairs of neighbouring channels of x [B, T, ..., H, N], as many as `turn` has."""
    cos, sin = turn
    size = 2 * cos.shape[-1]
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], -1).reshape(*x.shape[:-1], size)
    return jnp.concatenate([turned, x[..., size:]], -1)
