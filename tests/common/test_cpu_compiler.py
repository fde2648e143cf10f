"""What XLA computes of a product with one number everywhere, which a library of its own gets wrong."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import cpu_compiler
from models.norms import rms_normalize
from ops.linear_attention import linear_attention
from tests.processes import ROOT


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_sum_behind_a_product_with_a_constant(value):
    """One chunk of 64 rows: y = q S + v, normalised."""
    rows, length, size, width = 64, 64, 128, 32
    random = np.random.default_rng(0)
    x, w_q, w_v = (random.standard_normal(shape) for shape in ((rows, length, 16), (16, size), (16, width)))

    @jax.jit
    def run(x, w_q, w_v):
        state = jnp.full((rows, size, width), value)
        y = jnp.einsum("bck,bkv->bcv", x @ w_q, state) + x @ w_v
        return y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True))

    y = (x @ w_q).sum(-1, keepdims=True) * value + x @ w_v
    expected = y / np.sqrt(np.mean(y * y, -1, keepdims=True))
    np.testing.assert_allclose(run(*map(np.float32, (x, w_q, w_v))), expected, rtol=1e-3, atol=1e-4)


def test_linear_attention_of_one_chunk_and_a_norm():
    """The layer in which it was found, Mamba-2's of 64 rows, forwards alone."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((64, 64, 1, size)).astype(np.float32) for size in (128, 128, 32))
    form = lambda form: jax.jit(lambda *x: rms_normalize(linear_attention(*x, implementation=form)[0], 1e-5))(q, k, v)
    np.testing.assert_allclose(form("chunked"), form("reference"), rtol=1e-3, atol=1e-4)


def test_the_flag_is_set_once_and_a_users_own_stays(monkeypatch):
    monkeypatch.setattr(cpu_compiler, "_cpu_was_used", lambda: False)
    for before, after in (
        ("", "--xla_cpu_experimental_ynn_fusion_type="),
        ("--xla_a=1", "--xla_a=1 --xla_cpu_experimental_ynn_fusion_type="),
        ("--xla_cpu_experimental_ynn_fusion_type=x", "--xla_cpu_experimental_ynn_fusion_type=x"),
    ):
        monkeypatch.setenv("XLA_FLAGS", before)
        for _ in range(2):
            cpu_compiler.avoid_wrong_products()
            assert os.environ["XLA_FLAGS"] == after
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu_compiler, "version", lambda _: "0.13.0")
    cpu_compiler.avoid_wrong_products()
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize("late", [True, False])
def test_it_is_said_where_it_comes_too_late(late):
    """In a notebook, say, that has computed something before."""
    lines = ["import jax; jax.numpy.ones(3).block_until_ready()", "import ops"]
    program = "\n".join(lines if late else lines[::-1])
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ("computes some of them wrongly" in ended.stderr) == late
