"""Runs a sweep, and scores its cells."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from common.console import say
from common.files import write_atomically
from evaluation import scoring
from models import accounting
from sweeps import cells, plots, report
from sweeps.cells import RESULT, Request
from sweeps.engines.local import Launcher, Result
from training.metrics import read_metrics


def run(request: Request, launcher: Launcher, command: str) -> bool:
    """Runs what is left of a sweep and writes its report, plots and table.

    Args:
      request: what to run.
      launcher: the engine.
      command: that asked for it, for the report.

    Returns:
      whether all cells are finished.

    Raises:
      UserError: for a request that does not fit, or a directory in which another sweep is at work. Nothing is run then.
    """
    grid = cells.plan(request)
    errors = {cell.name: cell.error for cell in grid if cell.error}
    say(_costs(grid))
    left = [cell for cell in grid if not cell.error and cell.todo()]
    say(f"{len(grid)} cells, {len(left)} to run" + (f", {len(errors)} that cannot be" if errors else ""))
    for name, error in errors.items():
        say(f"{name}: {error}")
    done = 0
    for result in launcher.run(left) if left else ():
        done += result.status == "finished"
        if result.error:
            errors[result.cell.name] = result.error
        say(f"{result.cell.name}: {_describe(result)}  [{done}/{len(left)}, {result.seconds:,.0f} s]")
        report.write(request, grid, errors, command)
    report.write(request, grid, errors, command)
    groups = report.sections(report.rows(grid))
    say(f"{request.workdir / 'report.md'}, results.csv; {plots.save(groups, request.workdir)}")
    missing = sum(cell.result() is None for cell in grid)
    if missing:
        say(f"{missing} of {len(grid)} cells are not finished ({len(errors)} failed): the same command goes on")
    return not missing


def _costs(grid: Sequence[cells.Cell]) -> str:
    """A table of the models, with how far they are from their budgets."""
    rows = {}
    for cell in grid:
        if cell.cost is not None:
            name = ", ".join(f"{key}={value}" for key, value in cell.values.items() if key != "seed") or "model"
            if cell.sized:
                name += f" (width {cell.sized.width}, {report.met(cell.sized).strip('*')})"
            rows[name] = dataclasses.replace(cell.cost, name=name)
    return accounting.table(list(rows.values()))


def _describe(result: Result) -> str:
    found = result.cell.result()
    if found is None:
        return result.status + (f": {result.error}" if result.error else "")
    value = found["test"][str(found["length"])]
    return f"test {found['metric'].replace('_', ' ')} {value:.4f} at step {found['step']}"


def score(workdir: Path, lengths: Sequence[int] = ()) -> None:
    """Scores the test split at the checkpoint of a run that is best on validation, and writes `result.json`.

    Raises:
      UserError: if the directory holds no run. A length that its mixers or its task cannot have gets no score.
      CheckpointError: if no checkpoint has a score to be the best by: the run diverged.
    """
    model = scoring.load(workdir)
    task, spec = model.config.task, model.config.task.spec
    scores = {}
    for length in sorted({spec.length, *lengths}):
        try:
            ((_, found),) = scoring.score(model, "test", [] if length == spec.length else [length])
            scores[str(length)] = found[spec.metric]
        except ValueError as error:
            if length == spec.length:
                raise
            say(f"no score at length {length}: {error}")  # mixers and tasks that have one length only
            scores[str(length)] = None
    valid = {line["step"]: line[spec.metric] for line in read_metrics(workdir) if line["split"] == "valid"}
    result = {
        "task": task.name,
        "metric": spec.metric,
        "higher_is_better": spec.higher_is_better,
        "floors": task.floors("test"),
        "length": spec.length,
        "steps": model.config.train.steps,
        "step": model.step,
        "valid": valid[model.step],
        "test": scores,
    }
    write_atomically(Path(workdir) / RESULT, json.dumps(result, indent=1))
