"""Runs a sweep: what is left of its cells, then the report, the table and the plots of all of them."""

import dataclasses
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from common.command import STOPPED
from common.console import say
from common.errors import UserError
from common.files import make_directory
from data.metrics import Display
from models import accounting
from sweeps import cells, driver, jobs, plots, report, rows, sizing, tuning
from sweeps.cells import Cell
from sweeps.driver import Outcome
from sweeps.engine import Engine
from sweeps.request import Request
from sweeps.tuning import Choice
from training.metrics import read_metrics
from training.run_directory import writing


def run(request: Request, chosen: Engine, arguments: Sequence[str], *, retries: int = 2, detach: bool = False) -> int:
    """Runs what is left of a sweep and writes its report, plots and table.

    Args:
      request: what to run.
      chosen: the engine.
      arguments: of `sweep.py` that asked for it, for the report.
      retries: how often a cell that was stopped or lost is tried again.
      detach: submit and leave: the same command later goes on.

    Returns:
      the exit status: 0 if all cells are finished; `STOPPED` if some were interrupted or not started, and the same command goes
      on with them; else 1, some cells having failed or diverged.

    Raises:
      UserError: for a request that does not fit, or none of whose cells can be run; for a directory that cannot be written, that
        holds cells of another configuration or other data, or in which another sweep is at work. Nothing is run then.
    """
    _check_reports(request.workdir)
    costs = sizing.Costs()
    grid = cells.plan(request, costs)
    cells.check_directories(grid)
    _check_same_sweep(request.workdir, grid)
    if all(cell.error for cell in grid):
        raise UserError(f"none of the cells can be run; {grid[0].name}: {grid[0].error}")
    say(_costs(grid))
    errors = {cell.name: cell.error for cell in grid if cell.error}
    left = _run(request, chosen, arguments, grid, grid, errors, retries, detach)
    if not left and request.best_of:
        choices = tuning.choose(request, rows.rows(grid), list(errors))
        for choice in choices:
            say(_told(choice, request))
        if (more := tuning.more_seeds(request, choices)) is not None:
            extra = cells.plan(more, costs)
            cells.check_directories(extra)
            say(f"\n{request.seeds_of_best} seeds of what was chosen")
            grid = grid + extra
            errors |= {cell.name: cell.error for cell in extra if cell.error}
            left = _run(request, chosen, arguments, grid, extra, errors, retries, detach)
    groups, choices = _shown(request, grid, errors)
    with writing(request.workdir):
        drawn = plots.save(groups, request.workdir, choices, request.best_of)
    say(f"{request.workdir / report.REPORT}, {report.TABLE}; {drawn}")
    return _status(grid, errors, left)


def _run(
    request: Request,
    chosen: Engine,
    arguments: Sequence[str],
    grid: Sequence[Cell],
    some: Sequence[Cell],
    errors: dict[str, str],
    retries: int,
    detach: bool,
) -> int:
    """Runs what is left of some cells of a grid, and writes the report of the grid as they end.

    Adds to `errors`, by name, why cells have failed; returns how many are still to be run, having been interrupted or left to the
    engine.
    """
    with writing(request.workdir):
        make_directory(request.workdir)
        for cell in some:
            cell.save()
    left = [cell for cell in some if not cell.error and cell.todo()]
    broken = [cell for cell in some if cell.error]
    say(f"{len(some)} cells, {len(left)} to run" + (f", {len(broken)} that cannot be" if broken else ""))
    for cell in broken:
        say(f"{cell.name}: {cell.error}")
    outcomes = []
    for outcome in driver.drive(chosen, left, retries, detach) if left else ():
        outcomes.append(outcome)
        if outcome.status == "failed":
            errors[outcome.cell.name] = outcome.error
        done = sum(other.status == "finished" for other in outcomes)
        say(f"{outcome.cell.name}: {_described(outcome)}  [{done}/{len(left)}, {outcome.seconds:,.0f} s]")
        with writing(request.workdir):
            report.write(request, grid, errors, arguments)
    with writing(request.workdir):
        report.write(request, grid, errors, arguments)
    return len(left) - sum(outcome.status != "interrupted" for outcome in outcomes)


def _check_reports(workdir: Path) -> None:
    """Raises a UserError where a report would take the place of what is no sweep's."""
    names = [path.name for path in workdir.glob("*.*")]
    taken = [name for name in names if name in (report.TABLE, report.REPORT) or plots.NAMES.fullmatch(name)]
    if taken and not any(workdir.glob(cells.CELLS)):
        raise UserError(f"{workdir} has {taken[0]} and no cells of a sweep: move it away, or give another --workdir")


def _check_same_sweep(workdir: Path, grid: Sequence[Cell]) -> None:
    """Raises a UserError where all cells that are there are of another grid, whose report would be overwritten."""
    there = sorted(path.parent.parent for path in workdir.glob(cells.CELLS))
    if there and not {cell.name for cell in grid} & {path.name for path in there}:
        raise UserError(
            f"{workdir} holds the cells of another sweep, such as {there[0].name}, and its report: give this one a --workdir of "
            "its own"
        )


def _shown(request: Request, grid: Sequence[Cell], errors: dict[str, str]):
    """The rows of the report in groups that can be compared, and what was chosen."""
    everything = rows.rows(grid)
    choices = tuning.choose(request, everything, list(errors)) if request.best_of else []
    return rows.sections([c.chosen for c in choices if c.chosen] if choices else everything), choices


def _told(choice: Choice, request: Request) -> str:
    """What was chosen, in words."""
    label = ", ".join(f"{key}={value}" for key, value in choice.values.items()) or "all"
    if choice.chosen is None:
        return f"{label}: nothing can be chosen, no value has a score"
    values = ", ".join(f"{key}={choice.chosen.values[key]}" for key in request.best_of)
    edge = f", at the edge of the grid ({', '.join(choice.edges)}); the report has the command that extends it"
    return f"{label}: {values}" + (edge if choice.edges else "")


def _status(grid: Sequence[Cell], errors: dict[str, str], left: int) -> int:
    """Says what is missing; the exit status."""
    missing = [cell for cell in grid if cell.result() is None]
    if not missing:
        return 0
    diverged = sum(cell.diverged() is not None for cell in missing)
    counts = {"failed": len(errors), "diverged": diverged, "still to be run": left}
    why = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    say(f"{len(missing)} of {len(grid)} cells are not finished ({why})")
    if errors or left:
        say("the same command goes on with what has failed or is still to be run")
    if diverged:
        say("what has diverged is not run again: change its configuration, in another --workdir")
    return STOPPED if left else 1


def there(workdir: Path) -> list[Cell]:
    """The cells that the directory of a sweep holds.

    Raises:
      UserError: if it holds none.
    """
    if not (found := cells.here(workdir)):
        raise UserError(f"{workdir} holds no cells of a sweep: give the --workdir of one")
    return found


def status(workdir: Path) -> int:
    """Prints how far each cell of a sweep is, read from their directories; the exit status, as of `run`.

    Raises:
      UserError: if the directory holds no cells.
    """
    grid = there(workdir)
    lines, words = [], [driver.status(cell) for cell in grid]
    for cell, word in zip(grid, words):
        found, made = cell.result(), jobs.attempts(cell.workdir)
        step = max((line["step"] for line in read_metrics(cell.workdir)), default=0)
        score = Display.read(found).show(found["test"][str(found["length"])]) if found else ""
        hours = sum(attempt.seconds for attempt in made) / 3600
        short = textwrap.shorten(word, 70, placeholder=" ...")
        lines.append([cell.name, short, f"{step:,}/{cell.steps:,}", score, f"{len(made)}", f"{hours:.2f}"])
    say(_columns([["cell", "status", "step", "test", "attempts", "hours"], *lines]))
    say(f"{len(grid)} cells: {', '.join(f'{n} {word}' for word, n in driver.by_status(grid).items())}")
    if all(word == "finished" for word in words):
        return 0
    return 1 if all(word.startswith(("finished", "failed", "diverged", "cannot")) for word in words) else STOPPED


def _columns(lines: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def show(request: Request, chosen: Engine) -> None:
    """Prints what a sweep would run on an engine, and runs nothing.

    Raises:
      UserError: as `run` does for the request and the cells' directories.
    """
    grid = cells.plan(request)
    cells.check_directories(grid)
    say(_costs(grid))
    for cell in grid:
        left = () if cell.error else cell.todo()
        say(f"\n# {cell.name}: {' and '.join(left) if left else driver.status(cell)}")
        if left:
            say(shlex.join(["python", "train.py", *cell.arguments, f"--workdir={cell.workdir}"]))
            say(shlex.join(chosen.command(cell.workdir)))


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
