"""What `benchmarks.ops` computes: each primitive at the settings its users have, with arrays like theirs."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.attention import attention
from ops.delta_rule import delta_rule
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.polynomial_attention import polynomial_attention
from ops.selected_attention import group_scores, select, selected_attention
from ops.selective_scan import selective_scan
from ops.state_space_scan import state_space_scan


class Case(NamedTuple):
    """A primitive at one setting.

    Attributes:
      primitive, variant: its name, which is also its key in `peers.PEERS`.
      shape: for the table.
      inputs: (generator, length) -> float32 arrays, all of which are differentiated.
      function: (implementation, length, *inputs) -> output or tuple of outputs, without the final state.
      implementations: what to try beside "auto"; None for all that the primitive offers where it runs.
    """

    primitive: str
    variant: str
    shape: str
    inputs: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    function: Callable[..., Any]
    implementations: tuple[str, ...] | None = None

    def forms(self) -> tuple[str, ...]:
        """What to try beside "auto"; a call that a form does not take raises a ValueError."""
        everything = dispatch.offered(dispatch.current_platform())
        return everything[self.primitive] if self.implementations is None else self.implementations


def _qkv(rng, length):
    return tuple(rng.standard_normal((1, length, 4, 64)) for _ in range(3))


def _log_decay(rng, *shape):
    """log sigmoid(x + 3): about 0.95 a step."""
    return -np.log1p(np.exp(-rng.standard_normal(shape) - 3))


def _linear_attention_inputs(per_channel, rng, length):
    q, k, v = _qkv(rng, length)
    return q, k / 8, v, _log_decay(rng, 1, length, 4, *(64,) * per_channel)


def _delta_rule_inputs(per_channel, rng, length):
    q, k, v, g = _linear_attention_inputs(per_channel, rng, length)
    beta = 1 / (1 + np.exp(-rng.standard_normal((1, length, 4))))
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, beta, g


def _rank_one_inputs(rng, length):
    q, k, v, beta, g = _delta_rule_inputs(True, rng, length)
    return q, k, v, g, -beta[..., None] * k, k


def _real_inputs(rng, length):
    return np.exp(_log_decay(rng, 1, length, 512)), rng.standard_normal((1, length, 512))


def _complex_inputs(rng, length):
    size, phase = np.exp(_log_decay(rng, 1, length, 512)), rng.uniform(0, np.pi, 512)
    return size * np.cos(phase), size * np.sin(phase), *(rng.standard_normal(size.shape) for _ in range(2))


def _mamba_inputs(rng, length):
    x, B, C = (rng.standard_normal((1, length, width)) for width in (256, 16, 16))
    dt = np.log1p(np.exp(rng.standard_normal(x.shape) - 4))
    return x, dt, -np.tile(np.arange(1.0, 17.0), (256, 1)), B, C


def _s4d_parameters(rng, width, states):
    """log a = dt (-1/2 + i pi n) and c."""
    dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), (width, 1)))
    c = rng.standard_normal((2, width, states))
    return -0.5 * dt * np.ones(states), math.pi * dt * np.arange(states), *c


def _state_space_inputs(rng, length):
    log_re, log_im, *c = _s4d_parameters(rng, 64, 32)
    a = np.exp(log_re + 1j * log_im)
    return rng.standard_normal((2, length, 64)), a.real, a.imag, *rng.standard_normal((2, 64, 32)), *c


def _convolution_inputs(rng, length):
    kernel = rng.standard_normal((64, length)) * np.exp(-np.arange(length) / 100)
    return rng.standard_normal((2, length, 64)), kernel


def _polynomial_inputs(rng, length):
    q, k, v = _qkv(rng, length)
    return q[..., :16], k[..., :16], v


def _vandermonde_inputs(rng, length):
    return _s4d_parameters(rng, 32, 32)


def _attention(options):
    return lambda name, length, q, k, v: attention(q, k, v, implementation=name, **options)


def _linear_attention(name, length, q, k, v, g):
    return linear_attention(q, k, v, g, scale=q.shape[-1] ** -0.5, implementation=name)[0]


def _polynomial_attention(name, length, q, k, v):
    return polynomial_attention(q / 2, k / 2, v, coefficients=(1.0, 1.0, 0.5), implementation=name)[0]


def _delta_rule(name, length, q, k, v, beta, g):
    return delta_rule(q, k, v, beta, g, scale=q.shape[-1] ** -0.5, implementation=name)[0]


def _rank_one(name, length, q, k, v, g, a, b):
    return delta_rule(q, k, v, log_decay=g, a=a, b=b, scale=q.shape[-1] ** -0.5, implementation=name)[0]


def _real(name, length, a, b):
    return linear_recurrence(a, b, implementation=name)[0]


def _complex(name, length, a_re, a_im, b_re, b_im):
    return linear_recurrence((a_re, a_im), (b_re, b_im), implementation=name)[0]


def _selective_scan(name, length, x, dt, A, B, C):
    return selective_scan(x, dt, A, B, C, implementation=name)[0]


def _selected_attention(size, count, together, name, length, q, k, v):
    """Attention to the `count` spans of `size` keys whose means each head, or all heads together, score highest."""
    rows, size = len(k), min(size, length)
    means = k.reshape(rows, length // size, size, *k.shape[2:]).mean(2)
    score = (lambda q, k: group_scores(q, k).sum(2, keepdims=True)) if together else group_scores
    places, key_places = (jnp.broadcast_to(jnp.arange(n), (rows, n)) for n in (length, length // size))
    chosen = select(score, q, means, count, places=places, key_places=key_places * size)
    starts = jnp.where(chosen < 0, -1, chosen * size)
    return selected_attention(q, k, v, starts, size=size, implementation=name)[0]


def _state_space_scan(name, length, x, a_re, a_im, b_re, b_im, c_re, c_im):
    return state_space_scan(x, (a_re, a_im), (b_re, b_im), (c_re, c_im), implementation=name)[0]


def _long_convolution(name, length, x, kernel):
    return long_convolution(x, kernel, implementation=name)


def _vandermonde(name, length, log_re, log_im, c_re, c_im):
    return vandermonde_kernel((log_re, log_im), (c_re, c_im), length)


_HEADS = "B1 H4 K64 V64"
_LINEAR, _DELTA = _linear_attention_inputs, _delta_rule_inputs
CASES = (
    Case("attention", "causal", _HEADS, _qkv, _attention({})),
    Case("attention", "window 256", _HEADS, _qkv, _attention({"window": 256})),
    Case("attention", "relu2", _HEADS, _qkv, _attention({"activation": "relu2"})),
    Case("linear_attention", "decay per head", _HEADS, functools.partial(_LINEAR, False), _linear_attention),
    Case("linear_attention", "decay per channel", _HEADS, functools.partial(_LINEAR, True), _linear_attention),
    Case("polynomial_attention", "Based", "B1 H4 F16 V64", _polynomial_inputs, _polynomial_attention),
    Case("delta_rule", "decay per head", _HEADS, functools.partial(_DELTA, False), _delta_rule),
    Case("delta_rule", "decay per channel", _HEADS, functools.partial(_DELTA, True), _delta_rule),
    Case("delta_rule", "diagonal plus rank one", _HEADS, _rank_one_inputs, _rank_one),
    Case("linear_recurrence", "real", "B1 D512", _real_inputs, _real),
    Case("linear_recurrence", "complex", "B1 D512", _complex_inputs, _complex),
    Case("selective_scan", "Mamba", "B1 D256 N16", _mamba_inputs, _selective_scan),
    Case("selected_attention", "8 blocks of 64", _HEADS, _qkv, functools.partial(_selected_attention, 64, 8, False)),
    Case(
        "selected_attention",
        "256 keys for all heads",
        _HEADS,
        _qkv,
        functools.partial(_selected_attention, 1, 256, True),
    ),
    Case("state_space_scan", "S4D", "B2 D64 N32", _state_space_inputs, _state_space_scan),
    Case("long_convolution", "causal", "B2 D64", _convolution_inputs, _long_convolution, ("fft", "matmul")),
    Case("vandermonde_kernel", "S4D", "D32 N32", _vandermonde_inputs, _vandermonde, ()),
)


def case_arrays(case: Case, length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs, and a random cotangent for each output."""
    rng = np.random.default_rng(0)
    inputs = [np.asarray(x, np.float32) for x in case.inputs(rng, length)]
    outputs = jax.tree.leaves(jax.eval_shape(functools.partial(case.function, "auto", length), *inputs))
    return inputs, [rng.standard_normal(y.shape, np.float32) for y in outputs]
