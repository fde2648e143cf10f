"""Normalisation layers. Statistics are float32 whatever the input dtype."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.params import constant, ones, param, zeros


def rms_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)).astype(x.dtype)


def l2_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), -1, keepdims=True) + eps)).astype(x.dtype)


def layer_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(var + eps) over the last axis, without weight and bias."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467). `offset=1` stores w - 1, as Gemma does."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-6, offset: float = 0.0):
        self.weight = param(rngs, constant(1 - offset), (size,), (axis,), keep_float32=True)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (x32 * scale * (self.offset + self.weight[...])).astype(x.dtype)


class LayerNorm(nnx.Module):
    """w * (x - mean) / sqrt(var + eps) + b over the last axis (arXiv 1607.06450)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-6):
        self.weight = param(rngs, ones, (size,), (axis,), keep_float32=True)
        self.bias = param(rngs, zeros, (size,), (axis,), keep_float32=True)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = layer_normalize(x.astype(jnp.float32), self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class ScaleNorm(nnx.Module):
    """s * x / sqrt(mean(x^2) + eps) with one learned scalar s (FLASH, arXiv 2202.10447)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-5):
        self.scale = param(rngs, ones, (), (), keep_float32=True)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return (self.scale[...] * rms_normalize(x.astype(jnp.float32), self.eps)).astype(x.dtype)


class BatchNorm(nnx.Module):
    """w * (x - mean) / sqrt(var + eps) + b with statistics of each channel over the tokens of the batch, padding left out
    (arXiv 1502.03167); in evaluation, with running averages of them.

    The averages are parameters of group "statistics", whose gradient is made to be their distance from what the batch
    shows: the optimiser moves them by a tenth of it, and nothing else is needed for stacked, rematerialised or
    distributed layers.
    """

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-5):
        facts = {"decay": False, "keep_float32": True}
        self.weight = param(rngs, ones, (size,), (axis,), **facts)
        self.bias = param(rngs, zeros, (size,), (axis,), **facts)
        self.mean = param(rngs, zeros, (size,), (axis,), group="statistics", **facts)
        self.variance = param(rngs, ones, (size,), (axis,), group="statistics", **facts)
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        training: bool = False,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.variance[...]
        if training:
            valid = jnp.ones(x.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
            count = jnp.maximum(jnp.sum(valid), 1)
            over = lambda a: jnp.einsum("bt,btd->d", valid, a, precision="highest") / count
            batch_mean = over(x32)
            batch_variance = over(jnp.square(x32 - batch_mean))
            mean = _follow(mean, batch_mean)
            variance = _follow(variance, batch_variance)
        x32 = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (x32 * self.weight[...] + self.bias[...]).astype(x.dtype)


@jax.custom_vjp
def _follow(average, value):
    """`value`; but the gradient to `average` is its distance from the value."""
    return value


_follow.defvjp(lambda average, value: (value, average - value), lambda distance, gradient: (distance, gradient))


NORMS = {
    "rmsnorm": RMSNorm,
    "rmsnorm1p": functools.partial(RMSNorm, offset=1.0),
    "layernorm": LayerNorm,
    "scalenorm": ScaleNorm,
    "batchnorm": BatchNorm,
}


def normalize(
    norm: nnx.Module, x: Float[Array, "B T D"], *, training: bool, segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """Applies any of the NORMS; the last two arguments are for those whose statistics are of the batch."""
    if isinstance(norm, BatchNorm):
        return norm(x, training=training, segment_ids=segment_ids)
    return norm(x)
