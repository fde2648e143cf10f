"""Mixtures of corpora: rows of several texts in given shares, "mix:CORPUS*WEIGHT+CORPUS*WEIGHT".

Of the training rows of an epoch, as many as the texts have in all, each text gets its share, to the row, in an order that is
drawn anew in each epoch. They are the examples of that text alone, one after the other: none of its rows comes twice before all
have come, a small text is repeated with new cuttings, and of a large one the next epoch reads what the last one has left.
valid and test are those of the texts one after the other, whole, whatever their weights.

Weights are relative: 7 and 3 are 0.7 and 0.3; those of a text that is given twice are added. Names of corpora may hold + and *,
as their files do: a name ends where a * stands before a number that ends the mixture or is followed by +.
"""

import collections
import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from common.errors import UserError, check_choice
from common.files import cache_folder
from data import corpora, tokenized, tokenizers
from data.corpus import Corpus
from data.task import Task

KIND = "mix:"


def parse(name: str) -> list[tuple[str, float]]:
    """The corpora of a mixture and their weights.

    Raises:
      UserError: for what is no mixture.
    """
    number = r"((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
    found = re.findall(rf"(.+?)\*{number}(?:\+|$)", name.removeprefix(KIND))
    spelled = "+".join(f"{corpus}*{weight}" for corpus, weight in found)
    weights = [float(weight) for _, weight in found]
    if spelled != name.removeprefix(KIND) or len(found) < 2 or not 0 < min(weights) <= sum(weights) < math.inf:
        raise UserError(
            f"corpus={name!r} is no mixture: give two corpora or more with weights above 0 and a finite sum, as in "
            "'mix:file:books*0.7+jsonl:web*0.3'"
        )
    if any(corpus.startswith(KIND) for corpus, _ in found):
        raise UserError(f"corpus={name!r}: a mixture holds no mixtures; give all corpora and their weights in one")
    return [(corpus, weight) for (corpus, _), weight in zip(found, weights, strict=True)]


def spell(found: Iterable[tuple[str, float]]) -> str:
    """The name that `parse` reads as these corpora and weights, to the last bit."""
    return KIND + "+".join(f"{corpus}*{weight!r}" for corpus, weight in found)


def build(kind: type[Task], **hyperparameters) -> Task:
    """The task of text `kind`, or a mixture of such tasks where its corpus is one.

    Raises:
      UserError: as `parse` and the task do.
    """
    corpus, tokenizer = hyperparameters["corpus"], hyperparameters["tokenizer"]
    if not corpus.startswith(KIND):
        return kind(**hyperparameters)
    where = {key: hyperparameters[key] for key in ("cache_dir", "data_dir", "download")}
    # One text that is named twice would have its rows shown, and scored, twice.
    weights = collections.defaultdict(float)
    for name, weight in parse(corpus):
        weights[corpora.load(name, **where, ids=True).name] += weight
    found = list(weights.items())
    if len(found) == 1:
        return kind(**hyperparameters | {"corpus": found[0][0]})
    if tokenizer == "character":
        raise UserError(
            "tokenizer='character' is made of one text; take 'byte', 'bpe:SIZE' or 'file:PATH' for a mixture"
        )
    resolved = tokenizer
    if tokenizer.startswith("bpe:"):
        size, _ = tokenizers.outline(tokenizer)
        total = sum(weight for _, weight in found)
        texts = [(corpora.load(name, **where), weight / total) for name, weight in found]
        digest = hashlib.sha256(repr([(text.fingerprint, part) for text, part in texts]).encode()).hexdigest()
        cache = cache_folder(hyperparameters["cache_dir"])
        tokenizer = f"file:{tokenized.train_bpe(f'{digest[:32]}-bpe{size}', texts, size, cache)}"
    parts = [kind(**hyperparameters | {"corpus": name, "tokenizer": tokenizer}) for name, _ in found]
    _check_apart([part.corpus for part in parts])
    if not resolved.startswith("bpe:"):
        resolved = parts[0].resolved["tokenizer"]
    return Mixture(parts, [weight for _, weight in found], resolved)


def _check_apart(corpora: Sequence[Corpus]) -> None:
    """Raises a UserError where a file of one corpus' train is of another one, too, which cuts it into splits of its own: what is
    learned would be what is scored."""
    for one, other in itertools.permutations(corpora, 2):
        learned = {os.path.realpath(file) for file in one.files.get("train", ())}
        for file in (file for files in other.files.values() for file in files if one.name != other.name):
            if os.path.realpath(file) in learned:
                raise UserError(
                    f"{file} is of train of {one.name!r} and of {other.name!r}, and each cuts its files into splits of its own: "
                    "give it in one of the two, or both in the same words"
                )


class Mixture(Task):
    """Rows of several tasks that differ in their corpus.

    Args:
      parts: the tasks.
      weights: of each, in the training rows; their ratios count.
      tokenizer: of all of them, for `resolved`.

    Raises:
      UserError: where training rows are asked for, for a text of which none is read.
    """

    def __init__(self, parts: Sequence[Task], weights: Sequence[float], tokenizer: str):
        self.parts, self.weights = list(parts), list(weights)
        self.spec, self.tokenizer = parts[0].spec, parts[0].tokenizer
        # The weights as they were given, so that the name gives the same rows again.
        name = spell(zip((part.resolved["corpus"] for part in parts), weights, strict=True))
        self.name = f"{parts[0].name.partition('/')[0]}/{name}" + (f"/{tokenizer}" if tokenizer != "byte" else "")
        self.resolved: dict[str, Any] = {"corpus": name, "tokenizer": tokenizer}
        self._found: dict[str, np.ndarray] = {}

    def _starts(self, split: str) -> np.ndarray:
        """Where the rows of each part begin, and where the last one's end. Those of train are reckoned when they are asked for:
        at a length that leaves a text no row to be trained on, valid and test can be scored."""
        if split not in self._found:
            ends = np.cumsum([part.num_examples(split) for part in self.parts])
            if split == "train":
                ends = np.round(np.cumsum(self.weights) / sum(self.weights) * ends[-1]).astype(np.int64)
                for part, rows in zip(self.parts, np.diff(ends, prepend=0), strict=True):
                    if not rows:
                        raise UserError(
                            f"corpus={self.resolved['corpus']!r}: {part.resolved['corpus']!r} gets none of the {ends[-1]:,} rows "
                            "of an epoch; give it more weight, or leave it out"
                        )
            self._found[split] = np.append(0, ends)
        return self._found[split]

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return int(self._starts(split)[-1])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        starts = self._starts(split)
        part = int(np.searchsorted(starts, index, "right")) - 1
        place, size = index - int(starts[part]), int(starts[part + 1] - starts[part])
        return self.parts[part].example(split, epoch * size + place, seed)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Those of the texts, in bits per token, by their scored tokens (or rows, where these are of one size)."""
        check_choice("split", split, ("valid", "test"))
        tables = [part.floors(split) for part in self.parts]
        weights = [part.text_sizes(split).get("tokens", part.num_examples(split)) for part in self.parts]
        # The best n-gram is not of the same order for all.
        tables = [{re.sub(r" \(order \d+\)$", "", name): value for name, value in table.items()} for table in tables]
        names = [name for name in tables[0] if all(name in table for table in tables)]
        return {name: float(np.average([table[name] for table in tables], weights=weights)) for name in names}

    def text_sizes(self, split: str) -> dict[str, int]:
        sizes = [part.text_sizes(split) for part in self.parts]
        return {what: sum(one[what] for one in sizes) for what in sizes[0] if all(what in one for one in sizes)}

    def content(self) -> str:
        return " ".join(f"{part.content()}*{weight!r}" for part, weight in zip(self.parts, self.weights, strict=True))

    def encode(self, text: str) -> np.ndarray:
        return self.parts[0].encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.parts[0].decode(ids)
