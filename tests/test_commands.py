"""What the pages and the docstrings tell to type is understood: programs, their options, keys of configurations, and values.

Every command is given to its program, which goes on until it has read all of it and not further.
"""

import argparse
import ast
import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import sys
import types

import pytest

import eval as evaluation_entry
import sweep as sweep_entry
import train as train_entry
from common import command
from evaluation import loading, sampling
from sweeps import cells, engine, ladder, sweep
from training import command_line, initial, run_directory

ROOT = pathlib.Path(__file__).parents[1]
ENTRIES = {"train.py": train_entry, "eval.py": evaluation_entry, "sweep.py": sweep_entry}
ROOMS = sorted(path for path in ROOT.iterdir() if path.is_dir() and re.fullmatch(r"[a-z]+", path.name))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS if room.name != "tests" for path in room.rglob("*.py"))]

# In a sentence a command ends with the code, which may go over lines; elsewhere with the line, unless that is continued.
COMMAND = re.compile(
    r"`python (?P<m>-m )?(?P<name>[\w./]+)(?P<rest>[^`]*)`|"
    r"(?<!`)\bpython (?P<m2>-m )?(?P<name2>[\w./]+)(?P<rest2>(?:\\\n|[^\n`])*)"
)
OF_OTHERS = ("venv", "pip", "pytest", "examples.NAME")


class Understood(BaseException):
    """A program has read its command line."""


def named(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: pathlib.Path) -> str:
    if page.suffix == ".py":
        return ast.get_docstring(ast.parse(page.read_text())) or ""
    return "" if page.name == "CHANGELOG.md" else page.read_text()  # which names what is gone, too


def commands(page: pathlib.Path) -> list[tuple[str, list[str]]]:
    """The programs of this repository that a page runs, as it names them, and the arguments."""
    found = []
    for match in COMMAND.finditer(text_of(page)):
        module, name, rest = (match[key] or match[f"{key}2"] for key in ("m", "name", "rest"))
        name = name.rstrip(".")
        if (name in OF_OTHERS) if module else not name.endswith(".py"):
            continue
        # What is said of a command stands behind it, after a "#" or two spaces.
        line = re.sub(r"\s*\\?\n\s*", " ", rest or "").rstrip().partition("  ")[0]
        if line.count('"') % 2:  # it is itself in quotes
            line = line[: line.rindex('"')]
        found.append((name, shlex.split(re.sub(r"<\w+>", "gla", line), comments=True)))
    return found


COMMANDS = {page: found for page in sorted([*PAGES, *FILES]) if (found := commands(page))}


def stop(*_, **__):
    raise Understood


@pytest.fixture
def until_read(monkeypatch):
    """Programs stop where their command line has been read, and with it the configuration that it chooses."""
    monkeypatch.chdir(ROOT)
    parse_keys = command_line.parse
    monkeypatch.setattr(command_line, "parse", lambda *given: stop(parse_keys(*given)))
    monkeypatch.setattr(command, "start", lambda *_, **__: None)
    monkeypatch.setattr(initial, "find", lambda *_: None)
    for name in ("load", "load_hf", "configuration"):
        monkeypatch.setattr(loading, name, stop)
    monkeypatch.setattr(sampling, "read_prompts", lambda path: ["a"])

    def plan(asked, *_, **__):
        with monkeypatch.context() as patch:
            patch.setattr(command_line, "parse", parse_keys)
            stop(cells.plan(asked))

    # The cells of a sweep are planned, but neither their data nor their models are made.
    monkeypatch.setattr(cells, "_described", lambda request, values, raw, costs: {"config": raw})
    monkeypatch.setattr(ladder, "climb", lambda asked, budgets: asked)
    monkeypatch.setattr(sweep, "run", plan)
    monkeypatch.setattr(run_directory, "read_config", lambda workdir: {"task": {}})  # there is no run to ask
    for name in ("status", "there"):
        monkeypatch.setattr(sweep, name, stop)
    monkeypatch.setattr(cells, "load", stop)
    exists = engine.find
    monkeypatch.setattr(engine, "find", lambda name: exists(name) and (lambda *_: types.SimpleNamespace(lasting=True)))


def run_entry(name: str, arguments: list[str]) -> None:
    if name == "train.py" and not any(argument.startswith("--workdir") for argument in arguments):
        arguments = ["--workdir=runs/any", *arguments]  # tables leave it out
    ENTRIES[name].main(arguments)


def run_module(name: str, arguments: list[str]) -> None:
    """As `python -m name` does, until its arguments are read."""
    parse = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: stop(parse(*given)))
        patch.setattr(command, "run", lambda main: main(arguments))
        patch.setattr(os, "execv", stop)  # by which benchmarks begin anew on one core
        patch.setattr(sys, "argv", [name, *arguments])
        patch.delitem(sys.modules, name, raising=False)
        runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("page", COMMANDS, ids=named)
def test_commands_are_understood(page, until_read):
    for name, arguments in COMMANDS[page]:
        said = f"{named(page)}: python {name} {' '.join(arguments)}"
        assert name in ENTRIES or importlib.util.find_spec(name), f"{said}: there is no such program"
        if not arguments:  # it is only named
            continue
        try:
            (run_entry if name in ENTRIES else run_module)(name, arguments)
        except Understood:
            continue
        except SystemExit as error:
            assert not error.code and "--help" in arguments, said
        except Exception as error:
            pytest.fail(f"{said}: {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{said}: it went on behind its command line")


def test_commands_are_found():
    """The commands are really read: an empty list would pass the test above."""
    programs = {name for found in COMMANDS.values() for name, _ in found}
    assert {*ENTRIES, "benchmarks.mixers", "evaluation.expect", "data.ngram"} <= programs
    pages = {named(page) for page in COMMANDS}
    assert {"README.md", "docs/sweeps.md", "train.py", "configs/papers/s5_lra.py", "benchmarks/lengths.py"} <= pages


PROGRAMS = [path for path in sorted(FILES) if '__name__ == "__main__"' in path.read_text()]
ALONE = ("examples/read_metrics.py",)  # which has nothing but Python's own library


@pytest.mark.parametrize("path", PROGRAMS, ids=named)
def test_programs_end_as_the_pages_say(path):
    """Through `command.run`, with its exit codes: what a user can mend is one message, and a signal is no error."""
    last = ast.parse(path.read_text()).body[-1]
    assert named(path) in ALONE or ast.unparse(last.body[-1]).startswith(("command.run(", "marks.run("))
