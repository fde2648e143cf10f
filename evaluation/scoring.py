"""Scores of a checkpoint: on its own task at one or several lengths, and on any task that it can answer."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import hosts
from common.errors import UserError, check_choice
from data import metrics, vocabularies
from data import task as tasks
from data.loader import prefetch
from evaluation import completions, report
from evaluation.intervals import interval
from evaluation.loading import LoadedRun
from training import setup, sharding
from training.config import Config, head
from training.state import Built, cast
from training.step import class_sums, real_sums

TOKENS = 16_384  # of a batch, where no training says how many
LONG, PIECE = 16_384, 4096  # positions of rows that are read in pieces where they are longer, and of a piece


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a checkpoint scores on a task.

    Attributes:
      task: the task.
      split: that was scored.
      rows: number of rows that were scored, and `all_rows` of the split (for train, of an epoch).
      result: scores, as `data.metrics.summary` and `text_scores` name them.
      intervals: 95 % intervals of the task's metrics over the rows; those of a single row are left out.
    """

    task: tasks.Task
    split: str
    rows: int
    all_rows: int
    result: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    @functools.cached_property
    def floors(self) -> dict[str, float] | None:
        """What trivial predictors score on the same rows, in the unit of the task's metric; None where that is not known.

        They are found when they are first asked for, which may take long: by one process, when all have scored.
        """
        return floors(self.task, self.split, self.rows)


def score(
    run: LoadedRun, split: str = "test", lengths: Sequence[int] = (), batches: int = 0
) -> list[tuple[int, dict[str, float]]]:
    """Scores the run's own task and prints the results, with what trivial predictors score on the same rows (not for train).

    Of several processes, this is the last that they do together.

    Args:
      run: the run and its checkpoint.
      split: "train", "valid" or "test".
      lengths: context lengths, by default the one of training.
      batches: so many batches are scored; 0 is the whole split.

    Returns:
      for each length its scores. Those that are reckoned with the sizes of the whole split (`data.metrics.text_scores`) are left
      out where only a part of it is scored.

    Raises:
      UserError: for an unknown split, and for a length that the task, a mixer or the devices do not allow.
    """
    found, beside = score_lengths(run, split, lengths, batches)
    hosts.leave()  # floors may take long, and one process finds them
    if jax.process_index() == 0:
        spec = run.config.task.spec
        if len(found) > 1:
            report.lengths(spec, [(one.task.spec.length, one.result) for one in found], spec.length)
        tell_floors([*found, *beside])
    return [(one.task.spec.length, one.result) for one in found]


def tell_floors(scored: Sequence[Scored]) -> None:
    """Prints results beside what trivial predictors score on the same rows, where that is known. To be called by one process."""
    for one in scored:
        if one.floors is not None:
            report.floors(one.task, one.split, one.result, one.floors)
    if any(one.split != "train" and one.floors is None for one in scored):
        print("\nwithout floors where a part of the split is scored: theirs are of all its rows")


def score_lengths(
    run: LoadedRun, split: str = "test", lengths: Sequence[int] = (), batches: int = 0
) -> tuple[list[Scored], list[Scored]]:
    """What `score` prints the results of, as it comes; and with them those under the hyperparameters that the task wants to be
    shown beside (`Task.beside`)."""
    config = run.config
    check_choice("--split", split, config.task.splits)
    found, beside = [], []
    for length in dict.fromkeys(lengths or [config.task.spec.length]):
        task = at_length(config, length)
        found.append(score_task(run, task, split, batches))
        report.line(found[-1])
        options = task.hyperparameters | task.beside
        if options != task.hyperparameters:
            beside.append(score_task(run, tasks.create(config.raw["task"]["name"], **options), split, batches))
            report.line(beside[-1])
    return found, beside


def score_task(run: LoadedRun, task: tasks.Task, split: str = "test", batches: int = 0) -> Scored:
    """Scores a checkpoint on a task; for the arguments see `score`.

    Raises:
      UserError: if the model cannot answer the task, see `check_fits`; if nothing is scored, or scores are no numbers.
    """
    check_fits(run, task)
    config, spec = run.config, task.spec
    of_training = TOKENS if config.task is None else config.train.batch_size * config.task.spec.length
    # The same number of tokens in a batch, whatever the length.
    ways, count = run.built.mesh.size, task.num_examples(split)
    size = -(-min(count, max(1, of_training // spec.length)) // ways) * ways
    loader = setup.batches(config, run.built, split, size, task)
    number = min(batches, len(loader)) or len(loader)
    found, stream = [], prefetch(loader)
    try:
        with run.computing():
            # The settings of a grid mostly differ in what the model does not see.
            kind = spec.metrics, spec.objective, spec.length, spec.segmented
            if kind not in run.steps:
                own = in_pieces(run, task)
                run.steps[kind] = own or row_sums(run.built, spec.metrics, config.train.compute_dtype)
            score, pending = run.steps[kind], None
            for _ in range(number):
                sums = score(run.params, next(stream))
                if pending is not None:
                    found.append(jax.device_get(pending))  # a batch late, so that the device is never waited for
                pending = sums
            found.append(jax.device_get(pending))
    finally:
        stream.close()
    rows = min(count, number * size)
    sums = {name: np.concatenate([one[name] for one in found])[:rows].astype(np.float64) for name in found[0]}
    if bad := int(np.isnan(sums["nats"]).sum()):
        raise UserError(
            f"the model's scores are no numbers (NaN) in {bad:,} of {rows:,} rows: its training diverged, or it does not stand "
            f"rows of {spec.length:,} positions; take another checkpoint, or another length"
        )
    if task.new_tokens:
        sums["contained"] = completions.contained(run, task, split, rows)
    if not sums["weight"].sum():
        raise UserError("there is nothing to score: every weight of the split is zero")
    result = metrics.summary(spec, {name: value.sum(0) for name, value in sums.items()})
    if rows == count:
        result |= metrics.text_scores(result, task.text_sizes(split))
    intervals = {metric.name: interval(metric, sums) for metric in spec.metrics}
    intervals = {name: ends for name, ends in intervals.items() if ends is not None}
    return Scored(task, split, rows, count, result, intervals)


def row_sums(built: Built, wanted: Sequence[metrics.Metric], compute_dtype: str) -> Callable[[Any, Any], dict]:
    """The jitted `(params, batch) -> sums` of `training.step.class_sums` or `real_sums`, of each row: [batch, ...]."""

    def step(params, batch):
        batch = jax.lax.with_sharding_constraint(batch, sharding.batch_sharding(built.mesh))
        model = functools.partial(built.apply, cast(params, built.metadata, compute_dtype))
        where = {"segment_ids": batch.get("segment_ids"), "positions": batch.get("positions")}
        targets, weights = batch["targets"], batch["weights"]
        if np.issubdtype(targets.dtype, np.floating):
            (predictions, loss), _ = model(batch["inputs"], targets=targets, **where)
            return _each(real_sums, wanted, predictions, loss, targets, weights)
        return _each(class_sums, wanted, model(batch["inputs"], **where)[0], targets, weights)

    return jax.jit(step, out_shardings=sharding.replicated(built.mesh))


def _each(function, wanted, *arrays):
    return jax.vmap(lambda *row: function(*(a[None] for a in row), metrics=wanted))(*arrays)


def in_pieces(run: LoadedRun, task: tasks.Task) -> Callable[[Any, Any], dict] | None:
    """What `row_sums` gives, by pieces of `PIECE` positions that hand on the carry: in memory that grows with the row only where
    the carry does.

    None for rows of at most `LONG` positions, where the task asks for what needs them whole, and for models without a carry.
    """
    model, spec, built = run.config.model, task.spec, run.built
    by_token = spec.objective in ("causal_lm", "token_labels") and all(
        not metric.whole_rows or metric.sums is metrics.row_sums for metric in spec.metrics
    )
    if spec.length <= LONG or not (by_token and model.causal and model.streams):
        return None
    keys = ("inputs", "targets", "weights", *(["segment_ids"] if spec.segmented else []))
    whole = -(-spec.length // PIECE) * PIECE

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, batch, carry, start):
        piece = {key: jax.lax.dynamic_slice_in_dim(a, start, PIECE, 1) for key, a in batch.items()}
        piece = jax.lax.with_sharding_constraint(piece, sharding.batch_sharding(built.mesh))
        params = cast(params, built.metadata, run.config.train.compute_dtype)
        logits, carry = built.apply(params, piece["inputs"], carry, segment_ids=piece.get("segment_ids"))
        sums = _each(class_sums, spec.metrics, logits, piece["targets"], piece["weights"])
        return jax.lax.with_sharding_constraint(sums, sharding.replicated(built.mesh)), carry

    @jax.jit
    def begin(params, batch):
        filled = {key: jnp.pad(batch[key], ((0, 0), (0, whole - spec.length))) for key in keys}
        return filled, built.merge(params).initial_carry(len(batch["inputs"]), whole)

    def score(params, batch):
        (batch, carry), total = begin(params, batch), {}
        for start in range(0, whole, PIECE):
            sums, carry = step(params, batch, carry, start)
            if "rows" in total:
                # A row is right where all its pieces are that have any weight.
                right = [one["rows_correct"] >= one["rows"] for one in (total, sums)]
                sums["rows"] = jnp.maximum(total.pop("rows"), sums["rows"])
                sums["rows_correct"] = jnp.where(right[0] & right[1], sums["rows"], 0)
                total.pop("rows_correct")
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
        return total

    return score


def floors(task: tasks.Task, split: str, rows: int) -> dict[str, float] | None:
    """What trivial predictors score on the first rows of a split; None where that is not known."""
    if split == "train":
        return None
    if rows < task.num_examples(split):
        if not task.floors_of_rows:
            return None
        whole, task = task, copy.copy(task)
        task.num_examples = lambda of: rows if of == split else whole.num_examples(of)
    return task.floors(split)


def check_fits(run: LoadedRun, task: tasks.Task) -> None:
    """Raises a UserError if a model cannot answer a task: its head, its inputs, its vocabulary, or what its mixers can do."""
    model, spec, own = run.config.model, task.spec, run.config.task
    if task.new_tokens:
        completions.check(run, task)
    if own is not None and (spec, task.name) == (own.spec, own.name):
        return
    cannot = f"this model cannot answer task {task.name!r}"
    if head(spec) != model.head or (model.loss is not None) != (spec.objective in tasks.REAL):
        raise UserError(
            f"{cannot}: it asks for {tasks.OBJECTIVES[spec.objective]!r}, and the model's head gives something else"
        )
    if spec.causal is not None and spec.causal != model.causal:
        raise UserError(f"{cannot}: it needs a {'causal' if spec.causal else 'two-sided'} model")
    if spec.channels != model.channels:
        raise UserError(f"{cannot}: its rows have {spec.channels} real channels, and the model takes {model.channels}")
    if spec.vocab_size is not None:
        _check_vocabulary(run, task, cannot)
    elif spec.targets != model.targets:
        raise UserError(f"{cannot}: it has {spec.targets} targets, and the model gives {model.targets}")
    # How its own text was read and its loss cut in training is nothing to rows that are scored whole.
    train = dataclasses.replace(run.config.train, carry=False, loss_chunks=1)
    setup.check_capabilities(dataclasses.replace(run.config, task=task, train=train))


def _check_vocabulary(run, task, cannot):
    model, spec = run.config.model, task.spec
    same = vocabularies.same(task, run.reader)
    if same is False:
        file = getattr(getattr(run.reader, "tokenizer", run.reader), "file", None)
        how = "" if file is None else f"; those are of --set task.tokenizer=file:{file}"
        raise UserError(f"{cannot}: it cuts texts into other tokens than those that the model was trained on{how}")
    of_text = vocabularies.encode(task, vocabularies.PROBE) is not None
    if of_text and run.reader is None and (file := vocabularies.unread(run.workdir)) is not None:
        raise UserError(f"{cannot}: {vocabularies.how_to_read(file)}")
    # Of texts in the same tokens, and of a model that says nothing of its tokens, a vocabulary may be larger than what is asked.
    larger = same is True or (of_text and run.reader is None)
    for what, asked, there in (
        ("a vocabulary", spec.vocab_size, model.vocab_size),
        ("targets", spec.targets, model.targets),
    ):
        if not (asked == there or (larger and asked < there)):
            raise UserError(
                f"{cannot}: it has {what} of {asked}, and the model {what} of {there}; set the task's keys as they were in "
                "training"
            )


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
    return tasks.create(name, **tasks.find(name).at_length(options, length))
