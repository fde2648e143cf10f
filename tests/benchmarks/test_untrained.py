"""What follows from papers' equations: the fast recurrence beside the dense one, and the lemma beside an integral."""

import json

import jax
import numpy as np
import pytest

from benchmarks import untrained
from ops import hippo


def test_legs():
    """The O(N) step gives the coefficients of the dense matrices."""
    signals = untrained.white_noise(40, 5, 2, seed=0)
    with jax.enable_x64(True):
        found = untrained.legs(signals, 6)
    for i in range(2):
        np.testing.assert_allclose(found[:, i], hippo.memory("legs", signals[:, i], 6)[-1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", untrained.KINDS)
def test_lemma(kind):
    """With one number and one feature the error is an integral over a Gaussian: by quadrature."""
    x, y = np.array([[0.8]]), np.array([[0.3]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    found = untrained.estimate(kind, x, y, nodes[:, None, None])[:, 0] - np.exp(0.8 * 0.3)
    exact = np.sum(weights * found**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(untrained.lemma(kind, x, y, 1), [exact], rtol=1e-10)
    np.testing.assert_allclose(untrained.lemma(kind, x, y, 4), [exact / 4], rtol=1e-10)


def test_orthogonal_rows():
    """Rows of a block are orthogonal, and have the lengths of Gaussian ones."""
    w = untrained.rows_of_features("orthogonal", np.random.default_rng(0), 200, 7, 4)
    products = w @ w.swapaxes(1, 2)
    assert np.abs(products[:, :4, :4] * (1 - np.eye(4))).max() < 1e-12
    assert np.abs(products[:, 0, 4]).max() > 0.1
    assert abs(np.mean(np.square(w)) - 1) < 0.05


def test_commands(tmp_path, capsys):
    record = tmp_path / "found.json"
    untrained.main(["--what=hippo", "--length=60", "--state=6", "--cycles=2", f"--json={record}"])
    found = json.loads(record.read_text())
    assert len(found["online"]) == 3 and all(a > 0.9 * b for a, b in zip(found["online"], found["least"], strict=True))
    untrained.main(["--what=performer", "--features=8,16", "--size=4", "--draws=500", "--length=16", "--pairs=2"])
    assert "slopes over m" in capsys.readouterr().out
