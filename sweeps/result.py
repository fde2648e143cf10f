"""What a sweep asks of a run that has ended: `result.json` in the run's directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from common import hosts
from common.console import say
from common.errors import UserError
from common.files import write_atomically
from data import task as tasks
from evaluation import loading, report, scoring, settings
from sweeps.cells import RESULT
from training.metrics import read_metrics
from training.run_directory import writing


def write(
    workdir: str | Path, lengths: Sequence[int] = (), allow_other_data: bool = False, score: Sequence[str] = ()
) -> None:
    """Scores the test split at the checkpoint of a run that is best on validation, and writes `result.json`.

    To be called by all processes of a run; the first one writes.

    It holds the scores by length (null at a length that the run's mixers or its task cannot have), the score on validation, the
    floors of the same rows, and the step and the data that the scores are of, see `evaluation.loading.LoadedRun.origin`. Under
    "grid" are the scores under other settings of the task, those that are asked for and those that the task wants to be shown
    beside (`Task.beside`), each with its metric and its floors; the score is null where the model cannot answer.

    Args:
      workdir: of the run.
      lengths: to score at beside the one of training.
      allow_other_data: whether to score a run although its data has changed.
      score: settings of the task, as `evaluation.settings.parse` takes them.

    Raises:
      UserError: if the directory holds no run or one of other data, or cannot be written.
      CheckpointError: if no checkpoint has a score to be the best by: the run has diverged.
    """
    run = loading.load(workdir, allow_other_data=allow_other_data)
    task, spec = run.config.task, run.config.task.spec
    scores, scored, grid = {}, [], []
    for length in sorted({spec.length, *lengths}):
        try:
            found, beside = scoring.score_lengths(run, "test", [length])
            scores[str(length)] = found[0].result[spec.metric.name]
        except UserError as error:
            if length == spec.length:
                raise
            say(f"no score at length {length}: {error}")  # mixers and tasks that have one length only
            scores[str(length)] = None
        else:
            scored += [*found, *beside]
            grid += [(task.beside, one) for one in beside if length == spec.length]
    for setting in settings.asked(run, "", score, "", ()):
        try:
            one = scoring.score_task(run, tasks.create(setting.task, **setting.options))
        except UserError as error:
            say(f"no score with {dict(setting.named)}: {error}")
            grid.append((setting.named, None))
        else:
            report.line(one)
            scored.append(one)
            grid.append((setting.named, one))
    hosts.leave()  # floors may take long, and one process finds them
    if jax.process_index() != 0:
        return
    scoring.tell_floors(scored)
    valid = {line["step"]: line[spec.metric.name] for line in read_metrics(run.workdir) if line["split"] == "valid"}
    result = {
        "task": task.name,
        **spec.metric.describe(),
        "floors": task.floors("test"),
        "length": spec.length,
        "steps": run.config.train.steps,
        **run.origin,
        "valid": valid[run.step],
        "test": scores,
        "asked": list(score),
        "grid": [_entry(named, one) for named, one in grid],
    }
    with writing(run.workdir):
        write_atomically(run.workdir / RESULT, json.dumps(result, indent=1))


def _entry(named: Mapping[str, Any], scored: scoring.Scored | None) -> dict[str, Any]:
    """What is kept of the score under a setting of the task."""
    if scored is None:
        return {"settings": dict(named), "score": None}
    metric = scored.task.spec.metric
    floors = scored.floors or {}
    return {"settings": dict(named), **metric.describe(), "score": scored.result[metric.name], "floors": floors}
