"""Runs a sweep: what is left of its cells, then the report, the table and the plots of all of them."""

import dataclasses
import shlex
import tempfile
from collections.abc import Sequence

from common.command import STOPPED
from common.console import say
from data.metrics import Display
from models import accounting
from sweeps import cells, plots, report
from sweeps.cells import Cell
from sweeps.engine import Engine, Outcome
from sweeps.request import Request
from training.run_directory import writing


def run(request: Request, chosen: Engine, arguments: Sequence[str]) -> int:
    """Runs what is left of a sweep and writes its report, plots and table.

    Args:
      request: what to run.
      chosen: the engine.
      arguments: of `sweep.py` that asked for it, for the report.

    Returns:
      the exit status: 0 if all cells are finished; `STOPPED` if some were interrupted or not started, and the same command goes
      on with them; else 1, some cells having failed or diverged.

    Raises:
      UserError: for a request that does not fit, or a directory that cannot be written, that holds cells of another
        configuration or other data, or in which another sweep is at work. Nothing is run then.
    """
    grid = cells.plan(request)
    cells.check_directories(grid)
    with writing(request.workdir):
        request.workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=request.workdir).close()
    errors = {cell.name: cell.error for cell in grid if cell.error}
    left = [cell for cell in grid if not cell.error and cell.todo()]
    say(_costs(grid))
    say(f"{len(grid)} cells, {len(left)} to run" + (f", {len(errors)} that cannot be" if errors else ""))
    for name, error in errors.items():
        say(f"{name}: {error}")
    outcomes = []
    for outcome in chosen.run(left) if left else ():
        outcomes.append(outcome)
        if outcome.status == "failed":
            errors[outcome.cell.name] = outcome.error
        done = sum(other.status == "finished" for other in outcomes)
        say(f"{outcome.cell.name}: {_described(outcome)}  [{done}/{len(left)}, {outcome.seconds:,.0f} s]")
        with writing(request.workdir):
            report.write(request, grid, errors, arguments)
    with writing(request.workdir):
        report.write(request, grid, errors, arguments)
        groups = report.sections(report.rows(grid))
        say(f"{request.workdir / 'report.md'}, results.csv; {plots.save(groups, request.workdir)}")
    interrupted = len(left) - sum(outcome.status != "interrupted" for outcome in outcomes)
    return _status(grid, errors, interrupted)


def _status(grid: Sequence[Cell], errors: dict[str, str], interrupted: int) -> int:
    """Says what is missing; the exit status."""
    missing = [cell for cell in grid if cell.result() is None]
    if not missing:
        return 0
    diverged = sum(cell.diverged() is not None for cell in missing)
    counts = {"failed": len(errors), "diverged": diverged, "interrupted": interrupted}
    why = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    say(f"{len(missing)} of {len(grid)} cells are not finished ({why})")
    if errors or interrupted:
        say("the same command goes on with what has failed or was interrupted")
    if diverged:
        say("what has diverged is not run again: change its configuration, in another --workdir")
    return STOPPED if interrupted else 1


def show(request: Request, chosen: Engine) -> None:
    """Prints what a sweep would run on an engine, and runs nothing.

    Raises:
      UserError: as `run` does for the request and the cells' directories.
    """
    grid = cells.plan(request)
    cells.check_directories(grid)
    say(_costs(grid))
    for cell in grid:
        steps = [] if cell.error else cell.todo()
        say(f"\n# {cell.name}" + ("" if steps else f": {_state(cell)}"))
        for step in steps:
            say(shlex.join(chosen.command(step)))


def _state(cell: Cell) -> str:
    """Why nothing is to be run for a cell."""
    if cell.error:
        return f"cannot be run: {cell.error}"
    why = cell.diverged()
    return "finished" if why is None else f"diverged: {why}"


def _costs(grid: Sequence[Cell]) -> str:
    """A table of the models, with how far they are from their budgets."""
    rows = {}
    for cell in grid:
        if cell.cost is not None:
            name = ", ".join(f"{key}={value}" for key, value in cell.values.items() if key != "seed") or "model"
            if cell.sized:
                name += f" (width {cell.sized.width}, {report.met(cell.sized).strip('*')})"
            rows[name] = dataclasses.replace(cell.cost, name=name)
    return accounting.table(list(rows.values())) if rows else "no model can be built"


def _described(outcome: Outcome) -> str:
    """How a cell has ended, in words."""
    found = outcome.cell.result()
    if found is not None:
        value = found["test"][str(found["length"])]
        return f"test {Display.read(found).show(value)} at step {found['step']}"
    if outcome.status == "failed":
        return f"failed: {outcome.error} ({outcome.cell.workdir / cells.LOG})"
    return outcome.status + (f": {outcome.error}" if outcome.error else "")
