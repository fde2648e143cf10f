"""The Task contract: examples of a data set, what a model must know of them, and what trivial predictors score.

A task is one file `data/tasks/<name>.py` that defines one subclass of `Task`. Its constructor's signature holds the
hyperparameters and their defaults. Nothing lists the tasks: they are found by looking into the folder.
"""

import abc
import dataclasses
import functools
import typing
from collections.abc import Iterable
from typing import ClassVar

import grain
import numpy as np
from ml_collections import config_dict

from common.errors import UserError, check_choice
from common.plugins import Plugins

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
      metric: what the task is judged by: "bits_per_<unit>", "accuracy", "row_accuracy" (all labels of a row are right),
        "rmse", "mae" or "angular_error". By default the first for language models, accuracy for classes, rmse for numbers.
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
    metric: str = ""

    def __post_init__(self):
        if (self.vocab_size is None) == (self.channels is None):
            raise UserError("a task has either tokens (vocab_size) or real inputs (channels): set exactly one")
        check_choice("objective", self.objective, OBJECTIVES)
        if self.length < 1:
            raise UserError(f"length={self.length} must be at least 1")
        if self.objective == "causal_lm":
            object.__setattr__(self, "causal", True)
        if not self.unit:
            object.__setattr__(self, "unit", UNITS[self.objective])
        if not self.metric:
            real = self.objective in ("regression", "token_regression")
            usual = f"bits_per_{self.unit}" if self.objective == "causal_lm" else "rmse" if real else "accuracy"
            object.__setattr__(self, "metric", usual)

    @property
    def segmented(self) -> bool:
        """Whether models get segment_ids; without them they take their fast paths."""
        return self.packed or self.padded

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the metric is better."""
        return self.metric.endswith("accuracy")


class Task(abc.ABC):
    """A data set as rows that are pure functions of (seed, split, index).

    Attributes:
      name: the task and the data it reads, for reports.
      spec: what a model needs to know.
      paper: the hyperparameters of the published size.
      seed: the order and the cutting of the training rows where the caller gives no seed of its own.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test")
    name: str
    spec: Spec
    paper: ClassVar[dict[str, typing.Any]] = {}
    seed: int = 0

    @abc.abstractmethod
    def num_examples(self, split: str) -> int:
        """Rows of the split; for train, rows of one epoch."""

    @abc.abstractmethod
    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Row `index` < num_examples(split), before any shuffling; `epoch` and `seed` matter to train only."""

    @abc.abstractmethod
    def floors(self, split: str = "test") -> dict[str, float]:
        """What trivial predictors score on the split, in the unit of the task's metric."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the data, in hexadecimal."""

    def text_sizes(self, split: str) -> dict[str, int]:
        """Of texts: the "tokens" that are scored of a whole split, and the "bytes" and "words" that they stand for."""
        return {}

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32, of a text; for tasks of text."""
        raise UserError(f"task {self.name!r} has no text")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; what is no valid text is replaced, never an error. For tasks of text."""
        raise UserError(f"task {self.name!r} has no text")

    def example(self, split: str, index: int, seed: int | None = None) -> dict[str, np.ndarray]:
        """One row of the split.

        Train is infinite: every epoch is a new permutation of `num_examples("train")` rows. Valid and test are finite
        and in order.

        Args:
          split: "train", "valid" or "test".
          index: position in the stream of rows.
          seed: of the training rows' order and cutting; the task's own by default.

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
        seed = self.seed if seed is None else seed
        return self.row(split, int(_permuted(rows, seed)[index]), index // rows, seed)


@functools.lru_cache(maxsize=64)
def _permuted(rows: int, seed: int) -> grain.MapDataset:
    """An endless stream of 0..rows-1 in a new order each epoch, with random access and without a table."""
    if rows > 2**32:
        raise UserError(f"{rows} rows are too many to be shuffled; let num_examples('train') be at most 2**32")
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


_PLUGINS = Plugins("task", "data.tasks", Task)


def names() -> list[str]:
    """The names of all tasks: the files of `data/tasks/`."""
    return _PLUGINS.names()


def find(name: str) -> type[Task]:
    """The class of a task.

    Raises:
      UserError: if there is none of that name; the message names the nearest.
    """
    return _PLUGINS.find(name)


def defaults(name: str) -> config_dict.ConfigDict:
    """The hyperparameters of a task and their defaults, read from its constructor's signature."""
    return _PLUGINS.defaults(name)


def create(name: str, **hyperparameters) -> Task:
    """Builds a task.

    Args:
      name: a file of `data/tasks/`.
      **hyperparameters: as in `defaults(name)`.

    Raises:
      UserError: for an unknown task or hyperparameter, with the nearest names, and for values that the task refuses.
    """
    _PLUGINS.check(name, hyperparameters)
    return find(name)(**hyperparameters)
