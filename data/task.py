"""The Task contract: examples of a data set, what a model must know of them, and what trivial predictors score.

A task is one file `data/tasks/<name>.py` that defines one subclass of `Task`. Its constructor's signature holds the
hyperparameters and their defaults. Nothing lists the tasks: they are found by looking into the folder.
"""

import abc
import dataclasses
import functools
import hashlib
import pathlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import grain
import numpy as np
from ml_collections import config_dict

from common.errors import UserError, check_choice, check_range
from common.plugins import Plugins
from data import metrics
from data.metrics import Metric

# What a row's targets are, and so which head and loss a model gets. T is the length, K the number of targets.
OBJECTIVES = {
    "causal_lm": "targets[t] is the class that follows inputs[..t]: [T] integers",
    "token_labels": "a class at every position whose weight is not 0: [T] integers",
    "classification": "a class of the row: one integer; weights: one number",
    "pair_classification": "a class of two rows, inputs [2, T]: one integer",
    "regression": "real numbers of the row: [K] float32; weights: one number",
    "token_regression": "real numbers at every position: [T, K] float32",
}
UNITS = {
    "causal_lm": "byte",
    "token_labels": "label",
    "classification": "row",
    "pair_classification": "pair",
    "regression": "row",
    "token_regression": "position",
}
# What is reported where a task does not say it, the metric that it is judged by first.
METRICS = {
    "causal_lm": ("bits_per_{unit}", "perplexity", "accuracy"),
    "token_labels": ("accuracy", "row_accuracy"),
    "classification": ("accuracy",),
    "pair_classification": ("accuracy",),
    "regression": ("rmse", "mae"),
    "token_regression": ("rmse", "mae"),
}
REAL = ("regression", "token_regression")

# Ids and positions are int32.
MOST_IDS = 2**31 - 1
# The shuffle knows no more.
MOST_ROWS = 2**32


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the model and the evaluation need to know of a task.

    Attributes:
      vocab_size: number of input token ids, or None where inputs are real.
      channels: number of real input channels, or None where inputs are tokens.
      targets: size of the model's output.
      objective: one of `OBJECTIVES`.
      length: number of positions of an example.
      unit: what a weight of 1 stands for: "byte" makes the metric of language models bits per byte,
        sum(weight * nats) / (ln 2 * sum(weight)). By default a byte, a label, a row, a pair or a position.
      causal: whether the model must be causal (True) or two-sided (False); None leaves it to the configuration, two-sided
        by default.
      metric: what the task is judged by: a `data.metrics.Metric` of the task's own or, by its name, one of that file, such as
        "row_accuracy" or "bits_per_<unit>"; afterwards the object. By default the first of `metrics`.
      metrics: all that are reported, likewise; afterwards a tuple of objects, the one that the task is judged by first. By
        default those of the objective, see `METRICS`.

    Raises:
      UserError: for what does not fit together, and for a metric that is unknown or is none of such targets.
      packed: whether rows hold several segments, which a model must keep apart.
      padded: whether rows hold padding that a model must see (the unscored tail of a split's last row harms nobody).
    """

    vocab_size: int | None
    channels: int | None
    targets: int
    objective: str
    length: int
    unit: str = ""
    packed: bool = False
    padded: bool = False
    causal: bool | None = None
    metric: Metric | str = ""
    metrics: Sequence[Metric | str] = ()

    def __post_init__(self):
        if (self.vocab_size is None) == (self.channels is None):
            raise ValueError("a task has either tokens (vocab_size) or real inputs (channels): set exactly one")
        check_choice("objective", self.objective, OBJECTIVES)
        for key in ("length", "vocab_size", "channels", "targets"):
            if (size := getattr(self, key)) is not None:
                check_range(key, size, 1, MOST_IDS)
        if self.objective == "causal_lm":
            object.__setattr__(self, "causal", True)
        if not self.unit:
            object.__setattr__(self, "unit", UNITS[self.objective])
        asked = self.metrics or [name.format(unit=self.unit) for name in METRICS[self.objective]]
        of = metrics.NUMBERS if self.objective in REAL else metrics.CLASSES
        judged = [self.metric] if self.metric else []
        chosen = metrics.choose([*judged, *asked], unit=self.unit, of=of, targets=self.targets)
        object.__setattr__(self, "metrics", chosen)
        object.__setattr__(self, "metric", chosen[0])

    @property
    def segmented(self) -> bool:
        """Whether models get segment_ids; without them they take their fast paths."""
        return self.packed or self.padded


class Task(abc.ABC):
    """A data set as rows that are pure functions of (seed, split, index).

    Attributes:
      name: the task and the data it reads, for reports.
      spec: what a model needs to know.
      paper_size: the hyperparameters of the published size.
      hyperparameters: every keyword of the constructor with the value that was used: defaults filled in, folders as absolute
        paths, and `resolved` over them. `create` with them gives the same task again, from whatever directory.
      fingerprint_rows: of each split, drawn for the fingerprint: enough to see that a rare branch of a generator has changed, and
        few enough for every start.
      floors_of_rows: whether floors are of the rows that `num_examples` counts, so that the beginning of a split has its own.
      contiguous: whether a split is one text, of which `stretch` gives any part.
      beside: hyperparameters under which an evaluation scores the task a second time, to be shown beside the first.
      new_tokens: tokens that an evaluation generates behind each row's `completion`, for the metric "contains"; 0 for none.
      tokenizer: of a text, one of `data.tokenizers`; None where there is no text, or the task cuts it in its own way.
      resolved: set by a constructor, the hyperparameters whose value stands for another: the corpus that was found for
        "auto", a file's absolute path, a number that was computed for None. What stays None goes by other hyperparameters
        or by the machine, such as the cache.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test")
    name: str
    spec: Spec
    paper_size: ClassVar[dict[str, typing.Any]] = {}
    fingerprint_rows: int = 24
    floors_of_rows: ClassVar[bool] = False
    contiguous: ClassVar[bool] = False
    beside: ClassVar[dict[str, typing.Any]] = {}
    new_tokens: ClassVar[int] = 0
    hyperparameters: dict[str, typing.Any] = {}
    tokenizer: typing.Any = None
    resolved: dict[str, typing.Any] = {}

    @classmethod
    def outline(cls, **hyperparameters) -> "Task":
        """The task as far as it is known without its data: `name` and `spec`, for a model that is only compiled.

        The task itself where its constructor reads nothing. A task whose constructor reads data gives an `Outline`.

        Args:
          **hyperparameters: all keywords of the constructor.

        Raises:
          UserError: where only the data say what the spec is, and as the constructor does for its hyperparameters.
        """
        return cls(**hyperparameters)

    @classmethod
    def build(cls, **hyperparameters) -> "Task":
        """The task itself, or another that some of its hyperparameters stand for; arguments and errors as of the constructor."""
        return cls(**hyperparameters)

    @classmethod
    def at_length(cls, options: Mapping[str, typing.Any], length: int) -> dict[str, typing.Any]:
        """The hyperparameters of the same task with rows of another length, for a task that has a `length`.

        Args:
          options: hyperparameters; what they leave out has its default.
          length: of the rows.

        Raises:
          UserError: if there are no such rows.
        """
        return {**options, "length": length}

    @abc.abstractmethod
    def num_examples(self, split: str) -> int:
        """Rows of the split; for train, rows of one epoch."""

    @abc.abstractmethod
    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Row `index` < num_examples(split), before any shuffling; `epoch` and `seed` matter to train only."""

    @abc.abstractmethod
    def floors(self, split: str = "test") -> dict[str, float]:
        """What trivial predictors score on the split, in the unit of the task's metric."""

    def content(self) -> str:
        """SHA-256 of all that the rows are made from, for a task that reads it from files or packages.

        It goes into the fingerprint, so it must not depend on where the files lie. Where nothing is read, the rows that are
        drawn for the fingerprint stand for all.
        """
        return ""

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the content, the sizes of the splits, and rows of each split as they are handed out.

        It changes with the data, with a generator, a tokenizer, or how rows are cut, shuffled and scaled. The rows are spread
        over the split; those of train are of three epochs and two seeds.
        """
        digest = hashlib.sha256(f"{self.content()}\n".encode())
        for split in self.splits:
            rows = self.num_examples(split)
            digest.update(f"{split} {rows}\n".encode())
            last = (3 * rows if split == "train" else rows) - 1
            indices = np.unique(np.linspace(0, last, self.fingerprint_rows).astype(np.int64))
            for number, index in enumerate(indices.tolist()):
                for key, value in sorted(self.example(split, index, number % 2).items()):
                    digest.update(f"{key} {value.dtype} {value.shape}\n".encode())
                    digest.update(np.ascontiguousarray(value))
        return digest.hexdigest()

    def num_tokens(self, split: str) -> int:
        """Inputs of a split that is one text, which each have a target; for tasks that are `contiguous`."""
        raise UserError(f"task {self.name!r} is no contiguous text")

    def stretch(self, split: str, start: int, length: int) -> dict[str, np.ndarray]:
        """Inputs `start` to `start + length - 1` of a split that is one text; for tasks that are `contiguous`.

        Returns:
          a row as of `example`, filled up with padding behind the end of the text. Its segment ids are those of the documents in
          the whole split, so that the stretch that follows goes on with them.
        """
        raise UserError(f"task {self.name!r} is no contiguous text")

    def completion(self, split: str, index: int) -> tuple[np.ndarray, str]:
        """Token ids that a model is to go on from, and the text that must occur in what it generates up to the end of a line; for
        tasks with `new_tokens`."""
        raise UserError(f"task {self.name!r} has nothing that is generated")

    def text_sizes(self, split: str) -> dict[str, int]:
        """Of texts: the "tokens" that are scored of a whole split, and the "bytes" and "words" that they stand for."""
        return {}

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32, of a text; for tasks of text."""
        raise UserError(f"task {self.name!r} has no text")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; what is no valid text is replaced, never an error. For tasks of text."""
        raise UserError(f"task {self.name!r} has no text")

    def example(self, split: str, index: int, seed: int = 0) -> dict[str, np.ndarray]:
        """One row of the split.

        Train is infinite: every epoch is a new permutation of `num_examples("train")` rows. Valid and test are finite
        and in order.

        Args:
          split: "train", "valid" or "test".
          index: position in the stream of rows.
          seed: of the training rows' order and cutting; valid and test do not depend on it.

        Returns:
          inputs: [length] int32, or [length, channels] float32 where inputs are real, or [2, length] for pairs.
          targets, weights: as `OBJECTIVES` says; int32 or float32, and float32, 0 where the target is not scored.
          segment_ids: [length] int32 ([2, length] for pairs), 0 for padding, else the documents of the row counted from 1.
          positions: like segment_ids, counted from 0 in each segment.

        Raises:
          UserError: for an unknown split.
          IndexError: outside the split.
        """
        check_choice("split", split, self.splits)
        rows = self.num_examples(split)
        if index < 0 or (split != "train" and index >= rows):
            raise IndexError(f"{self.name}: {split} has rows 0 to {rows - 1}, row {index} was asked for")
        if split != "train":
            return self.row(split, index, 0, 0)
        return self.row(split, int(_permuted(rows, seed)[index]), index // rows, seed)


class Outline(Task):
    """A task without its data: there is a name and a spec, and no row."""

    def __init__(self, name: str, spec: Spec):
        self.name, self.spec = name, spec

    def num_examples(self, split: str) -> int:
        raise NotImplementedError(f"{self.name} is an outline, without data")

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        raise NotImplementedError(f"{self.name} is an outline, without data")

    def floors(self, split: str = "test") -> dict[str, float]:
        raise NotImplementedError(f"{self.name} is an outline, without data")


@functools.lru_cache(maxsize=64)
def _permuted(rows: int, seed: int) -> grain.MapDataset:
    """An endless stream of 0..rows-1 in a new order each epoch, with random access and without a table."""
    if rows > MOST_ROWS:
        raise UserError(f"{rows} rows are too many to be shuffled: an epoch has at most {MOST_ROWS}; take longer rows")
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


_PLUGINS = Plugins("task", "data.tasks", Task, root=pathlib.Path(__file__).parent.parent)


def names() -> list[str]:
    """The names of all tasks: the files of `data/tasks/`."""
    return _PLUGINS.names()


def full(name: str) -> str:
    """The name of a task, that of a file of the user's with its whole path; raises a UserError where there is no such file."""
    return _PLUGINS.full(name)


def find(name: str) -> type[Task]:
    """The class of a task.

    Raises:
      UserError: if there is none of that name; the message names the nearest.
    """
    return _PLUGINS.find(name)


def defaults(name: str) -> config_dict.ConfigDict:
    """The hyperparameters of a task and their defaults, read from its constructor's signature."""
    return _PLUGINS.defaults(name)


def outline(name: str, **hyperparameters) -> Task:
    """A task as far as it is known without reading data, see `Task.outline`; arguments and errors are those of `create`."""
    complete = _PLUGINS.complete(name, hyperparameters)
    task = find(name).outline(**complete)
    task.hyperparameters = complete | task.resolved
    return task


def create(name: str, **hyperparameters) -> Task:
    """Builds a task.

    Args:
      name: a file of `data/tasks/`, or the path of another file, ending with .py.
      **hyperparameters: as in `defaults(name)`.

    Raises:
      UserError: for an unknown task or hyperparameter, with the nearest names, and for values that the task refuses.
    """
    complete = _PLUGINS.complete(name, hyperparameters)
    task = find(name).build(**complete)
    task.hyperparameters = complete | task.resolved
    return task
