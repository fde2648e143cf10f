"""Parameters with their facts.

What the rest of the program must know about a parameter is written where the parameter is made: the logical names of its
axes (sharding), its learning-rate group and whether it decays (optimiser), whether it stays in float32 when the model
computes in bfloat16 (precision). Nothing re-initialises a parameter later.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]


def param(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    decay: bool | None = None,
    group: str = "default",
    keep_float32: bool = False,
) -> nnx.Param:
    """Makes a float32 parameter.

    Args:
      rngs: source of the key.
      init: initialiser `(key, shape, dtype) -> array`.
      shape: shape of the parameter.
      axes: logical axis name of each dimension ("embed", "heads", "mlp", "vocab", "state" or None), read by
        `training/sharding.py`.
      decay: whether weight decay applies; by default to matrices (two dimensions or more) and not to vectors.
      group: learning-rate group; its multiplier is `config.optimizer.group_scale[group]`. Group "fixed" is never trained
        (read such parameters through `jax.lax.stop_gradient`); group "statistics" moves by a tenth of minus its gradient,
        which is no part of the loss's (see `models.norms.BatchNorm`).
      keep_float32: whether the parameter stays in float32 when the model computes in bfloat16.

    Raises:
      ValueError: if `axes` does not name every dimension.
    """
    shape = tuple(shape)
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} axis names, got {tuple(axes)}")
    decay = len(shape) >= 2 if decay is None else decay
    value = init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=tuple(axes), decay=decay, group=group, keep_float32=keep_float32)


def dense(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    inputs: int = 1,
    gain: float = 1.0,
    **facts,
) -> nnx.Param:
    """Makes the weight of a linear map: N(0, gain^2 / fan_in), where fan_in is the product of the first `inputs` sizes."""
    std = gain / math.sqrt(math.prod(shape[:inputs]))
    return param(rngs, normal(std), shape, axes, **facts)


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


def constant(value) -> Initializer:
    """A constant, broadcast to the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)


zeros = constant(0.0)
ones = constant(1.0)


def log_uniform(low: float, high: float) -> Initializer:
    """exp(U(log low, log high)): the usual law of a step size dt."""
    return lambda key, shape, dtype: jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))


def inverse_softplus(init: Initializer) -> Initializer:
    """The values whose softplus is what `init` draws (bias of `dt = softplus(bias + ...)`)."""

    def draw(key, shape, dtype):
        value = init(key, shape, dtype)
        return value + jnp.log(-jnp.expm1(-value))

    return draw
