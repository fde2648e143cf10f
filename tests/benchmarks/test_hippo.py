"""The numbers of the HiPPO demonstration, and its picture."""

import json

import numpy as np
import pytest

from benchmarks import hippo as demonstration
from ops import hippo


@pytest.mark.thorough
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_polynomials(degree):
    """LegS with more coefficients than the degree holds a polynomial: what is left falls as the square of the sampling's step."""
    errors = []
    for length in (50, 400):
        signal = ((np.arange(length) + 0.5) / length - 0.3) ** degree
        c = hippo.memory("legs", signal, 6, method="zoh")[-1]
        errors.append(demonstration.error("legs", signal, c, length, window=100))
    assert errors[1] < max(errors[0] / 20, 1e-12), errors
    assert errors[1] < 1e-4


def test_errors_fall():
    """More coefficients, smaller errors, under every measure; the sampled table says which is which."""
    signal = demonstration.noise(240, 8, seed=0)
    rows, _ = demonstration.table(signal, (4, 16), (240,), window=60, method="zoh")
    errors = {(row["measure"], row["state"]): row["error"] for row in rows}
    assert set(errors) == {(measure, size) for measure in hippo.MEASURES for size in (4, 16)}
    for measure in hippo.MEASURES:
        assert errors[measure, 16] < 0.6 * errors[measure, 4], measure
    assert errors["legs", 16] < 0.02 and errors["legt", 16] < 0.02


def test_command(tmp_path, capsys, monkeypatch):
    """It prints a table, writes the same as JSON, and draws where matplotlib is."""
    monkeypatch.setattr(demonstration, "SIZES", (4, 8))
    pytest.importorskip("matplotlib")
    image, record = tmp_path / "hippo.png", tmp_path / "hippo.json"
    demonstration.main(["--length=60", "--window=20", "--state=8", f"--image={image}", f"--json={record}"])
    rows = json.loads(record.read_text())["rows"]
    assert len(rows) == 4 * 2 * 3
    assert f"{rows[0]['error']:.3%}" in capsys.readouterr().out
    assert image.read_bytes().startswith(b"\x89PNG")
