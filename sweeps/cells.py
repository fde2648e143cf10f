"""The cells of a sweep: a grid of runs that differ in what is asked for and in nothing else.

A sweep's directory holds one run directory for each cell of the grid, named by its values, and in it, beside what a run
leaves, `log.txt` and `result.json` (the test split at the checkpoint that is best on validation). A cell is its commands: what
has to be run for it is read from its directory, so a sweep goes on where it stopped, on whatever engine.
"""

import dataclasses
import itertools
import json
import re
import shlex
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from common import command
from common.errors import UserError
from common.files import read_json
from data.task import Spec
from models.accounting import Summary
from models.sequence_model import ModelConfig
from sweeps import sizing
from sweeps.sizing import MEASURES, Sized
from training import config, loop
from training.metrics import read_metrics
from training.run_directory import RunDirectory

ROOT = Path(__file__).parent.parent
RESULT, LOG = "result.json", "log.txt"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a sweep is asked for.

    Attributes:
      config: FILE or FILE:ARGUMENT of the experiment.
      axes: values by key; their product is the grid. A key with a dot, and `seed`, is one of the configuration; any other
        belongs into the experiment file's argument.
      workdir: directory of the sweep.
      settings: one value by key, for all cells. Hyperparameters of a mixer go to the cells that have the mixer.
      match: one of `MEASURES`, to size all mixers to one budget; None to take the configuration's width.
      budget: of the match; None for that of the first mixer of the axis `mixer`, all other values being the same.
      lengths: that the test split is scored at beside the one of training.
    """

    config: str
    axes: Mapping[str, Sequence[str]]
    workdir: Path
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    match: str | None = None
    budget: float | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self):
        if clash := sorted(set(self.axes) & set(self.settings)):
            raise UserError(f"{clash[0]} is both an axis and set: choose one")
        for key, values in self.axes.items():
            if len(set(values)) < len(values) or not all(values):
                raise UserError(f"the values of {key} must be different and not empty, got {','.join(values)!r}")
        if not self.axes:
            raise UserError("a sweep needs an axis, such as seed=0,1,2")
        if self.match not in (None, *MEASURES):
            raise UserError(f"match must be one of {', '.join(MEASURES)}, got {self.match!r}")
        if self.budget is not None and self.match is None:
            raise UserError(f"a budget needs a measure: add --match={'|'.join(MEASURES)}")
        if self.match and self.budget is None and "mixer" not in self.axes:
            raise UserError(
                "match needs something to match: an axis of mixers (mixer=A,B; the first is the reference) or a budget"
            )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      values: of the axes.
      arguments: of `train.py`, but for the directory.
      workdir: its run directory.
      config: the configuration, as the run's `config.json` will hold it.
      lengths: that the test split is scored at beside the one of training.
      cost: what the model costs; None if it cannot be built.
      sized: how the model was sized, if it was.
      error: why it cannot be run; None if it can.
    """

    values: Mapping[str, str]
    arguments: tuple[str, ...]
    workdir: Path
    config: Mapping[str, Any]
    lengths: tuple[int, ...] = ()
    cost: Summary | None = None
    sized: Sized | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.workdir.name

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.config["train"]["steps"]

    def trained(self) -> bool:
        """Whether the run has its last step, evaluation and checkpoint included."""
        run = RunDirectory(self.workdir)
        if read_json(run.config) != self.config or not (run.checkpoints / str(self.steps)).is_dir():
            return False
        return any(line["split"] == "valid" and line["step"] == self.steps for line in read_metrics(self.workdir))

    def result(self) -> dict[str, Any] | None:
        """What `score` has found for the finished run; None before."""
        found = read_json(self.workdir / RESULT)
        complete = found is not None and found["steps"] == self.steps and self.trained()
        return found if complete and {str(n) for n in self.lengths} <= set(found["test"]) else None

    def todo(self) -> list[list[str]]:
        """The commands that are left to be run, in order; each can be given again after it was interrupted."""
        if self.result() is not None:
            return []
        train = [sys.executable, str(ROOT / "train.py"), *self.arguments, f"--workdir={self.workdir}"]
        score = [sys.executable, str(ROOT / "sweep.py"), f"--score={self.workdir}"]
        if self.lengths:
            score.append(f"--lengths={','.join(map(str, self.lengths))}")
        return [score] if self.trained() else [train, score]


def plan(request: Request) -> list[Cell]:
    """The cells of a sweep, sized and with their costs. Nothing is written.

    Raises:
      UserError: for a key or value that the experiment file or its configuration refuses. What goes wrong when a cell's
        task and model are described is the cell's `error`.
    """
    combinations = [dict(zip(request.axes, values)) for values in itertools.product(*request.axes.values())]
    arguments = [_arguments(request, values) for values in combinations]
    for key in request.settings:
        if "." in key and not any(f"--config.{key}=" in argument for row in arguments for argument in row):
            raise UserError(f"no cell has the mixer that {key} is set for")
    cells, described = [], {}
    for values, row in zip(combinations, arguments):
        parse(row)  # what is misspelt is found before anything is built
        model = json.dumps({key: value for key, value in values.items() if key != "seed"})
        if model not in described:
            described[model] = _describe(request, values)
        cost, sized, error = described[model]
        raw = _raw(row)
        if sized is not None and sized.width != raw["model"]["width"]:
            row = _arguments(request, values, sized.width)
            raw = _raw(row)
        workdir = request.workdir / directory(values)
        cells.append(Cell(values, row, workdir, raw, request.lengths, cost, sized, error))
    return cells


def parse(arguments: Sequence[str]) -> ConfigDict:
    """The configuration that `train.py` reads from these arguments.

    Raises:
      UserError: for what the experiment file or ml_collections refuses.
    """
    values = absl_flags.FlagValues()
    line = ["train.py", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
    try:
        values(line)
    except (absl_flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{command.flag_error(error)} (in {shlex.join(arguments)})") from error
    return holder.value


def _describe(request: Request, values: Mapping[str, str]) -> tuple[Summary | None, Sized | None, str | None]:
    """Cost, size and error of the cells with these values (whatever their seed)."""
    try:
        model, spec = _model(_arguments(request, values))
        if request.match is None:
            return sizing.cost(model, spec), None, None
        budget, reference = request.budget, None
        if budget is None:
            reference = {**values, "mixer": request.axes["mixer"][0]}
            budget = sizing.amount(*_model(_arguments(request, reference)), request.match)
            if budget is None:
                raise UserError(f"mixer={reference['mixer']}, the reference, has no carry on this task to match")
        if values == reference:
            sized = Sized(model.width, budget, budget)
        else:
            sized = sizing.match(model, spec, request.match, budget)
        return sizing.cost(*_model(_arguments(request, values, sized.width))), sized, None
    except Exception as error:  # of one cell's task or model; the others go on
        return None, None, f"{type(error).__name__}: {error}".splitlines()[0]


def _model(arguments: Sequence[str]) -> tuple[ModelConfig, Spec]:
    resolved = config.resolve(parse(arguments))
    loop.check_capabilities(resolved)
    return resolved.model, resolved.task.spec


def _raw(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration as a run's `config.json` holds it."""
    return json.loads(json.dumps(parse(arguments).to_dict()))


def _arguments(request: Request, values: Mapping[str, str], width: int | None = None) -> tuple[str, ...]:
    """The arguments of `train.py` for one cell, but for the directory."""
    file, _, argument = request.config.partition(":")
    choice = dict(item.partition("=")[::2] for item in filter(None, argument.split(",")))
    settings = {**request.settings, **values}
    if width is not None:
        settings["model.width"] = str(width)
    choice |= {key: value for key, value in settings.items() if not _is_flag(key)}
    source = f"--config={file}" + (":" + ",".join(f"{key}={value}" for key, value in choice.items()) if choice else "")
    flags = {key: f"--config.{key}={value}" for key, value in settings.items() if _is_flag(key)}
    # Hyperparameters of a mixer are set for the cells that have it. An axis of them must fit all cells.
    owners = {key: key.split(".")[2] for key in request.settings if key.startswith("model.mixer.")}
    if owners:
        pattern = parse([source, *(flag for key, flag in flags.items() if key not in owners)]).model.pattern
        flags = {key: flag for key, flag in flags.items() if owners.get(key, pattern[0]) in pattern}
    return source, *flags.values()


def _is_flag(key: str) -> bool:
    return key == "seed" or "." in key


def directory(values: Mapping[str, str]) -> str:
    """The name of a cell's directory."""
    text = ",".join(f"{key}={value}" for key, value in values.items())
    name = re.sub(r"[^\w.+=,-]", "_", text)[:150]
    return name if name == text else f"{name}-{zlib.crc32(text.encode()):08x}"
