"""The comparison of a finished run with what its configuration expects."""

import json
import types
from pathlib import Path

import pytest

from common.errors import UserError
from evaluation import expect, scoring
from evaluation.loading import configuration, load
from training.config import resolve

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run

SOURCE = "arXiv 1234.56789, table 1"


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """The tests have prepared JAX in their own way."""
    monkeypatch.setattr(expect.command, "start", lambda: None)


@pytest.fixture
def fake(copied, monkeypatch):
    """Makes a finished run with an edited configuration that scores an accuracy of 0.9, without a model."""

    def fake_load(workdir, allow_other_data):
        return types.SimpleNamespace(config=configuration(workdir), step=2, workdir=Path(workdir), other_data=None)

    monkeypatch.setattr(expect, "load", fake_load)
    monkeypatch.setattr(
        scoring, "score", lambda run, split, lengths=(): [(*lengths, 24)[:1] + ({"loss": 0.3, "accuracy": 0.9},)]
    )
    return copied


def compare(workdir, capsys):
    """Exit status and the lines that are printed."""
    code = expect.main([f"--workdir={workdir}"])
    return code, capsys.readouterr().out.splitlines()


def test_a_real_run(trained, capsys):
    """The test split is scored with the best checkpoint; a few steps leave a model near the uniform 8 bits."""
    best = load(trained)
    ((_, scores),) = scoring.score(best, "test")
    capsys.readouterr()
    code, out = compare(trained, capsys)
    assert code in (0, 1) and code == (abs(scores["bits_per_byte"] - 8) > 0.5)
    assert f"found     bits_per_byte {scores['bits_per_byte']:.4f}  (test split, step {best.step}, seed 0)" in out
    assert f"expected  bits_per_byte 8.0000 +- 0.5  ({SOURCE})" in out
    assert out[-1].endswith("(one run of 3)")


@pytest.mark.parametrize(
    "value,tolerance,code", [(0.9, 0.0, 0), (0.91, 0.01, 0), (0.89, 0.01, 0), (0.95, 0.01, 1), (0.85, 0.01, 1)]
)
def test_tolerance(fake, capsys, value, tolerance, code):
    """It has two sides: a run that is much better did something else than the paper."""
    found, out = compare(fake(expect={"metric": "accuracy", "value": value, "tolerance": tolerance}), capsys)
    assert found == code
    assert out[-1].startswith("OUTSIDE" if code else "within")


@pytest.mark.parametrize(
    "sections,message",
    [
        ({"expect": None}, "its configuration has no section 'expect'"),
        ({"train": {"steps": 5}}, "is not finished: its last checkpoint is of step 4 of 5"),
        ({"expect": {"metric": "rmse"}}, "config.expect.metric='rmse' is no score of this task: loss, accuracy"),
        ({"expect": {"metric": "accuracy", "value": None}}, "there is no verified number to compare with"),
        ({"expect": {"tolerance": -1.0}}, "tolerance"),
        ({"expect": {"valeu": 1.0}}, "nobody reads config.expect.valeu; did you mean 'value'"),
        ({"task": {"corpus": "file:/nowhere/text.txt"}}, "/nowhere/text.txt"),
    ],
)
def test_nothing_to_compare(fake, sections, message):
    """One clear message, with which the command ends."""
    with pytest.raises(UserError) as error:
        expect.compare(fake(**sections))
    assert message in str(error.value)


def test_exit_status_of_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["expect", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        expect.command.run(expect.main)
    assert ended.value.code == 1
    assert "is not a run directory" in capsys.readouterr().err


def test_other_data(shorter, capsys):
    """It is refused, and where it is allowed the result says so."""
    with pytest.raises(UserError, match="--allow_other_data"):
        expect.main([f"--workdir={shorter}"])
    expect.main([f"--workdir={shorter}", "--allow_other_data"])
    assert "on other data than the run was trained on" in capsys.readouterr().out


def test_an_incomplete_section(trained):
    raw = json.loads((trained / "config.json").read_text())
    del raw["expect"]["source"]
    with pytest.raises(UserError, match=r"config\.expect\.source is missing"):
        resolve(raw)
    del raw["expect"]
    assert resolve(raw).expect is None
