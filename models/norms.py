"""Normalisation layers. Statistics are float32 whatever the input dtype.

Their backward pass keeps the input, in its own dtype, and nothing else of its size: the rest is cheap to compute again.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from models.params import constant, ones, param, zeros
from ops.rows import unit_rows

# What a model saw in a batch that parameters follow without a gradient: nested dicts like the parameters, with None where there
# is nothing. Its leaves are statistics, of which parameters are running averages, and a `Load`.
Statistics = Mapping[str, Any]


class Load(NamedTuple):
    """How much each of several experts had to do, which a parameter of their choice answers (arXiv 2408.15664).

    Attributes:
      counts: [..., E] of each of E experts.
      step: [...], by which the parameter grows where a count is below the mean, and shrinks where it is above.
    """

    counts: Float[Array, "*L E"]
    step: Float[Array, "*L"]


def _recomputed(normalize, *arrays, eps):
    return jax.checkpoint(functools.partial(normalize, eps=eps), prevent_cse=False)(*arrays)


def _rms(x, weight, eps):
    y = unit_rows(x.astype(jnp.float32), eps=eps)
    return (y if weight is None else y * weight).astype(x.dtype)


def _layer(x, weight, bias, eps):
    x32 = x.astype(jnp.float32)
    y = unit_rows(x32 - jnp.mean(x32, -1, keepdims=True), eps=eps)
    return (y if weight is None else y * weight + bias).astype(x.dtype)


def _l2(x, eps):
    return unit_rows(x.astype(jnp.float32), eps=eps, mean=False).astype(x.dtype)


def rms_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight."""
    return _recomputed(_rms, x, None, eps=eps)


def l2_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    return _recomputed(_l2, x, eps=eps)


def layer_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(var + eps) over the last axis, without weight and bias."""
    return _recomputed(_layer, x, None, None, eps=eps)


class RMSNorm(nnx.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467). `offset=1` stores w - 1, as Gemma does."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-6, offset: float = 0.0):
        self.weight = param(rngs, constant(1 - offset), (size,), (axis,), keep_float32=True)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _recomputed(_rms, x, self.offset + self.weight[...], eps=self.eps)


class LayerNorm(nnx.Module):
    """w * (x - mean) / sqrt(var + eps) + b over the last axis (arXiv 1607.06450)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-6):
        self.weight = param(rngs, ones, (size,), (axis,), keep_float32=True)
        self.bias = param(rngs, zeros, (size,), (axis,), keep_float32=True)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _recomputed(_layer, x, self.weight[...], self.bias[...], eps=self.eps)


class ScaleNorm(nnx.Module):
    """s * x / sqrt(mean(x^2) + eps) with one learned scalar s (FLASH, arXiv 2202.10447)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-5):
        self.scale = param(rngs, ones, (), (), keep_float32=True)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _recomputed(_rms, x, self.scale[...], eps=self.eps)


class BatchNorm(nnx.Module):
    """w * (x - mean) / sqrt(var + eps) + b with statistics of each channel over the tokens of the batch, padding left out
    (arXiv 1502.03167); in evaluation, with running averages of them.

    The averages are parameters that no gradient moves (group "fixed"). In training the norm returns the batch's statistics
    beside its output, the model hands them on to who trains it, and `follow` moves the averages.
    """

    momentum: ClassVar[float] = 0.1  # the share of a batch in the running averages

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-5):
        facts = {"decay": False, "keep_float32": True}
        self.weight = param(rngs, ones, (size,), (axis,), **facts)
        self.bias = param(rngs, zeros, (size,), (axis,), **facts)
        self.mean = param(rngs, zeros, (size,), (axis,), group="fixed", **facts)
        self.variance = param(rngs, ones, (size,), (axis,), group="fixed", **facts)
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        training: bool = False,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Statistics | None]:
        """Returns y, and the statistics of the batch under the names of their averages; None in evaluation."""
        x32 = x.astype(jnp.float32)
        if training:
            valid = jnp.ones(x.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
            count = jnp.maximum(jnp.sum(valid), 1)
            over = lambda a: jnp.einsum("bt,btd->d", valid, a, precision="highest") / count
            mean = over(x32)
            variance = over(jnp.square(x32 - mean))
        else:
            mean, variance = (jax.lax.stop_gradient(average[...]) for average in (self.mean, self.variance))
        x32 = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        y = (x32 * self.weight[...] + self.bias[...]).astype(x.dtype)
        return y, {"mean": mean, "variance": variance} if training else None


def follow(params: PyTree, statistics: Statistics | None) -> PyTree:
    """The parameters of a model after a batch: each running average moves by `BatchNorm.momentum` of its distance, and what
    answers a `Load` by its step.

    Args:
      params: nested dicts of arrays.
      statistics: what the model returned in training: the same nested dicts, down to the averages and to nothing else; None
        where there are none.
    """
    return params if statistics is None else _followed(params, statistics)


def _followed(params, statistics):
    if statistics is None:
        return params
    if isinstance(statistics, Load):
        counts, step = statistics
        return params + step[..., None] * jnp.sign(jnp.mean(counts, -1, keepdims=True) - counts)
    if not isinstance(statistics, Mapping):
        return params + BatchNorm.momentum * (statistics - params)
    return {**params, **{name: _followed(params[name], found) for name, found in statistics.items()}}


NORMS = {
    "rmsnorm": RMSNorm,
    "rmsnorm1p": functools.partial(RMSNorm, offset=1.0),
    "layernorm": LayerNorm,
    "scalenorm": ScaleNorm,
    "batchnorm": BatchNorm,
}


def normalize(
    norm: nnx.Module, x: Float[Array, "B T D"], *, training: bool, segment_ids: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T D"], Statistics | None]:
    """Applies any of the NORMS; the last two arguments are for those whose statistics are of the batch.

    Returns:
      y, and in training the batch's statistics, of a norm that has them.
    """
    if isinstance(norm, BatchNorm):
        return norm(x, training=training, segment_ids=segment_ids)
    return norm(x), None
