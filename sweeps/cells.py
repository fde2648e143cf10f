"""The cells of a sweep: a grid of runs that differ in what is asked for and in nothing else.

A sweep's directory holds one run directory for each cell of the grid, named by its values, and in it, beside what a run
leaves, `log.txt`, `result.json` (the test split at the checkpoint that is best on validation) and `job/` (`sweeps.jobs`). What
is left of a cell is read from its directory, so a sweep goes on where it stopped, on whatever engine.
"""

import dataclasses
import functools
import json
import re
import sys
import traceback
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import modified, read_json, write_atomically
from evaluation import settings
from models.accounting import Summary
from models.config import ModelConfig
from sweeps import failures, jobs, sizing
from sweeps.request import Request, is_flag
from sweeps.sizing import Sized
from training import command_line, config, loop, run_directory, setup
from training.metrics import read_metrics
from training.run_directory import RESUMABLE, RunDirectory, recorded_data

RESULT, LOG = "result.json", "log.txt"
CELLS = "*/job/cell.json"  # of a sweep's directory
# What a run may be resumed with other values of, but changes what it finds: the same sweep must have the same.
DECISIVE = ("mesh", "train.steps", "train.implementation", "train.eval_every", "train.eval_batches")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      values: of the axes.
      arguments: of `train.py`, but for the directory.
      workdir: its run directory.
      config: the configuration, as the run's `config.json` will hold it.
      data: the fingerprint of its data as it is now; None where the task cannot be built.
      metric: that its task is judged by; None where the task cannot be built.
      lengths: that the test split is scored at beside the one of training.
      score: settings of the task that the test split is scored under, too, as of `sweeps.request.Request`.
      allow_other_data: whether to go on with the run if its data has changed.
      cost: what the model costs; None if it cannot be built.
      sized: how the model was sized, if it was.
      error: why it cannot be run, in one line; None if it can.
      hosts: that run it together.
      cwd: where relative paths in the arguments begin; None for the project's own directory, wherever that is.
    """

    values: Mapping[str, str]
    arguments: tuple[str, ...]
    workdir: Path
    config: Mapping[str, Any]
    data: str | None = None
    metric: str | None = None
    lengths: tuple[int, ...] = ()
    score: tuple[str, ...] = ()
    allow_other_data: bool = False
    cost: Summary | None = None
    sized: Sized | None = None
    error: str | None = None
    hosts: int = 1
    cwd: str | None = None

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.workdir.name

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.config["train"]["steps"]

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """By key, what the run in its directory has been asked for and what the cell asks for, where these differ in what
        decides the numbers. Empty without a run."""
        if not RunDirectory(self.workdir).config.exists():
            return {}
        recorded = run_directory.read_config(self.workdir)
        old, new = config.flatten(config.complete(recorded, self.config)), config.flatten(self.config)
        different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        return {key: (old.get(key), new.get(key)) for key in different if _is_decisive(key)}

    def ended(self) -> bool:
        """Whether the run has all its steps, with its last evaluation and its last checkpoint."""
        run = RunDirectory(self.workdir)
        if (
            self.error
            or not run.config.exists()
            or self.differences()
            or self.steps not in run_directory.saved_steps(run.checkpoints)
        ):
            return False
        return any(line["split"] == "valid" and line["step"] == self.steps for line in read_metrics(self.workdir))

    def diverged(self) -> str | None:
        """Why the run has not learned: it has all its steps without, or was stopped because it was lost. None if it has, or has
        not ended."""
        if self.ended():
            return loop.diverged(self.workdir, self.steps, self.metric)
        last = jobs.attempts(self.workdir)[-1:]
        stopped = last and last[0].status == "diverged" and not self.differences()
        return last[0].error if stopped else None

    def result(self) -> dict[str, Any] | None:
        """What `sweeps.result.write` has found for the run that has ended well; None before."""
        found = read_json(self.workdir / RESULT)
        if not isinstance(found, dict) or not {"steps", "valid", "test", "length"} <= found.keys():
            return None
        if found["steps"] != self.steps or not {str(n) for n in self.lengths} <= set(found["test"]):
            return None
        if found.get("asked", []) != list(self.score):
            return None
        return found if self.ended() and self.diverged() is None else None

    def todo(self) -> tuple[str, ...]:
        """What is left, in order: "train", "score"."""
        if self.result() is not None or self.diverged() is not None:
            return ()
        return ("score",) if self.ended() else ("train", "score")

    def save(self) -> None:
        """Writes what a process needs to run it, where it finds it: `job/cell.json` in its directory."""
        kept = {key: getattr(self, key) for key in SAVED}
        write_atomically(jobs.folder(self.workdir) / "cell.json", json.dumps(kept, indent=1))


SAVED = (
    "values",
    "arguments",
    "config",
    "data",
    "metric",
    "lengths",
    "score",
    "allow_other_data",
    "error",
    "hosts",
    "cwd",
)


def load(workdir: str | Path) -> Cell:
    """The cell that a directory holds, wherever that is mounted.

    Raises:
      UserError: if it holds none.
    """
    workdir = run_directory.locate(workdir)
    kept = read_json(jobs.folder(workdir) / "cell.json")
    if kept is None:
        raise UserError(
            f"{workdir} is no cell of a sweep: it has no job/cell.json that can be read. If it was one, give the command of its "
            "sweep again, which writes it anew"
        )
    try:
        kept |= {key: tuple(kept.get(key, ())) for key in ("arguments", "lengths", "score")}
        return Cell(workdir=workdir, **kept)
    except (AttributeError, TypeError):
        raise UserError(
            f"{workdir}/job/cell.json is none of this version of the program: give the command of its sweep again, which "
            "writes it anew"
        ) from None


def here(sweep: Path) -> list[Cell]:
    """The cells that the directory of a sweep holds, in the order of its grid."""
    found = sorted(sweep.glob(CELLS), key=lambda path: (modified(path), path))
    return [load(path.parent.parent) for path in found]


def _is_decisive(key: str) -> bool:
    """Whether a key of the configuration changes what a run finds. (Where the data lies does not: data has its fingerprint.)"""

    def below(names: Sequence[str]) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in names)

    return below(DECISIVE) or not below(RESUMABLE)


def plan(request: Request, costs: sizing.Costs | None = None) -> list[Cell]:
    """The cells of a sweep, sized and with their costs. Nothing is written.

    What goes wrong when a cell's task and model are described is the cell's `error`, and the other cells go on; a traceback
    is printed unless it is a `UserError`.

    Args:
      request: the sweep.
      costs: what was found of other cells before; by default, nothing.

    Raises:
      UserError: for a key or value that the experiment file or its configuration refuses.
    """
    combinations = request.combinations()
    arguments = [_arguments(request, values) for values in combinations]
    for key in request.settings:
        if "." in key and not any(f"--config.{key}=" in argument for row in arguments for argument in row):
            raise UserError(f"no cell has the mixer that {key} is set for")
    asked = [_raw(row) for row in arguments]  # what is misspelt is found before anything is built
    distinct = {json.dumps(raw["task"], sort_keys=True): raw["task"] for raw in asked}
    settings.check_some(request.score, list(distinct.values()), "--score")
    cells, described, costs = [], {}, sizing.Costs() if costs is None else costs
    for values, row, raw in zip(combinations, arguments, asked):
        key = json.dumps({key: value for key, value in values.items() if key != "seed"})
        try:
            config.check_seed(raw["seed"])
            if key not in described:
                described[key] = _described(request, values, raw, costs)
            common = described[key]
        except UserError as error:  # of this seed alone
            common = {"config": raw, "error": str(error)}
        if "sized" in common and common["sized"].width != raw["model"]["width"]:
            row = _arguments(request, values, common["sized"].width)
        cells.append(
            Cell(
                values=values,
                arguments=row,
                workdir=request.workdir / directory(values),
                lengths=request.lengths,
                score=request.score,
                allow_other_data=request.allow_other_data,
                hosts=request.hosts,
                cwd=None if Path.cwd() == command_line.ROOT else str(Path.cwd()),
                **common | {"config": {**common["config"], "seed": raw["seed"]}},
            )
        )
    _check_different(cells)
    return cells


def _check_different(cells: Sequence[Cell]) -> None:
    """Raises a UserError where two cells are one run, which the report would take for two: 0.001 and 1e-3, seeds 0 and 00."""
    first: dict[str, Cell] = {}
    for cell in cells:
        same = first.setdefault(json.dumps(cell.config, sort_keys=True), cell)
        if same is not cell and not cell.error:
            raise UserError(f"{same.name} and {cell.name} have the same configuration: leave one of them out")


def check_directories(cells: Sequence[Cell]) -> None:
    """Compares the cells with the runs that are in their directories.

    Raises:
      UserError: if one is a run of another configuration, or (without `allow_other_data`) one of other data.
    """
    changed = [(cell, different) for cell in cells if not cell.error and (different := cell.differences())]
    if changed:
        cell, different = changed[0]
        values = [f"{key}={old} (it is now {new})" for key, (old, new) in different.items()]
        others = f", and {len(changed) - 1} more cells differ likewise" if len(changed) > 1 else ""
        raise UserError(
            f"{cell.workdir} holds a run with {', '.join(values)}{others}: a sweep keeps its configuration. Give the changed "
            "sweep a --workdir of its own, or these keys their old values"
        )
    for cell in cells:
        own = recorded_data(cell.workdir)
        if cell.data is not None and own not in (None, cell.data) and not cell.allow_other_data:
            raise UserError(
                f"{cell.workdir} was run on other data (fingerprint {own[:12]}) than is here now ({cell.data[:12]}): give the "
                "data back, give the sweep a --workdir of its own, or go on knowingly with --allow_other_data"
            )


def _described(
    request: Request, values: Mapping[str, str], raw: Mapping[str, Any], costs: sizing.Costs
) -> dict[str, Any]:
    """The fields that the cells with these values, whatever their seed, have in common."""
    try:
        resolved, sized = built(request, values, costs)
        found = {
            "config": resolved.raw,
            "data": resolved.task.fingerprint(),
            "metric": resolved.task.spec.metric.name,
            "cost": costs.of(resolved.model, resolved.task.spec),
        }
        return found if sized is None else found | {"sized": sized}
    except UserError as error:
        return {"config": raw, "error": str(error)}
    except Exception:  # a fault of a mixer or task under development must not keep the other cells from running
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        return {"config": raw, "error": failures.reason(text)}


def built(request: Request, values: Mapping[str, str], costs: sizing.Costs) -> tuple[config.Config, Sized | None]:
    """The configuration of the cells with these values, at the width that a match asks for, and how it was sized; None without
    a match. Raises a UserError for a model that cannot be built."""
    resolved = resolve(request, values)
    sized = None if request.match is None else _sized(request, values, resolved, costs)
    if sized is not None and sized.width != resolved.model.width:
        resolved = resolve(request, values, sized.width)
    return resolved, sized


def _sized(request: Request, values: Mapping[str, str], resolved: config.Config, costs: sizing.Costs) -> Sized:
    """The width at which the model of these values has the budget, or what the first mixer has."""
    model, spec = _as_asked(resolved, _raw(_arguments(request, values))), resolved.task.spec
    if request.budget is not None:
        return sizing.match(costs, model, spec, request.match, request.budget)
    reference = {**values, "mixer": request.first_mixer}
    try:
        budget = costs.once(json.dumps(reference), lambda: _amount(request, reference, costs))
    except UserError as error:
        raise UserError(f"mixer={reference['mixer']}, the reference, cannot be built: {error}") from error
    if budget is None:
        raise UserError(f"mixer={reference['mixer']}, the reference, has no carry on this task to match")
    if values == reference:
        return Sized(model.width, budget, budget)
    return sizing.match(costs, model, spec, request.match, budget)


def _amount(request: Request, values: Mapping[str, str], costs: sizing.Costs) -> float | None:
    """What the model of these values has of what is matched."""
    resolved = resolve(request, values)
    return costs.amount(resolved.model, resolved.task.spec, request.match)


def _as_asked(resolved: config.Config, raw: Mapping[str, Any]) -> ModelConfig:
    """The model without what follows from its width, and is another at another width."""
    from_task = (*config.LEFT_TO_TASK, "loss")
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in raw["model"].items()
        if value is not None or key not in from_task
    }
    return dataclasses.replace(
        resolved.model, **given | {key: getattr(resolved.model, key) for key in ("prefix", "pattern", "suffix")}
    )


def resolve(request: Request, values: Mapping[str, str], width: int | None = None) -> config.Config:
    """The configuration of a cell, its task built."""
    resolved = config.resolve(command_line.parse(_arguments(request, values, width)))
    setup.check_capabilities(resolved)
    return resolved


def accepted(request: Request, values: Mapping[str, str]) -> bool:
    """Whether a cell could have these values, as far as one sees without data."""
    return _accepted(_arguments(request, values))


@functools.lru_cache(maxsize=256)  # a report is written after every cell
def _accepted(arguments: tuple[str, ...]) -> bool:
    try:
        config.resolve(command_line.parse(arguments), with_data=False)
    except UserError:
        return False
    return True


def _raw(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration that these arguments of `train.py` ask for, as JSON holds it; null is what it leaves to be derived."""
    return json.loads(json.dumps(command_line.parse(arguments).to_dict()))


def _arguments(request: Request, values: Mapping[str, str], width: int | None = None) -> tuple[str, ...]:
    """The arguments of `train.py` for one cell, but for the directory."""
    file, _, argument = request.config.partition(":")
    choice = dict(item.partition("=")[::2] for item in filter(None, argument.split(",")))
    settings = {**request.settings, **values}
    if width is not None:
        settings["model.width"] = str(width)
    choice |= {key: value for key, value in settings.items() if not is_flag(key)}
    source = f"--config={file}" + (":" + ",".join(f"{key}={value}" for key, value in choice.items()) if choice else "")
    flags = {key: f"--config.{key}={value}" for key, value in settings.items() if is_flag(key)}
    # Hyperparameters of a mixer are set for the cells that have it. An axis of them must fit all cells.
    owners = {key: key.split(".")[2] for key in request.settings if key.startswith("model.mixer.")}
    if owners:
        others = (flag for key, flag in flags.items() if key not in owners)
        there = command_line.parse([source, *others]).model.mixer
        flags = {key: flag for key, flag in flags.items() if key not in owners or owners[key] in there}
    if request.base_width is not None:
        grown = sizing.heads(command_line.parse([source, *flags.values()]).model, request.base_width)
        flags |= {key: f"--config.{key}={count}" for key, count in grown.items()}
    return source, *flags.values()


def directory(values: Mapping[str, str]) -> str:
    """The name of a cell's directory."""
    text = ",".join(f"{key}={value}" for key, value in values.items())
    name = re.sub(r"[^\w.+=,-]", "_", text).encode()[:150].decode(errors="ignore")  # file systems count bytes
    return name if name == text else f"{name}-{zlib.crc32(text.encode()):08x}"
