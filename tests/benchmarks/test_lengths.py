"""The table of costs by length: what is measured, what is left out, and going on with a file."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import lengths, timing
from common.errors import UserError

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
    lengths.main([command[0], "--lengths=8,16,1000000", "--width=8", "--budget=1e-9", f"--json={path}"])
    assert json.loads(path.read_text())["rows"]["linear_attention"] == row
    assert capsys.readouterr().out.rstrip().endswith("| - / - / - / - |")


def test_going_on_with_a_file(tmp_path, monkeypatch):
    """What was only planned is measured; rows of another width are refused, and so is a file of something else."""
    path = tmp_path / "rows.json"
    monkeypatch.setattr(lengths, "settle_process", lambda: None)
    command = ["--mixers=linear_attention", "--lengths=8", "--width=8", f"--json={path}"]
    lengths.main([*command, "--plan"])
    assert "seconds" not in json.loads(path.read_text())["rows"]["linear_attention"]["lengths"]["8"]
    lengths.main(command)
    assert json.loads(path.read_text())["rows"]["linear_attention"]["lengths"]["8"]["seconds"] > 0
    with pytest.raises(UserError, match=r"were measured with --width=8: give that, or another file"):
        lengths.main([*command[:2], "--width=16", command[3]])
    path.write_text('{"runs": []}')
    with pytest.raises(UserError, match="holds no results of this benchmark"):
        lengths.main(command)


def test_rows_of_other_options(tmp_path):
    """Those of `benchmarks.mixers`, whose file has them in a section."""
    path = tmp_path / "mixers.json"
    path.write_text(json.dumps({"options": {"steps": 200, "width": 96}, "rows": {"gla": {"lines": 3}}}))
    assert timing.earlier(path, {"steps": 200, "width": 96}, "options") == {"gla": {"lines": 3}}
    assert timing.earlier(None, {"steps": 1}) == timing.earlier(tmp_path / "none.json", {"steps": 1}) == {}
    with pytest.raises(UserError, match=r"were measured with --steps=200: give that, or another file"):
        timing.earlier(path, {"steps": 100, "width": 96}, "options")
