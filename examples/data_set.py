"""A data set of Hugging Face or PyTorch, or a list, as a task: anything with `len(data)` and `data[i]`.

    python -m examples.data_set --workdir=runs/data_set

Trains a classifier of short texts on a few lines that are made here, so that it runs without a network, and scores it. With the
data sets of others, `splits` below is one of these:

    data = datasets.load_dataset("imdb")                                    # Hugging Face: {"text": ..., "label": ...} by index
    return {"train": data["train"], "valid": data["test"], "test": data["test"]}

    return {"train": MyDataset("train"), ...}                               # torch.utils.data.Dataset, returning such dicts

A file with one subclass of `Task` is a task by its path, wherever it lies, for `train.py`, `eval.py` and `sweep.py`:

    python train.py --config=configs/lra.py:task=examples/data_set.py,mixer=gla --workdir=runs/data_set
    python eval.py --workdir=runs/data_set

A task that others are to have, too, belongs into `data/tasks/<name>.py`, where it has a short name, and the tests find it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common import command
from configs import lra
from data.rows import class_row
from data.task import Spec, Task
from evaluation.loading import load
from evaluation.scoring import score
from training.config import resolve
from training.loop import train


class Texts(Task):
    """Classification of texts, byte by byte.

    What the constructor takes, each with a default, are the keys `config.task.*`: they suffice to build the task anew.

    Args:
      rows: of training.
      length: bytes of a row; longer texts are cut, shorter ones padded.
    """

    def __init__(self, rows: int = 1000, length: int = 24):
        self.name = "texts"
        self._data = splits(rows)
        # Id 0 is padding, so there are 257 ids. `padded` tells that models need the segment ids.
        self.spec = Spec(
            vocab_size=257, channels=None, targets=2, objective="classification", length=length, padded=True
        )

    def num_examples(self, split: str) -> int:
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Shuffling, batches, devices and resuming are the loader's: a row is a function of its index alone."""
        example = self._data[split][index]
        text = np.frombuffer(example["text"].encode()[: self.spec.length], np.uint8)
        # A dict of arrays: inputs, targets, weights, and segment_ids (1 for the text, 0 for padding) and positions.
        return class_row(text.astype(np.int32) + 1, example["label"], self.spec.length)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent label."""
        labels = [example["label"] for example in self._examples(split)]
        return {"majority": max(labels.count(label) for label in set(labels)) / len(labels)}

    def content(self) -> str:
        """SHA-256 of all examples: a run refuses to go on with others. (Hugging Face has one: `data["train"]._fingerprint`.)"""
        digest = hashlib.sha256()
        for split in self.splits:
            for example in self._examples(split):
                digest.update(f"{split}\0{example['label']}\0{example['text']}\n".encode())
        return digest.hexdigest()

    def _examples(self, split: str):
        return (self._data[split][i] for i in range(self.num_examples(split)))


def made_up(count: int, seed: int) -> list[dict[str, Any]]:
    """Lines that praise (1) or do not (0)."""
    rng = np.random.default_rng(seed)
    words = (["bad", "dull", "grey"], ["good", "bright", "fine"])
    labels = rng.integers(2, size=count)
    return [{"text": "a " + " and ".join(rng.choice(words[label], 3)), "label": int(label)} for label in labels]


def splits(rows: int) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """A map-style data set for each split, of examples {"text": str, "label": int}."""
    return {"train": made_up(rows, 0), "valid": made_up(64, 1), "test": made_up(64, 2)}


def main(workdir: str, mixer: str, steps: int) -> None:
    """What the two commands above do, made small."""
    chosen = lra.get_config(f"task=examples/data_set.py,mixer={mixer}")
    chosen.model.update({"width": 32, "depth": 1})
    chosen.optimizer.warmup_steps = 2
    chosen.train.update({"steps": steps, "log_every": 5, "eval_every": 0, "checkpoint_every": 0})
    train(resolve(chosen), workdir)
    score(load(workdir), "test")


def run(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    command.start()
    main(**vars(options))


if __name__ == "__main__":
    command.run(run)
