"""Parameters with their facts.

What the rest of the program must know about a parameter is written where the parameter is made: the logical names of its
axes (sharding), its learning-rate group, whether it decays and which of its dimensions are a map's inputs (optimiser), whether it
stays in float32 when the model computes in bfloat16 (precision). Nothing re-initialises a parameter later.
"""

import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import ascending, at_least

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

_abstract: contextvars.ContextVar[bool] = contextvars.ContextVar("abstract", default=False)


def without_values(make: Callable[[], Any]) -> Any:
    """What `make` builds, a module or a tree of them, with shapes in place of values (`nnx.eval_shape`).

    Parameters are not drawn on the way: what draws them would be traced and thrown away.
    """

    def shapes_only():
        token = _abstract.set(True)
        try:
            return make()
        finally:
            _abstract.reset(token)

    return nnx.eval_shape(shapes_only)


def param(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    decay: bool | None = None,
    group: str = "default",
    keep_float32: bool = False,
    active: float = 1.0,
    inputs: Sequence[int] | None = None,
) -> nnx.Param:
    """Makes a float32 parameter.

    Args:
      rngs: source of the key.
      init: initialiser `(key, shape, dtype) -> array`.
      shape: shape of the parameter.
      axes: logical axis name of each dimension ("embed", "heads", "mlp", "vocab", "state", "expert" or None), read by
        `training/sharding.py`.
      decay: whether weight decay applies; by default to matrices (two dimensions or more) and not to vectors.
      group: learning-rate group; its multiplier is `config.optimizer.group_scale[group]`. No gradient moves group "fixed" (read
        such parameters through `jax.lax.stop_gradient`).
      keep_float32: whether the parameter stays in float32 when the model computes in bfloat16.
      active: share of it that one token uses, read by `models/accounting.py`; less than 1 for experts and for tables of which
        a token reads a row.
      inputs: the dimensions that the product with the parameter sums over; () for one that is no map. By default they are read
        from the axes and `decay`, see `input_dimensions`; tests/models/test_fan_in.py says where that is wrong.

    Raises:
      ValueError: if `axes` does not name every dimension.
    """
    shape = tuple(shape)
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} axis names, got {tuple(axes)}")
    decay = len(shape) >= 2 if decay is None else decay
    inputs = input_dimensions(axes, decay) if inputs is None else tuple(inputs)
    value = jnp.zeros(shape, jnp.float32) if _abstract.get() else init(rngs.params(), shape, jnp.float32)
    facts = {"decay": decay, "group": group, "keep_float32": keep_float32, "inputs": inputs, "active": active}
    return nnx.Param(value, axes=tuple(axes), **facts)


def input_dimensions(axes: Sequence[str | None], decay: bool) -> tuple[int, ...]:
    """The dimensions that the product with a parameter sums over, as far as its other facts tell.

    A map back to the residual stream sums over all that is before "embed", a map out of it over "embed", a map of each head
    ("heads" first) over the dimension behind it, and any other map over its first dimension. Vectors, and what does not decay
    (filters, taps, tables, time constants), are no maps, unless they lead from the stream to named channels.
    """
    if len(axes) < 2:
        return ()
    if axes[-1] == "embed" and decay:
        return tuple(range(len(axes) - 1))
    if axes[0] == "embed" and (decay or any(axes[1:])):
        return (0,)
    if not decay:
        return ()
    return (1,) if axes[0] == "heads" else (0,)


def dense(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    inputs: int = 1,
    gain: float = 1.0,
    **facts,
) -> nnx.Param:
    """Makes the weight of a linear map: N(0, gain^2 / fan_in), where fan_in is the product of the first `inputs` sizes.

    PyTorch's `Linear` starts evenly in +-fan_in^-0.5, with 0.577 of that deviation: maps of mixers whose authors leave them at
    PyTorch's default start 1.73 times as large here, and their biases at 0 where PyTorch's are as spread as the maps.
    """
    std = gain / math.sqrt(math.prod(shape[:inputs]))
    return param(rngs, normal(std), shape, axes, inputs=range(inputs), **facts)


def residual_output(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], depth: int, *, branches: int = 2
) -> nnx.Param:
    """Makes the last map of a residual branch, from all axes but the last to the last, which is the width.

    Its gain is (branches * depth)^(-1/2), so that the sum of a model's branches has the same size at every depth (GPT-2).

    Args:
      depth: number of blocks of the model.
      branches: residual branches of a block: 2 for a mixer beside a channel mixer, 1 for a mixer that replaces it.
    """
    return dense(rngs, shape, axes, inputs=len(shape) - 1, gain=(branches * depth) ** -0.5)


def conv_taps(rngs: nnx.Rngs, conv_size: int, channels: int, axis: str | None) -> nnx.Param:
    """Makes the taps [conv_size, channels] of a short convolution: U(-a, a), a = conv_size^(-1/2); `axis` names the channels.

    PyTorch's default, as in Mamba's code. The convolution's bias, which has the same law there, starts at 0 here; fla starts its
    taps anew, as N(0, 0.02^2).

    Raises:
      UserError: if there is no tap.
    """
    at_least(1, conv_size=conv_size)
    return param(rngs, fan_in_uniform(conv_size), (conv_size, channels), (None, axis), decay=False)


def time_scale(
    rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str | None], *, group: str = "default"
) -> nnx.Param:
    """Makes a parameter that sets the time scales of a state, or belongs to them: it stays in float32 and does not decay."""
    return param(rngs, init, shape, axes, decay=False, group=group, keep_float32=True)


def normal(std: float) -> Initializer:
    """N(0, std^2)."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def xavier_uniform(fan_in: int, fan_out: int, gain: float = 1.0) -> Initializer:
    """U(-a, a), a = gain * sqrt(6 / (fan_in + fan_out))."""
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    return uniform(-bound, bound)


def uniform(low: float, high: float) -> Initializer:
    """U(low, high)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def fan_in_uniform(inputs: int) -> Initializer:
    """U(-a, a), a = inputs^(-1/2): PyTorch's default for maps, biases and convolutions."""
    return uniform(-(inputs**-0.5), inputs**-0.5)


def constant(value) -> Initializer:
    """A constant, broadcast to the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)


zeros = constant(0.0)
ones = constant(1.0)


def log_uniform(low: float, high: float) -> Initializer:
    """exp(U(log low, log high)): the usual law of a step size dt."""
    return lambda key, shape, dtype: jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))


def log_of(init: Initializer) -> Initializer:
    """The logarithms of what `init` draws."""
    return lambda key, shape, dtype: jnp.log(init(key, shape, dtype))


def log_step(dt_min: float, dt_max: float) -> Initializer:
    """log dt for step sizes dt that are log-uniform in [dt_min, dt_max].

    Raises:
      UserError: if that is no range of positive numbers.
    """
    ascending(dt_min=dt_min, dt_max=dt_max)
    return log_of(log_uniform(dt_min, dt_max))


def step_bias(dt_min: float = 0.001, dt_max: float = 0.1) -> Initializer:
    """The bias b of dt = softplus(b + ...) for step sizes dt that are log-uniform in [dt_min, dt_max], but at least 1e-4.

    Raises:
      UserError: if that is no range of positive numbers.
    """
    ascending(dt_min=dt_min, dt_max=dt_max)
    return inverse_softplus(log_uniform(max(dt_min, 1e-4), dt_max))


def inverse_softplus(init: Initializer) -> Initializer:
    """The values whose softplus is what `init` draws."""

    def draw(key, shape, dtype):
        value = init(key, shape, dtype)
        return value + jnp.log(-jnp.expm1(-value))

    return draw
