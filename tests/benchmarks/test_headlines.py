"""The shapes of papers' headlines: what is not a time has to be as the equations say."""

import json

import pytest

from benchmarks import headlines

pytestmark = pytest.mark.thorough


def test_ratios():
    assert headlines.slope({8: 3.0, 16: 12.0, 4: 100.0}) == pytest.approx(2.0)
    assert headlines.over({8: 3.0, 16: 12.0}, {8: 6.0, 16: 1.0}) == "0.50 (at 8) to 12.00 (at 16)"


def test_decoding(tmp_path, capsys):
    """A cache has room for the context, and so twice the bytes at twice the length; a state has the same ones."""
    pytest.importorskip("matplotlib")
    headlines.main(["--tiny", "--what=decode", f"--folder={tmp_path}"])
    (found,) = json.loads((tmp_path / "headlines.json").read_text())["found"].values()
    carries = found["curves"]["kilobytes of the carry"]
    shorter, longer = carries["attention"].values()
    assert longer / shorter == pytest.approx(2, rel=0.01)
    assert all(len(set(carries[name].values())) == 1 for name in ("linear_attention", "mamba"))
    assert "attention" in capsys.readouterr().out and (tmp_path / "decode.png").stat().st_size > 1000


def test_unknown(tmp_path):
    with pytest.raises(ValueError, match="--what"):
        headlines.main(["--what=flush", f"--folder={tmp_path}"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in headlines.HEADLINES if name != "decode"])
def test_tiny(tmp_path, name):
    headlines.main(["--tiny", f"--what={name}", f"--folder={tmp_path}"])
    assert json.loads((tmp_path / "headlines.json").read_text())["found"][name]["ratios"]
