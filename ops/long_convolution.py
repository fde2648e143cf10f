"""Depthwise convolution with kernels as long as the sequence, and the kernel of diagonal state spaces.

The convolution of S4 (arXiv 2111.00396), S4D (2206.11893), SGConv (2210.09298), Hyena (2302.10866), MEGA (2209.10655).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops import dispatch, matmul_fourier


@dispatch.primitive("reference", "fft", "matmul")
def long_convolution(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D L"],
    *,
    bidirectional_kernel: Float[Array, "D M"] | None = None,
    skip: Float[Array, "D"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T D"]:
    """Computes y_t = sum_{j=0}^{t} kernel_j x_{t-j} (+ sum_{j>=1} bidirectional_kernel_j x_{t+j}) (+ skip x_t).

    Kernels may be longer or shorter than the sequence; what is missing is zero. Lag 0 is in `kernel` only, so the first
    entry of `bidirectional_kernel` is not used. Computed in float32 (float64 where an input is). The sequence starts at
    index 0: packed segments and streaming need a recurrence (`state_space_scan`).

    Args:
      implementation: "reference" (a product with the [T, T] matrix of each channel), "fft" (by XLA's Fourier transform) or
        "matmul" (by products with small dense matrices, see `matmul_fourier`); "auto" takes "matmul" on a TPU, whose compiler
        is slow with Fourier transforms and moves many times the bytes of their inputs, and "fft" elsewhere.

    Returns:
      y in the dtype of `x`.

    Raises:
      ValueError: if the kernels' or the skip's number of channels is not that of `x`, or the implementation is unknown.
    """
    _check(x, kernel, bidirectional_kernel, skip)
    policy = "matmul" if dispatch.current_platform() == "tpu" else "fft"
    form = dispatch.choose("long_convolution", implementation, policy)
    length = x.shape[1]
    dtype = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    past = kernel[:, :length].astype(dtype)
    future = past[:, :0] if bidirectional_kernel is None else bidirectional_kernel[:, 1:length].astype(dtype)
    points = length + max(past.shape[1] - 1, future.shape[1])
    plan = matmul_fourier.plan(points)
    size = {"reference": 2 * length, "fft": _fft_size(points), "matmul": plan.size}[form]
    gap = jnp.zeros((past.shape[0], size - past.shape[1] - future.shape[1]), dtype)
    circular = jnp.concatenate([past, gap, jnp.flip(future, 1)], axis=1)  # lag j at index j modulo size
    if form == "reference":
        lags = jnp.arange(length)[:, None] - jnp.arange(length)
        y = jnp.einsum(
            "dts,bsd->btd", circular[:, lags % size], x.astype(dtype), precision=dispatch.matmul_precision(dtype)
        )
    elif form == "fft":
        y = jnp.swapaxes(_convolve(jnp.swapaxes(x, 1, 2), circular), 1, 2)
    else:
        y = _convolve_by_products(plan, x, circular.T)
    if skip is not None:
        y = y + skip.astype(dtype) * x.astype(dtype)
    return y.astype(x.dtype)


def _check(x, kernel, bidirectional_kernel, skip):
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, D]; got {x.shape}")
    width = x.shape[2]
    for name, k in (("kernel", kernel), ("bidirectional_kernel", bidirectional_kernel)):
        if k is not None and (k.ndim != 2 or k.shape[0] != width or k.shape[1] < 1):
            raise ValueError(f"{name} must be [{width}, L] with L >= 1; got {k.shape}")
    if skip is not None and skip.shape != (width,):
        raise ValueError(f"skip must be {(width,)}; got {skip.shape}")


def _fft_size(minimum: int) -> int:
    """The least even 2^i 3^j 5^k that is not below `minimum`: lengths that every FFT library is fast at."""
    size = max(2, minimum + minimum % 2)
    while _rough_part(size) > 1:
        size += 2
    return size


def _rough_part(n: int) -> int:
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n


# XLA does not split a Fourier transform over rows (on a CPU and a GPU up to jax 0.11, on a TPU): it would send all rows to all.
_ROWS = ("batch", None, None)
_KERNEL = (None, None)


def _spectrum(x, size: int):
    axes = _ROWS if x.ndim == 3 else _KERNEL
    return dispatch.local(lambda x: jnp.fft.rfft(x, size, axis=-1), [axes], axes)(x)


def _inverse(y, size: int):
    axes = _ROWS if y.ndim == 3 else _KERNEL
    return dispatch.local(lambda y: jnp.fft.irfft(y, size, axis=-1), [axes], axes)(y)


@jax.custom_vjp
def _convolve(x: Float[Array, "B D T"], kernel: Float[Array, "D S"]) -> Float[Array, "B D T"]:
    """First T entries of the circular convolution of period S. The derivative recomputes the spectra: none is kept."""
    size = kernel.shape[1]
    y = _spectrum(x.astype(kernel.dtype), size) * _spectrum(kernel, size)
    return _inverse(y, size)[..., : x.shape[2]]


def _convolve_forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _convolve_backward(residuals, dy):
    x, kernel = residuals
    size = kernel.shape[1]
    dy = _spectrum(dy, size)
    dx = _inverse(dy * jnp.conj(_spectrum(kernel, size)), size)[..., : x.shape[2]]
    dkernel = jnp.sum(dy * jnp.conj(_spectrum(x.astype(kernel.dtype), size)), axis=0)
    return dx.astype(x.dtype), _inverse(dkernel, size)


_convolve.defvjp(_convolve_forward, _convolve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_by_products(
    plan: matmul_fourier.Plan, x: Float[Array, "B T D"], kernel: Float[Array, "S D"]
) -> Float[Array, "B T D"]:
    """As `_convolve`, with a period of the plan's size."""
    of_x, of_kernel = (matmul_fourier.spectrum(z.astype(kernel.dtype), plan) for z in (x, kernel[None]))
    return matmul_fourier.inverse(matmul_fourier.multiply(of_x, of_kernel), plan, x.shape[1])


def _by_products_forward(plan, x, kernel):
    return _convolve_by_products(plan, x, kernel), (x, kernel)


def _by_products_backward(plan, residuals, dy):
    x, kernel = residuals
    spectrum = lambda z: matmul_fourier.spectrum(z.astype(kernel.dtype), plan)
    of_dy = spectrum(dy)
    dx = matmul_fourier.multiply(of_dy, spectrum(kernel[None]), conjugate=True)
    dkernel = jnp.sum(matmul_fourier.multiply(of_dy, spectrum(x), conjugate=True), 0, keepdims=True)
    dx, dkernel = matmul_fourier.inverse(dx, plan, x.shape[1]), matmul_fourier.inverse(dkernel, plan, plan.size)[0]
    return dx.astype(x.dtype), dkernel


_convolve_by_products.defvjp(_by_products_forward, _by_products_backward)


def vandermonde_kernel(
    log_a: tuple[Float[Array, "D N"], Float[Array, "D N"]],
    c: tuple[Float[Array, "D N"], Float[Array, "D N"]],
    length: int,
) -> Float[Array, "D length"]:
    """Computes 2 Re sum_n c_n exp(l log_a_n) for l = 0 .. length - 1: the kernel of S4D (arXiv 2206.11893).

    With l = r s + l', the powers exp(r s log_a) and exp(l' log_a) are about 2 sqrt(length) exponentials for each n, and
    their products one real matrix product per channel.

    Args:
      log_a: (real, imaginary) parts of the logarithm of the discrete transition; N counts one of each conjugate pair.
      c: (real, imaginary) parts of the coefficients.
      length: number of lags.

    Returns:
      The kernel, float32 or, for float64 inputs, float64.

    Raises:
      ValueError: if shapes disagree.
    """
    if len({z.shape for z in (*log_a, *c)}) != 1 or log_a[0].ndim != 2:
        raise ValueError(f"log_a and c must be pairs of [D, N]; got {[z.shape for z in (*log_a, *c)]}")
    dtype = jnp.promote_types(jnp.result_type(*log_a, *c), jnp.float32)
    (log_re, log_im), (c_re, c_im) = jax.tree.map(lambda z: z.astype(dtype), (log_a, c))
    stride = math.isqrt(length - 1) + 1
    rows = -(-length // stride)

    def powers(lags):
        magnitude, phase = jnp.exp(lags[:, None] * log_re[:, None]), lags[:, None] * log_im[:, None]
        return magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)  # [D, lags, N]

    fine_re, fine_im = powers(jnp.arange(stride, dtype=dtype))
    re, im = powers(stride * jnp.arange(rows, dtype=dtype))
    re, im = re * c_re[:, None] - im * c_im[:, None], re * c_im[:, None] + im * c_re[:, None]
    kernel = jnp.einsum(
        "drn,dsn->drs",
        jnp.concatenate([re, -im], axis=-1),
        jnp.concatenate([fine_re, fine_im], axis=-1),
        precision=dispatch.matmul_precision(dtype),
    )
    return 2 * kernel.reshape(kernel.shape[0], rows * stride)[:, :length]
