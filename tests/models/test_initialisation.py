"""The ranges that the papers state for parameters at initialisation."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers

WIDTH = 64


def make(name, **hyperparameters):
    return mixers.create(name, WIDTH, rngs=nnx.Rngs(0), **hyperparameters)


def softplus(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


def test_mamba():
    """dt log-uniform in [0.001, 0.1], A = -(1..N), D = 1 (arXiv 2312.00752, section 3.6)."""
    mixer = make("mamba")
    dt = softplus(mixer.dt_bias[...])
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.3  # the middle of the law, on a log scale
    np.testing.assert_allclose(np.exp(mixer.a_log[...]), np.tile(np.arange(1.0, 17.0), (2 * WIDTH, 1)), rtol=1e-6)
    assert (np.asarray(mixer.d[...]) == 1).all()
    assert mixer.w_dt[...].shape[0] == 4 and np.abs(mixer.w_dt[...]).max() <= 4**-0.5


def test_gated_delta_net():
    """A uniform in (0, 16), dt log-uniform in [0.001, 0.1]."""
    mixer = make("gated_delta_net", heads=16)
    a, dt = np.exp(mixer.a_log[...]), softplus(mixer.dt_bias[...])
    assert 0 < a.min() and a.max() <= 16 and a.std() > 2
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101


def test_s4d():
    """Re A = -1/2, Im A = pi n (lin), dt log-uniform in [0.001, 0.1], C of unit variance (arXiv 2206.11893)."""
    mixer = make("s4d")
    np.testing.assert_allclose(-np.exp(mixer.log_a_real[...]), -0.5, rtol=1e-6)
    np.testing.assert_allclose(mixer.a_imag[0], np.pi * np.arange(32), rtol=1e-6)
    dt = np.exp(mixer.log_dt[...])
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    c = np.asarray(mixer.c[0, 0]) + 1j * np.asarray(mixer.c[0, 1])
    assert abs(np.mean(np.abs(c) ** 2) - 1) < 0.1


def test_s4d_legs():
    """The eigenvalues of HiPPO-LegS' normal part, from the matrix itself."""
    n = 16
    i = np.arange(n)
    a = -np.where(i[:, None] > i, np.sqrt((2 * i[:, None] + 1) * (2 * i + 1)), np.diag(i + 1.0))
    p = np.sqrt(i + 0.5)
    eigenvalues = np.linalg.eigvals(a + np.outer(p, p))
    expected = np.sort(eigenvalues.imag[eigenvalues.imag > 0])
    mixer = make("s4d", state=n, init="legs")
    np.testing.assert_allclose(mixer.a_imag[0], expected, rtol=1e-5)
    np.testing.assert_allclose(eigenvalues.real, -0.5, rtol=1e-6)


@pytest.mark.parametrize("r_min,r_max", [(0.0, 1.0), (0.9, 0.999)])
def test_lru(r_min, r_max):
    """lambda on the ring, |lambda|^2 uniform; gamma = sqrt(1 - |lambda|^2); B and C of the paper's variances."""
    mixer = make("lru", state=2048, r_min=r_min, r_max=r_max, max_phase=0.5)
    radius = np.exp(-np.exp(np.asarray(mixer.nu_log[...], np.float64)))
    phase = np.exp(np.asarray(mixer.theta_log[...], np.float64))
    assert r_min - 1e-3 <= radius.min() and radius.max() <= r_max + 1e-3
    middle = (r_min**2 + r_max**2) / 2
    assert abs((radius**2).mean() - middle) < 0.03 * (r_max**2 - r_min**2)
    assert 0 <= phase.min() and phase.max() <= 0.5
    np.testing.assert_allclose(np.exp(mixer.gamma_log[...]), np.sqrt(1 - radius**2), rtol=2e-3)
    assert abs(np.var(mixer.b[...]) * 2 * WIDTH - 1) < 0.05
    assert abs(np.var(mixer.c[...]) * 2048 - 1) < 0.05


def test_gau():
    """OffsetScale: gamma ~ N(0, 0.02^2), beta = 0."""
    mixer = make("gau")
    assert abs(np.std(mixer.gamma[...]) - 0.02) < 0.003
    assert not np.asarray(mixer.beta[...]).any()


def test_gla():
    """Keys of half the width, values of the whole, a gate that starts near sigmoid(.)^(1/16): slow decay."""
    mixer = make("gla")
    assert mixer.sizes == (4, 8, 16)
    x = jax.random.normal(jax.random.key(0), (1, 512, WIDTH))
    gate = (x @ mixer.w_decay_in[...]) @ mixer.w_decay_out[...].reshape(16, -1)
    decay = np.asarray(jax.nn.sigmoid(gate)) ** (1 / 16)
    assert 0.9 < decay.mean() < 1


def test_residual_projections_shrink_with_depth():
    """Output projections start smaller in deeper models where the paper (or GPT-2) says so."""
    for name, parameter, power in (("attention", "w_o", 0.5), ("mamba", "w_out", 0.5)):
        shallow = np.std(getattr(make(name, depth=1), parameter)[...])
        deep = np.std(getattr(make(name, depth=16), parameter)[...])
        np.testing.assert_allclose(deep / shallow, 16**-power, rtol=1e-4)
