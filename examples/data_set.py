"""A data set of Hugging Face or PyTorch, or a list, as a task: anything with `len(data)` and `data[i]`.

    python -m examples.data_set --workdir=runs/data_set

Trains a classifier of short texts on a few lines that are made here, so that it runs without a network. With the data sets of
others, the first line of `main` is one of these:

    data = datasets.load_dataset("imdb")                                    # Hugging Face: {"text": ..., "label": ...} by index
    splits = {"train": data["train"], "valid": data["test"], "test": data["test"]}

    splits = {"train": MyDataset("train"), ...}                             # torch.utils.data.Dataset, returning such dicts

A task that is to stay belongs into a file of its own, `data/tasks/<name>.py`, which loads the data set in the constructor: the
class below can be moved there as it is, once its constructor takes settings with defaults (a name, a length) in place of the
data. From then on the configurations, `eval.py`, `sweep.py` and the tests find it by the file's name. A run that was trained on a
task built in Python, as here, is a run like any other, but `eval.py` cannot build the task anew and so cannot score it.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from configs import lra
from data.rows import class_row
from data.task import Spec, Task
from training.config import resolve
from training.loop import train


class Texts(Task):
    """Classification of texts, byte by byte.

    Args:
      splits: a map-style data set for each of "train", "valid" and "test", of examples {"text": str, "label": int}.
      classes: number of labels.
      length: bytes of a row; longer texts are cut, shorter ones padded.
    """

    def __init__(self, splits: Mapping[str, Sequence[Mapping[str, Any]]], classes: int, length: int):
        self.name = "texts"
        self._data = splits
        # Id 0 is padding, so there are 257 ids. `padded` tells that models need the segment ids.
        self.spec = Spec(
            vocab_size=257, channels=None, targets=classes, objective="classification", length=length, padded=True
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


def main(workdir: str, mixer: str, steps: int) -> None:
    splits = {"train": made_up(1000, 0), "valid": made_up(64, 1), "test": made_up(64, 2)}
    task = Texts(splits, classes=2, length=24)

    # The training of an experiment file, here that of the Long Range Arena, made small, with this task in place of the file's.
    chosen = lra.get_config(f"task=max_gap,mixer={mixer}")
    chosen.model.update({"width": 32, "depth": 1, "length": task.spec.length})
    chosen.optimizer.warmup_steps = 2
    chosen.train.update({"steps": steps, "log_every": 5, "eval_every": 0, "checkpoint_every": 0})
    resolved = resolve(chosen)
    model = dataclasses.replace(resolved.model, vocab_size=task.spec.vocab_size, targets=task.spec.targets)
    raw = {**resolved.raw, "task": {"name": task.name}}  # what config.json will hold
    train(dataclasses.replace(resolved, task=task, model=model, raw=raw), workdir)
    print(f"floors of valid: {task.floors('valid')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # the input pipeline reads absl's flags
    main(**vars(options))
