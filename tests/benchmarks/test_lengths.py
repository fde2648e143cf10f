"""The table of costs by length: what is measured, what is left out, and going on with a file."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import lengths

pytestmark = pytest.mark.thorough


def test_equations_are_counted_inside_of_loops():
    """Those of a loop's body once."""

    def run(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) + 1, None), x, length=7)[0] * 2

    assert lengths.count(jax.make_jaxpr(run)(1.0).jaxpr) == 4  # the loop, sin, +, and * behind it


def test_table_and_plot(tmp_path, monkeypatch, capsys):
    """A mixer is measured once; a length that is not expected to fit the budget is left out; the plot is drawn."""
    path, png = tmp_path / "rows.json", tmp_path / "rows.png"
    monkeypatch.setattr(lengths, "settle_process", lambda: None)
    command = ["--mixers=linear_attention", "--lengths=8,16", "--width=8", f"--json={path}", f"--png={png}"]
    lengths.main(command)
    row = json.loads(path.read_text())["rows"]["linear_attention"]
    assert set(row["lengths"]) == {"8", "16"} and all(cell["seconds"] > 0 for cell in row["lengths"].values())
    # At least the inputs of the four maps are kept, in float32.
    assert row["lengths"]["16"]["residual bytes"] >= 16 * 8 * 4 and png.stat().st_size > 1000
    assert row["lengths"]["16"]["moved bytes"] >= 2 * row["lengths"]["16"]["residual bytes"]  # written and read
    monkeypatch.setattr(lengths, "program", None)  # what is in the file is not measured again
    lengths.main([*command[:1], "--lengths=8,16,1000000", "--budget=1e-9", f"--json={path}"])
    assert json.loads(path.read_text())["rows"]["linear_attention"] == row
    assert capsys.readouterr().out.rstrip().endswith("| - / - / - / - |")
