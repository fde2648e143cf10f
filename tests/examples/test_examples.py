"""Every example runs, by the commands that its docstring gives."""

import ast
import pathlib
import runpy
import shlex
import sys

import pytest

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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    """In this process, which spares the start of another, and in an empty directory."""
    monkeypatch.chdir(tmp_path)
    leave_a_record(tmp_path / "runs" / "first")
    found = commands(path)
    assert f"examples.{path.stem}" in [module for module, *_ in found], "the docstring says how to run it"
    for module, *arguments in found:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        capsys.readouterr()
        runpy.run_module(module, run_name="__main__")
        assert capsys.readouterr().out.strip()
