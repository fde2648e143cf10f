"""What follows from papers' equations: beside dense matrices and integrals."""

import json

import jax
import numpy as np
import pytest

from benchmarks import untrained
from common.errors import UserError
from ops import hippo

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(
    "command, message",
    [
        ("ring --draws=50", "a multiple of 500"),
        ("performer --draws=750", "a multiple of 500"),
        ("ring --length=0", "--length must be at least 2"),
        ("hippo --length=100 --cycles=60", "--cycles must be from 1 to 50"),
        ("ring --image=ring.png", "no picture"),
        ("performer --image=nowhere/picture.png", "there is no folder nowhere"),
    ],
)
def test_what_is_refused(command, message):
    """Before anything is computed; and no number stands for another one."""
    what, *options = command.split()
    with pytest.raises(UserError, match=message):
        untrained.study([f"--what={what}", *options])


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


def test_diagonal(capsys):
    """The errors are those of the dense matrices."""
    options = ["--what=diagonal", "--states=8,16", "--frequencies=3"]
    untrained.main(options)
    table = capsys.readouterr().out
    for size in (8, 16):
        A, B = hippo.transition("legs", size)
        P = np.sqrt(np.arange(size) + 0.5)
        whole, part = (np.linalg.solve(3j * np.eye(size) - M, B)[0] for M in (A, A + np.outer(P, P)))
        error = abs(part / 2 / whole - 1)
        assert f"| {size} | {error:.2e} |" in table


def test_ring(monkeypatch):
    """The energy is the mean of 1 / (1 - |lambda|^2), and one with gamma."""
    monkeypatch.setattr(untrained, "RINGS", ((0.3, 0.8),))
    (row,) = untrained.study(["--what=ring", "--length=400", "--draws=500"])["rows"]
    u = np.linspace(0.3**2, 0.8**2, 10001)
    assert abs(row["law"] - np.mean(1 / (1 - u))) < 1e-3
    for mean, error, expected in zip(row["mean"], row["error"], (row["law"], 1.0), strict=True):
        assert abs(mean - expected) < 6 * error < 0.2


def test_reflections():
    """The product of the reflections is the matrix; a row of products of each group is right."""
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    made = np.eye(4)
    for key in untrained.reflections_of(matrix):
        made = made - 2 * np.outer(key, key @ made)
    np.testing.assert_allclose(made, matrix, atol=1e-12)
    found = untrained.study(["--what=reflections", "--length=50"])
    sizes = {name: (row["elements"], row["steps"], row["right"]) for name, row in found.items()}
    assert sizes == {"S3": (6, 2, 1.0), "S4": (24, 2, 1.0), "A5": (60, 2, 1.0), "S5": (120, 4, 1.0)}
