"""The comparison of a finished run with what its configuration expects."""

import json
import types

import pytest

from configs import lm, published
from evaluation import expect, scoring
from training import loop
from training.config import resolve

SOURCE = "arXiv 1234.56789, table 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("expect")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    config = lm.get_config("mixer=min_gru")
    config.task.update({"corpus": f"file:{folder / 'text.txt'}", "length": 16})
    config.model.update({"width": 8, "depth": 1, "channel_mixer": "none"})
    config.train.update({"steps": 2, "batch_size": 8})
    config.optimizer.update({"name": "adamw", "warmup_steps": 0})
    config.expect = published.expect(8.0, 0.5, SOURCE, metric="bits_per_byte", seeds=3, hours=0.1)
    loop.train(resolve(config), folder / "run")
    return folder / "run"


@pytest.fixture
def fake(run, tmp_path, monkeypatch):
    """Makes a finished run with an edited configuration that scores an accuracy of 0.9, without a model."""

    def make(**sections):
        raw = json.loads((run / "config.json").read_text())
        for name, values in sections.items():
            raw[name] = raw[name] | values if values is not None else None
        raw = {name: values for name, values in raw.items() if values is not None}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        (tmp_path / "checkpoints" / "2").mkdir(parents=True)
        return tmp_path

    load = lambda workdir: types.SimpleNamespace(
        config=resolve(json.loads((workdir / "config.json").read_text())), step=2
    )
    monkeypatch.setattr(scoring, "load", load)
    monkeypatch.setattr(scoring, "score", lambda model, split, lengths: [(16, {"loss": 0.3, "accuracy": 0.9})])
    return make


def status(workdir, capsys):
    """Exit status, and the lines of both outputs."""
    code = expect.main([f"--workdir={workdir}"])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_a_real_run(run, capsys):
    """The test split is scored with the best checkpoint; two steps leave a model near the uniform 8 bits."""
    ((_, scores),) = scoring.score(scoring.load(run), "test", [])
    capsys.readouterr()
    code, out, err = status(run, capsys)
    assert code == 0 and not err
    assert f"found     bits_per_byte {scores['bits_per_byte']:.4f}  (test split, step 2, seed 0)" in out
    assert f"expected  bits_per_byte 8.0000 +- 0.5  ({SOURCE})" in out
    assert out[-1].startswith("within the tolerance") and out[-1].endswith("(one run of 3)")


@pytest.mark.parametrize(
    "value,tolerance,code", [(0.9, 0.0, 0), (0.91, 0.01, 0), (0.89, 0.01, 0), (0.95, 0.01, 1), (0.85, 0.01, 1)]
)
def test_tolerance(fake, capsys, value, tolerance, code):
    """It has two sides: a run that is much better did something else than the paper."""
    found, out, err = status(fake(expect={"metric": "accuracy", "value": value, "tolerance": tolerance}), capsys)
    assert found == code and not err
    assert out[-1].startswith("OUTSIDE" if code else "within")


@pytest.mark.parametrize(
    "sections,message",
    [
        ({"expect": None}, "its configuration has no section 'expect'"),
        ({"train": {"steps": 5}}, "is not finished: its last checkpoint is of step 2 of 5"),
        ({"expect": {"metric": "rmse"}}, "config.expect.metric='rmse' is no score of this task: loss, accuracy"),
        ({"expect": {"metric": "accuracy", "value": None}}, "there is no verified number to compare with"),
        ({"expect": {"tolerance": -1.0}}, "tolerance >= 0"),
        ({"expect": {"valeu": 1.0}}, "nobody reads config.expect.valeu; did you mean 'value'"),
        ({"task": {"corpus": "file:/nowhere/text.txt"}}, "/nowhere/text.txt"),
    ],
)
def test_nothing_to_compare(fake, capsys, sections, message):
    """One clear line and exit status 2."""
    code, _, err = status(fake(**sections), capsys)
    assert code == 2 and len(err) == 1
    assert err[0].startswith("error: ") and message in err[0]


def test_not_a_run(tmp_path, capsys):
    code, _, err = status(tmp_path, capsys)
    assert code == 2 and "is not a run directory" in err[0]


def test_an_incomplete_section(run):
    raw = json.loads((run / "config.json").read_text())
    del raw["expect"]["source"]
    with pytest.raises(ValueError, match=r"config\.expect\.source is missing"):
        resolve(raw)
    del raw["expect"]
    assert resolve(raw).expect is None
