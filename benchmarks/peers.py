"""What others offer for the mathematics of the primitives: the rows that `benchmarks.ops` compares with.

A peer takes the length and the arrays of its case in `benchmarks.ops`, and returns what the primitive returns. Every
package here is optional and is imported only when one of its peers runs.
"""

import functools
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Peer(NamedTuple):
    """One row.

    Attributes:
      name: as the table shows it.
      needs: the modules without which it cannot run.
      function: (length, *inputs) -> output or tuple of outputs, on jax arrays or on torch tensors.
    """

    name: str
    needs: tuple[str, ...]
    function: Callable

    @property
    def missing(self) -> list[str]:
        return [module for module in self.needs if importlib.util.find_spec(module) is None]

    @property
    def uses_torch(self) -> bool:
        return "torch" in self.needs


def torch_program(
    peer: Peer,
    length: int,
    mode: str,
    inputs: list[np.ndarray],
    cotangents: list[np.ndarray],
    device: str = "cpu",
    dtype: str = "float32",
) -> Callable:
    """Returns a function of no arguments that computes the outputs, and in mode "fwdbwd" all gradients too.

    Where it runs on a GPU it returns when that is done.
    """
    import torch

    torch.set_num_threads(1)
    differentiate = mode == "fwdbwd"
    place = lambda x: torch.from_numpy(x.copy()).to(device, getattr(torch, dtype))
    tensors = [place(x).requires_grad_(differentiate) for x in inputs]
    cotangents = [place(x) for x in cotangents]

    def program():
        with torch.set_grad_enabled(differentiate):
            y = peer.function(length, *tensors)
        y = y if isinstance(y, tuple) else (y,)
        outputs = [*y, *torch.autograd.grad(y, tensors, cotangents)] if differentiate else list(y)
        if device != "cpu":
            torch.cuda.synchronize()
        return outputs

    return program


def fla(file: str, name: str) -> Callable:
    """A function of flash-linear-attention, from its file: importing the package itself wants a GPU."""
    return getattr(_module_of_file(str(pathlib.Path(importlib.util.find_spec("fla").origin).parent / file)), name)


@functools.cache
def _module_of_file(path):
    spec = importlib.util.spec_from_file_location("fla_" + pathlib.Path(path).parent.name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks functions up by the name of their module
    spec.loader.exec_module(module)
    return module


@functools.cache
def _transformers(model: str, name: str) -> Callable:
    """The plain torch function of a model, below the decorators that would replace it by an installed GPU kernel."""
    return inspect.unwrap(getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name))


# Attention: q, k, v.


def _dot_product_attention(window):
    def function(length, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window and (window - 1, 0))

    return function


@functools.cache
def _torch_mask(length, window):
    import torch

    if length > 8192:
        raise MemoryError(f"several arrays of {length} x {length} for each head")
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window)


def _torch_attention(window):
    def function(length, q, k, v):
        from torch.nn.functional import scaled_dot_product_attention

        mask = {"is_causal": True} if window is None else {"attn_mask": _torch_mask(length, window)}
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **mask).transpose(1, 2)

    return function


def _torch_squared_relu(length, q, k, v):
    import torch

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = scores.relu().square().masked_fill(~_torch_mask(length, length), 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


# Linear attention: q, k, v, log_decay. Delta rule: q, k, v, beta, log_decay, or q, k, v, log_decay, a, b.


def _fla_scalar(length, q, k, v, g):
    return fla("ops/simple_gla/naive.py", "naive_chunk_simple_gla")(q, k, v, g)[0]


def _fla_vector(length, q, k, v, g):
    return fla("ops/gla/naive.py", "naive_recurrent_gla")(q, k, v, g)[0]


def _mamba2(length, q, k, v, g):
    # It decays by exp(A dt) and writes dt x.
    x, A = v / -g[..., None], -g.new_ones(g.shape[-1])
    return _transformers("mamba2", "mamba2_chunk_scan")(x, -g, A, k, q * q.shape[-1] ** -0.5, chunk_size=64)


def _fla_gated_delta(length, q, k, v, beta, g):
    return fla("ops/gated_delta_rule/naive.py", "naive_chunk_gated_delta_rule")(q, k, v, g, beta)[0]


def _qwen3_next(length, q, k, v, beta, g):
    return _transformers("qwen3_next", "torch_chunk_gated_delta_rule")(q, k, v, g, beta)[0]


def _fla_kimi_delta(length, q, k, v, beta, g):
    chunk = min(64, length)
    return fla("ops/kda/naive.py", "naive_chunk_kda")(q, k, v, g, beta, chunk_size=chunk)[0]


def _fla_dplr(length, q, k, v, g, a, b):
    q, k, v, g, a, b = (x.transpose(1, 2) for x in (q, k, v, g, a, b))
    function = fla("ops/generalized_delta_rule/dplr/naive.py", "dplr_chunkwise")
    return function(q, k, v, b, a, g, chunk_size=min(32, length))[0].transpose(1, 2)


# Diagonal recurrences: a, b as real arrays or as (real, imaginary) pairs in a row.


def _associative(a, b):
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    return jax.lax.associative_scan(combine, (a, b), axis=1)[1]


def _associative_complex(length, a_re, a_im, b_re, b_im):
    h = _associative(jax.lax.complex(a_re, a_im), jax.lax.complex(b_re, b_im))
    return h.real, h.imag


def _mambapy(length, a, b):
    from mambapy.pscan import pscan

    return pscan(a[..., None], b[..., None])[..., 0]


def _fla_hgrn(length, a, b):
    return fla("ops/hgrn/naive.py", "naive_recurrent_hgrn")(b, a.log())[0]


# Selective scan: x, dt, A, B, C. State space scan: x and the parts of a, b, c.


def _associative_selective(length, x, dt, A, B, C):
    h = _associative(jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])
    return jnp.einsum("btdn,btn->btd", h, C)


def _mamba(with_mambapy):
    def function(length, x, dt, A, B, C):
        x, dt, B, C = (z.transpose(1, 2) for z in (x, dt, B, C))
        scan = _transformers("mamba", "mamba_selective_scan")
        return scan(x, dt, A, B, C, use_mambapy=with_mambapy).transpose(1, 2)

    return function


def _associative_state_space(length, x, a_re, a_im, b_re, b_im, c_re, c_im):
    a, b, c = (jax.lax.complex(*z) for z in ((a_re, a_im), (b_re, b_im), (c_re, c_im)))
    inflow = x[..., None] * b
    return 2 * jnp.einsum("btdn,dn->btd", _associative(jnp.broadcast_to(a, inflow.shape), inflow), c).real


# Long convolution: x, kernel. Vandermonde kernel: the parts of log_a and c.


def _jax_convolution(length, x, kernel):
    spectrum = jnp.fft.rfft(x, 2 * length, axis=1) * jnp.fft.rfft(kernel.T, 2 * length, axis=0)
    return jnp.fft.irfft(spectrum, 2 * length, axis=1)[:, :length]


def _torch_convolution(length, x, kernel):
    import torch

    spectrum = torch.fft.rfft(x.transpose(1, 2), 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)


def _jax_polynomial(length, q, k, v):
    scores = jnp.einsum("bthf,bshf->bhts", q, k, precision="highest") / 4
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 1 + scores + scores**2 / 2, 0)
    return jnp.einsum("bhts,bshv->bthv", scores, v, precision="highest")


def _jax_vandermonde(length, log_re, log_im, c_re, c_im):
    powers = jnp.exp(jax.lax.complex(log_re, log_im)[..., None] * jnp.arange(length))
    return 2 * jnp.einsum("dn,dnl->dl", jax.lax.complex(c_re, c_im), powers).real


def _torch_vandermonde(length, log_re, log_im, c_re, c_im):
    import torch

    powers = torch.exp(torch.complex(log_re, log_im)[..., None] * torch.arange(length))
    return 2 * torch.einsum("dn,dnl->dl", torch.complex(c_re, c_im), powers).real


_TORCH, _FLA, _TRANSFORMERS = ("torch",), ("torch", "einops", "fla"), ("torch", "transformers")

PEERS: dict[tuple[str, str], list[Peer]] = {
    ("attention", "causal"): [
        Peer("jax.nn.dot_product_attention", (), _dot_product_attention(None)),
        Peer("torch scaled_dot_product_attention", _TORCH, _torch_attention(None)),
    ],
    ("attention", "window 256"): [
        Peer("jax.nn.dot_product_attention", (), _dot_product_attention(256)),
        Peer("torch scaled_dot_product_attention", _TORCH, _torch_attention(256)),
    ],
    ("attention", "relu2"): [Peer("torch einsum", _TORCH, _torch_squared_relu)],
    ("linear_attention", "decay per head"): [
        Peer("fla naive_chunk_simple_gla", _FLA, _fla_scalar),
        Peer("transformers mamba2_chunk_scan", _TRANSFORMERS, _mamba2),
    ],
    ("linear_attention", "decay per channel"): [Peer("fla naive_recurrent_gla", _FLA, _fla_vector)],
    ("polynomial_attention", "Based"): [Peer("jnp einsum", (), _jax_polynomial)],
    ("delta_rule", "decay per head"): [
        Peer("fla naive_chunk_gated_delta_rule", _FLA, _fla_gated_delta),
        Peer("transformers qwen3_next torch_chunk", _TRANSFORMERS, _qwen3_next),
    ],
    ("delta_rule", "decay per channel"): [Peer("fla naive_chunk_kda", _FLA, _fla_kimi_delta)],
    ("delta_rule", "diagonal plus rank one"): [Peer("fla dplr_chunkwise", _FLA, _fla_dplr)],
    ("linear_recurrence", "real"): [
        Peer("lax.associative_scan", (), lambda length, a, b: _associative(a, b)),
        Peer("mambapy pscan", ("torch", "mambapy"), _mambapy),
        Peer("fla naive_recurrent_hgrn", _FLA, _fla_hgrn),
    ],
    ("linear_recurrence", "complex"): [Peer("lax.associative_scan", (), _associative_complex)],
    ("selective_scan", "Mamba"): [
        Peer("lax.associative_scan", (), _associative_selective),
        Peer("transformers mamba + mambapy pscan", (*_TRANSFORMERS, "mambapy"), _mamba(True)),
        Peer("transformers mamba", _TRANSFORMERS, _mamba(False)),
    ],
    ("selected_attention", "8 blocks of 64"): [],  # whose choice no other package takes apart from its attention
    ("selected_attention", "256 keys for all heads"): [],
    ("state_space_scan", "S4D"): [Peer("lax.associative_scan", (), _associative_state_space)],
    ("long_convolution", "causal"): [
        Peer("jnp.fft", (), _jax_convolution),
        Peer("torch.fft", _TORCH, _torch_convolution),
    ],
    ("vandermonde_kernel", "S4D"): [
        Peer("jnp exp and einsum", (), _jax_vandermonde),
        Peer("torch exp and einsum", _TORCH, _torch_vandermonde),
    ],
}
