"""Every example runs, by the commands that its docstring gives."""

import ast
import csv
import pathlib
import runpy
import shlex
import sys

import pytest

from common import command
from data import task
from examples import mad
from training.metrics import MetricWriter

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")


def commands(path: pathlib.Path) -> list[list[str]]:
    """The modules and arguments of the lines `python -m MODULE ARGUMENTS` of a docstring."""
    lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    return [shlex.split(line)[2:] for line in lines if line.lstrip().startswith("python -m ")]


def leave_a_record(workdir: pathlib.Path) -> None:
    """What `make train` leaves of its metrics, and the half of a line that a kill may leave."""
    workdir.mkdir(parents=True)
    writer = MetricWriter(workdir)
    for step, loss in ((50, 3.0), (100, 2.0), (150, float("nan"))):
        writer.write(step, "train", {"loss": loss})
        writer.write(step, "valid", {"bits_per_byte": loss})
    writer.close()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')


def leave_a_sweep(workdir: pathlib.Path) -> None:
    """What a sweep of MAD's settings leaves."""
    workdir.mkdir(parents=True)
    names = ["mixer", *(f"task.{key}" for key in mad.KEYS), "optimizer.learning_rate", "status", "valid", "test"]
    settings = {
        "compression": ["None", "None", "None", "None", "None"],
        "memorization": ["512", "None", "None", "None", "None"],
    }
    lines = [
        ["gla", "compression", *settings["compression"], "1e-3", "finished", "0.5", "0.4"],
        ["gla", "compression", *settings["compression"], "1e-4", "finished", "0.4", "0.9"],
        ["gla", "compression", "32", *settings["compression"][1:], "1e-4", "finished", "0.3", "0.2"],
        ["gla", "memorization", *settings["memorization"], "1e-4", "finished", "1.0", "0.7"],
        ["mamba", "memorization", *settings["memorization"], "1e-4", "failed", "", ""],
    ]
    (workdir / "results.csv").write_text("".join(",".join(line) + "\n" for line in [names, *lines]))


def test_mad(tmp_path):
    """Every setting is a task; the score takes what is best on valid, and means over settings and then over tasks."""
    found = mad.cells()
    assert len(found) == 66 and len({tuple(cell.items()) for cell in found}) == 66
    for cell in found:
        task.create("mad", **{key.removeprefix("task."): value for key, value in cell.items() if value is not None})
    leave_a_sweep(tmp_path / "mad")
    with open(tmp_path / "mad" / "results.csv") as file:
        scores = mad.scores(list(csv.DictReader(file)))
    assert scores == {"gla": pytest.approx({"compression": 0.3, "memorization": 0.7, "MAD": 0.5})}
    text = mad.table(scores | {"mamba": {"memorization": 1.0, "MAD": 1.0}})
    shown = [
        ["gla", "mamba"],
        ["compression", "30.0", "-"],
        ["memorization", "70.0", "100.0"],
        ["MAD", "50.0", "100.0"],
    ]
    assert [line.split() for line in text.splitlines()] == shown


def test_mad_of_baselines():
    """What is no axis of the sweep is the same in all of its cells."""
    lines = [
        {"mixer": "gla", "task.kind": kind, "rate": valid, "status": "finished", "valid": valid, "test": test}
        for kind, valid, test in (
            ("compression", "0.5", "0.4"),
            ("compression", "0.4", "0.9"),
            ("memorization", "1", "0.6"),
        )
    ]
    assert mad.scores(lines) == {"gla": pytest.approx({"compression": 0.4, "memorization": 0.6, "MAD": 0.5})}


def test_mad_chooses_nothing_by_the_test_split():
    """Of rates that are equal on valid the first counts, and of seeds their mean: the best of them is a lucky one."""
    lines = [
        {"mixer": "gla", "task.kind": "compression", "rate": rate, "seed": seed, "status": "finished"}
        | {"valid": valid, "test": test}
        for rate, seed, valid, test in (
            ("1", "0", "1.0", "0.7"),
            ("1", "1", "0.8", "0.5"),
            ("2", "0", "0.8", "0.9"),
            ("2", "1", "1.0", "0.9"),
            ("3", "0", "0.9", "0.1"),
        )
    ]
    assert mad.scores(lines) == {"gla": pytest.approx({"compression": 0.6, "MAD": 0.6})}
    chosen = [line | {"chosen": str(line["rate"] == "3")} for line in lines]
    assert mad.scores(chosen) == {"gla": pytest.approx({"compression": 0.1, "MAD": 0.1})}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    """In this process, which spares the start of another, and in an empty directory."""
    monkeypatch.chdir(tmp_path)
    # The tests have prepared JAX and signals in their own way.
    monkeypatch.setattr(command, "start", lambda: None)
    monkeypatch.setattr(command, "run", lambda main: main(sys.argv[1:]))
    leave_a_record(tmp_path / "runs" / "first")
    leave_a_sweep(tmp_path / "runs" / "mad")
    found = commands(path)
    assert f"examples.{path.stem}" in [module for module, *_ in found], "the docstring says how to run it"
    for module, *arguments in found:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.delitem(sys.modules, module, raising=False)
        capsys.readouterr()
        runpy.run_module(module, run_name="__main__")
        assert capsys.readouterr().out.strip()
