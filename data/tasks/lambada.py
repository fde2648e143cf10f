"""LAMBADA (arXiv 1606.06031): the last word of a passage, which only the whole passage tells; for evaluation.

Read is a file of a JSON object with "text" in each line, such as lambada_test.jsonl of OpenAI's form (EleutherAI/lambada_openai;
of cimec/lambada the tokens are other ones, and so are the numbers, by points: say which). The word behind the last blank is asked
for, with the blank: a row is right where each of its tokens is the likeliest after those before it, which is what greedy
decoding says, and the perplexity per word is that of the papers. A passage that is longer than `length` loses its beginning.

    <passage but its last word> | <blank and last word>

There is one set of passages: train, valid and test are all of it, so train on something else. lm-evaluation-harness has the task,
too (`python -m evaluation.harness --tasks=lambada_openai`), and fetches the passages.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_range
from common.files import Folder
from data import lines, lra, metrics, shallow, tokenizers
from data.rows import ending_row
from data.task import MOST_IDS, Outline, Spec, Task

WORD = re.compile(r"\w+(?:[-'’]\w+)*")
# exp of the mean over rows of the nats of a word.
WORD_PERPLEXITY = dataclasses.replace(
    metrics.WORD_PERPLEXITY,
    value=lambda sums: math.exp(min(sums["nats"] / sums["rows"], 700.0)),
    sums=metrics.row_sums,
    whole_rows=True,
)


def _spec(size: int, unit: str, length: int) -> Spec:
    return Spec(
        size,
        None,
        size,
        "causal_lm",
        length,
        unit=unit,
        padded=True,
        metrics=("row_accuracy", WORD_PERPLEXITY, "accuracy"),
    )


class Lambada(Task):
    """Last words of passages.

    Args:
      data_dir: a folder that holds the file.
      file: its name, or its path in the folder; None for the only .jsonl of the folder. Without a folder, its path.
      length: inputs of a row.
      tokenizer: "byte" or "file:PATH"; see `data/tokenizers.py`.

    Raises:
      UserError: where there is no such file, for a line that is no passage, for a word that is longer than a row, and for a
        tokenizer that loses text.
    """

    paper_size: ClassVar[dict] = {}  # there is one set

    def __init__(
        self, data_dir: Folder | None = None, file: str | None = None, length: int = 1024, tokenizer: str = "byte"
    ):
        check_range("length", length, 1, MOST_IDS)
        self.tokenizer = tokenizers.alone(tokenizer)
        path, file = lines.find(data_dir, file, ".jsonl", "the passages")
        content, found = lines.read(path)
        self._texts = [_passage(path, number, line) for number, line in found]
        if not self._texts:
            raise UserError(f"{path} holds no passage")
        self._rows = [self._ids(text, tokenizer) for text in self._texts]
        longest = max(len(word) for _, word in self._rows)
        if longest > length:
            raise UserError(f"length={length} is less than the {longest} tokens of a word in {path}")
        self._content = lra.digest(content, tokenizer)
        self.name = f"lambada/{path.stem}" + ("" if tokenizer == "byte" else f"/{tokenizer}")
        self.spec = _spec(self.tokenizer.vocab_size, self.tokenizer.unit, length)
        self.resolved = {"file": file}

    @classmethod
    def outline(cls, length: int, tokenizer: str, **_) -> Outline:
        known = tokenizers.alone(tokenizer)
        return Outline("lambada", _spec(known.vocab_size, known.unit, length))

    def _ids(self, text: tuple[str, str], tokenizer: str) -> tuple[np.ndarray, np.ndarray]:
        before, whole = self.encode(text[0]), self.encode("".join(text))
        tokenizers.check_lossless(tokenizer, self.tokenizer, "".join(text), whole)
        return whole[: len(before)], whole[len(before) :]

    def num_examples(self, split: str) -> int:
        return len(self._rows)

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        before, word = self._rows[index]
        length = self.spec.length
        return ending_row(np.concatenate([before, word])[-length - 1 :], len(word), length)

    def text_sizes(self, split: str) -> dict[str, int]:
        """What bits per byte are reckoned with."""
        return {
            "tokens": sum(len(word) for _, word in self._rows),
            "bytes": sum(len(word.encode()) for _, word in self._texts),
        }

    def floors(self, split: str = "test") -> dict[str, float]:
        """Row accuracy of the commonest last word of the other passages, and of the word of the passage that is the commonest in
        it, of equal ones the last; and the same of its names, which are words that begin with a capital here and with none in no
        passage."""
        last = [word for _, word in self._texts]
        most = float(
            np.mean([other == own for other, own in zip(shallow.commonest_of_others(last), last, strict=True)])
        )
        words = [WORD.findall(before) for before, _ in self._texts]
        small = {word for own in words for word in own if word[0].islower()}
        right = np.zeros(2)
        for own, word in zip(words, last):
            names = [one for one in own if one[0].isupper() and one[0].lower() + one[1:] not in small]
            for i, known in enumerate((own, names)):
                counts = collections.Counter(reversed(known))
                right[i] += bool(counts) and f" {max(counts, key=counts.get)}" == word
        passage, name = (right / len(last)).tolist()
        return {
            "commonest last word": most,
            "commonest of the passage": passage,
            "commonest name of the passage": name,
        }

    def content(self) -> str:
        return self._content

    def encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)


def _passage(path: pathlib.Path, number: int, line: bytes) -> tuple[str, str]:
    """A passage without its last word, and a blank and that word."""
    try:
        text = json.loads(line)["text"].strip()
        text.encode()  # half of a surrogate pair is no text
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f'{path}, line {number}, is no JSON object with a string "text"') from None
    before, _, word = text.rpartition(" ")
    if not before:
        raise UserError(f"{path}, line {number}, has one word only: nothing tells it")
    return before, f" {word}"
