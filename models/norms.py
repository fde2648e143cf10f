"""Normalisation layers. Statistics are float32 whatever the input dtype."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.params import constant, ones, param, zeros


def rms_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)).astype(x.dtype)


def l2_normalize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), -1, keepdims=True) + eps)).astype(x.dtype)


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
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


class ScaleNorm(nnx.Module):
    """s * x / sqrt(mean(x^2) + eps) with one learned scalar s (FLASH, arXiv 2202.10447)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, axis: str | None = None, eps: float = 1e-5):
        self.scale = param(rngs, ones, (), (), keep_float32=True)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return (self.scale[...] * rms_normalize(x.astype(jnp.float32), self.eps)).astype(x.dtype)


NORMS = {
    "rmsnorm": RMSNorm,
    "rmsnorm1p": functools.partial(RMSNorm, offset=1.0),
    "layernorm": LayerNorm,
    "scalenorm": ScaleNorm,
}
