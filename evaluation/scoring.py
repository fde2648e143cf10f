"""Scores of a checkpoint on a split, at one or several context lengths."""

from collections.abc import Sequence

import jax

from common.console import say
from common.errors import UserError, check_choice
from data import metrics
from data import task as tasks
from evaluation import report
from evaluation.loading import LoadedRun
from training import setup
from training.config import Config
from training.validation import validate


def score(
    run: LoadedRun, split: str = "test", lengths: Sequence[int] = (), batches: int = 0
) -> list[tuple[int, dict[str, float]]]:
    """Scores a split and prints the results; those of whole splits, but for train, beside what trivial predictors score there.

    Args:
      run: the run and its checkpoint.
      split: "train", "valid" or "test".
      lengths: context lengths, by default the one of training.
      batches: so many batches are scored; 0 is the whole split.

    Returns:
      for each length its scores, as `training.validation.evaluate` names them. Those that are reckoned with the sizes of the
      whole split (`data.metrics.text_scores`) are left out where only a part of it is scored.

    Raises:
      UserError: for an unknown split, and for a length that the task, a mixer or the devices do not allow.
    """
    config, trained = run.config, run.config.task.spec.length
    check_choice("--split", split, config.task.splits)
    eval_step = setup.eval_step(config, run.built)
    results, floors, ways = [], [], run.built.mesh.size
    for length in dict.fromkeys(lengths or [trained]):
        task = at_length(config, length)
        # The same number of tokens in a batch, whatever the length.
        rows = max(1, config.train.batch_size * trained // length // ways) * ways
        loader = setup.batches(config, run.built, split, rows, task)
        with run.computing():
            result = validate(eval_step, run.params, loader, batches)
        part = f", {batches} of {len(loader)} batches" if 0 < batches < len(loader) else ""
        if not part:
            result |= metrics.text_scores(result, task.text_sizes(split))
            floors.append((task, result))
        say(f"{split}, length {length}{part}: {metrics.describe(task.spec, result)}")
        results.append((length, result))
    if jax.process_index() == 0:
        if len(results) > 1:
            report.lengths(config.task.spec, results, trained)
        if split != "train":
            for task, result in floors:
                report.floors(task, split, result)
            if len(floors) < len(results):
                print("\nwithout floors where a part of the split is scored: theirs are of all its rows")
    return results


def at_length(config: Config, length: int) -> tasks.Task:
    """The task of a run with rows of a length.

    Raises:
      UserError: if the task has one length only.
    """
    if length == config.task.spec.length:
        return config.task
    name = config.raw["task"]["name"]
    if "length" not in tasks.defaults(name):
        raise UserError(f"rows of task {name!r} have one length, {config.task.spec.length}; leave --lengths out")
    options = {key: value for key, value in config.raw["task"].items() if key != "name"}
    return tasks.create(name, **options | {"length": length})
