"""What tasks whose rows are drawn at random have in common: streams of random numbers, and floors."""

import abc
from collections.abc import Iterator

import numpy as np

from common.errors import check_choice
from data.task import Task


class GeneratedTask(Task):
    """A task whose row is drawn from random numbers that belong to (seed, split, epoch, index) alone.

    Training rows are new in every epoch. Valid and test are fixed and know nothing of the seed.

    Attributes:
      sizes: rows of each split; for train, rows that are called an epoch.
    """

    floors_of_rows = True
    sizes: dict[str, int] = {"train": 100_000, "valid": 1_000, "test": 1_000}

    @abc.abstractmethod
    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One row of the split."""

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return self.sizes[split]

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        if split != "train":
            epoch = seed = 0
        # The seed comes last: SeedSequence cuts a large one into several words, which must not be taken for an index.
        words = [self.splits.index(split), epoch, index, seed]
        # As an array they give the same numbers, and sooner.
        return self.draw(split, np.random.default_rng(np.array(words, np.uint32) if max(words) < 2**32 else words))

    def rows(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        """All rows of valid or test, for floors.

        Raises:
          UserError: for train, which has no end.
        """
        check_choice("split", split, ("valid", "test"))
        for index in range(self.num_examples(split)):
            yield self.row(split, index, 0, 0)


def majority(task: GeneratedTask, split: str) -> float:
    """The share of the most common label among the scored labels of a split."""
    counts = np.zeros(task.spec.targets, np.int64)
    for row in task.rows(split):
        counts += np.bincount(row["targets"][row["weights"] > 0], minlength=len(counts))
    return float(counts.max() / counts.sum())


def most_frequent_label(task: GeneratedTask, split: str) -> float:
    """The accuracy of answering each question with the label that was most often among the row's inputs up to there.

    Only what the split asks for is answered; of equally frequent labels each is taken equally often.
    """
    rows = [(row["inputs"], row["targets"], row["weights"] > 0) for row in task.rows(split)]
    labels = np.unique(np.concatenate([targets[scored] for _, targets, scored in rows]))
    right, asked = 0.0, 0
    for inputs, targets, scored in rows:
        counts = np.cumsum(inputs[:, None] == labels, 0, dtype=np.int32)[scored]
        best = counts == counts.max(1, keepdims=True)
        right += (best & (targets[scored, None] == labels)).sum(1) @ (1 / best.sum(1))
        asked += len(counts)
    return float(right / asked)
