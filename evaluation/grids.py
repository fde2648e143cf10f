"""Any checkpoint on any task, under any setting: tables, a JSON file, and pictures of the grids."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from common import hosts
from common.console import say
from common.errors import UserError
from common.files import check_can_make, write_atomically, write_figure
from data import task as tasks
from evaluation import report, results
from evaluation.diagnostics.record import finite
from evaluation.loading import LoadedRun
from evaluation.scoring import Scored, check_fits, score_task
from evaluation.settings import Setting

Cell = tuple[Setting, Scored]


def score_settings(
    run: LoadedRun,
    settings: Sequence[Setting],
    split: str = "test",
    batches: int = 0,
    output: str | Path | None = None,
    leave_out: bool = False,
) -> list[Cell]:
    """Scores a checkpoint under each setting, prints a table for each task, and writes a JSON file and pictures.

    Args:
      run: the run and its checkpoint.
      settings: see `evaluation.settings.grid`.
      split: "train", "valid" or "test".
      batches: so many batches of each setting are scored; 0 is the whole split.
      output: the folder that is written to; None for `evaluations/` of the run, and for nothing of a checkpoint that is no run's.
      leave_out: say what the model cannot answer instead of refusing it.

    Returns:
      each setting with its scores.

    Raises:
      UserError: if the model cannot answer a setting, or with `leave_out` none of them; if nothing can be written.
    """
    ready, cells, folder = [], [], results.folder(run, output)
    if folder is not None:
        check_can_make(folder, "--output")
    # All are made and looked at before the first is scored, which may take long.
    for setting in settings:
        with _named(setting, leave_out):
            task = tasks.create(setting.task, **setting.options)
            check_fits(run, task)
            ready.append((setting, task))
    for setting, task in ready:
        with _named(setting, leave_out):
            scored = score_task(run, task, split, batches)
            cells.append((setting, scored))
            metric = scored.task.spec.metric
            say(f"{_name(setting)}: {metric.show(scored.result[metric.name])}")
    if not cells:
        raise UserError("there is nothing that this model can answer")
    hosts.leave()  # floors may take long, and one process finds them
    if jax.process_index() == 0:
        for name in dict.fromkeys(setting.task for setting, _ in cells):
            own = [(setting.named, scored) for setting, scored in cells if setting.task == name]
            # Metrics may differ between settings: each has a table of its own.
            for metric in dict.fromkeys(scored.task.spec.metric.name for _, scored in own):
                part = [cell for cell in own if cell[1].task.spec.metric.name == metric]
                print(f"\n{part[0][1].task.name.partition('/')[0]}, {split} split\n{report.table(part)}")
        if folder is not None:
            print("\n" + _write(folder, run, cells, split))
    return cells


@contextlib.contextmanager
def _named(setting, leave_out):
    """Errors have the setting's name, or are only said."""
    try:
        yield
    except UserError as error:
        if not leave_out:
            raise UserError(f"{_name(setting)}: {error}") from error
        say(f"{_name(setting)}: left out: {error}")


def _name(setting):
    return ", ".join([setting.task, *(f"{key}={value}" for key, value in setting.named.items())])


def record(run: LoadedRun, cells: Sequence[Cell], split: str) -> dict[str, Any]:
    """What is written of an evaluation, as JSON holds it."""
    return {
        "checkpoint": str(run.workdir),
        **run.origin,
        "split": split,
        "cells": [
            {
                "task": setting.task,
                "settings": dict(setting.named),
                "data": scored.task.fingerprint(),
                **scored.task.spec.metric.describe(),
                "rows": scored.rows,
                "of": scored.all_rows,
                "scores": scored.result,
                "intervals": {name: list(ends) for name, ends in scored.intervals.items()},
                "floors": scored.floors,
            }
            for setting, scored in cells
        ],
    }


def _write(folder, run, cells, split):
    found = record(run, cells, split)
    asked = [[cell[key] for key in ("task", "settings", "data", "rows")] for cell in found["cells"]]
    names = list(dict.fromkeys(Path(setting.task).stem for setting, _ in cells))
    stem = results.stem(run, split, names, asked)
    try:
        write_atomically(folder / f"{stem}.json", json.dumps(finite(found), indent=1))
        pictures = _pictures(folder, stem, cells)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return f"written: {folder / stem}.json" + (f"; {pictures}" if pictures else "")


def _pictures(folder, stem, cells):
    """A heat map for each task and metric whose first two keys with several values make a grid."""
    groups: dict[tuple, list[Cell]] = {}
    for setting, scored in cells:
        groups.setdefault((setting.task, scored.task.spec.metric.name, tuple(setting.named)), []).append(
            (setting, scored)
        )
    several = {}
    for group, own in groups.items():
        keys = [key for key in group[2] if len({setting.named[key] for setting, _ in own}) > 1]
        if keys:
            several[group] = keys[:2]
    if not several:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no pictures: pip install matplotlib"
    made = []
    for (task, metric, _), keys in several.items():
        own = groups[task, metric, _]
        figure = Figure(figsize=(5, 4), layout="constrained")
        heat_map(figure.subplots(), own, keys)
        made.append(f"{stem}-{Path(task).stem}-{metric}{f'-{len(made)}' if made else ''}.png")
        write_figure(folder / made[-1], figure, dpi=130)
    return f"pictures: {', '.join(made)}"


def heat_map(axes, cells: Sequence[Cell], keys: Sequence[str]) -> None:
    """Draws a metric over one or two keys of a grid; of cells that are equal in both the last is shown. The title has the values
    of all other keys."""
    import numpy as np

    column, row = (*reversed(keys), None)[:2] if len(keys) > 1 else (keys[0], None)
    columns = list(dict.fromkeys(setting.named[column] for setting, _ in cells))
    rows = [None] if row is None else list(dict.fromkeys(setting.named[row] for setting, _ in cells))
    metric = cells[0][1].task.spec.metric
    values = np.full((len(rows), len(columns)), np.nan)
    for setting, scored in cells:
        place = 0 if row is None else rows.index(setting.named[row]), columns.index(setting.named[column])
        values[place] = metric.scale * scored.result[metric.name]
    limits = {"vmin": 0, "vmax": 100} if metric.unit == "%" else {}
    image = axes.imshow(values, aspect="auto", cmap="viridis", **limits)
    for place, value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.annotate(
                f"{value:.3g}",
                place[::-1],
                ha="center",
                va="center",
                color="white" if value < image.norm.vmin + 0.7 * (image.norm.vmax - image.norm.vmin) else "black",
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlabel(column)
    axes.set_yticks([] if row is None else range(len(rows)), None if row is None else rows)
    axes.set_ylabel("" if row is None else row)
    axes.figure.colorbar(image, label=metric.label)
    last = cells[-1][0]
    others = [f"{key}={value}" for key, value in last.named.items() if key not in keys]
    axes.set_title(", ".join([Path(last.task).stem, *others]), wrap=True)
