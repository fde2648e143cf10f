"""Completion of a text by what stands in it: SWDE, FDA and SQuAD as Based scores them (arXiv 2402.18668;
HazyResearch/prefix-linear-attention, lm-eval-harness/), for evaluation.

Read is a file of a JSON object in each line with "text", a document that ends where its value is to follow ("... Director:"),
and "value": a line of hazyresearch/based-swde, based-fda or based-squad. The model generates up to 48 tokens or the end of a
line, and a row is right where the value, whatever its capitals, occurs in them (`contains`). Beside it stands how often the value
is the likeliest continuation, token by token (row accuracy), which is at most as much; training, which generates nothing, reports
that for both.

    <document> Director: | Robert Altman

A text that is longer than `length` loses what is far from the first place of the value, as in JRT (arXiv 2407.05483): a window
with that in its middle is kept, and the last line of the text, of which that is a quarter of the row at most. Lines whose value
has one character are left out, as there.

There is one set of texts: train, valid and test are all of it, so train on something else.
"""

import collections
import json
import pathlib
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import numpy as np

from common.errors import UserError, check_range
from common.files import Folder
from data import lines, lra, shallow, tokenizers
from data.rows import ending_row
from data.task import MOST_IDS, Outline, Spec, Task

LEAST = 32


class Asked(NamedTuple):
    """A text, its last line or what stands for it, and what is to follow.

    Attributes:
      before: the text but its end.
      cue: its end, from the last line on.
      value: what is to follow.
    """

    before: str
    cue: str
    value: str


def _spec(size: int, unit: str, length: int) -> Spec:
    shown = ("contains", "row_accuracy", "accuracy")
    return Spec(size, None, size, "causal_lm", length, unit=unit, padded=True, metrics=shown)


class Completion(Task):
    """Values that complete documents.

    Args:
      data_dir: a folder that holds the file.
      file: its name, or its path in the folder; None for the only .jsonl of the folder. Without a folder, its path.
      length: inputs of a row.
      tokenizer: "byte" or "file:PATH"; see `data/tokenizers.py`.

    Raises:
      UserError: where there is no such file, for a line that is none, for a value that is longer than a quarter of a row, and for
        a tokenizer that loses text.
    """

    paper_size: ClassVar[dict] = {"length": 2048}
    new_tokens: ClassVar[int] = 48

    def __init__(
        self,
        data_dir: Folder | None = None,
        file: str | None = None,
        length: int = 1024,
        tokenizer: str = "byte",
    ):
        check_range("length", length, LEAST, MOST_IDS)
        self.tokenizer = tokenizers.alone(tokenizer)
        path, file = lines.find(data_dir, file, ".jsonl", "the texts")
        content, found = lines.read(path)
        asked = [_asked(path, number, line) for number, line in found]
        self._asked = [one for one in asked if len(one.value) > 1]
        if not self._asked:
            raise UserError(f"{path} holds no text with a value")
        self._rows = [self._ids(one, length, tokenizer) for one in self._asked]
        longest = max(len(value) for _, value in self._rows)
        if longest > length // 4:
            raise UserError(f"length={length} is less than four times the {longest} tokens of a value in {path}")
        self._content = lra.digest(content, tokenizer)
        self.name = f"completion/{path.stem}" + ("" if tokenizer == "byte" else f"/{tokenizer}")
        self.spec = _spec(self.tokenizer.vocab_size, self.tokenizer.unit, length)
        self.resolved = {"file": file}

    @classmethod
    def outline(cls, length: int, tokenizer: str, **_) -> Outline:
        known = tokenizers.alone(tokenizer)
        return Outline("completion", _spec(known.vocab_size, known.unit, length))

    def _ids(self, asked, length, tokenizer):
        """The prompt, cut to what fits, and the value with a blank before it."""
        text = asked.before + asked.cue
        whole = self.encode(text)
        complete = self.encode(f"{text} {asked.value}")
        tokenizers.check_lossless(tokenizer, self.tokenizer, f"{text} {asked.value}", complete)
        value = complete[len(whole) :]
        end = min(len(whole) - len(self.encode(asked.before)), length // 4)
        before, cue = whole[: len(whole) - end], whole[len(whole) - end :]
        # The last token of the value is no input.
        room = length - len(cue) - len(value) + 1
        place = text.lower().find(asked.value.lower())
        middle = len(self.encode(text[:place])) if place >= 0 else len(before)
        start = max(0, min(middle - room // 2, len(before) - room))
        return np.concatenate([before[start : start + max(room, 0)], cue]), value

    def num_examples(self, split: str) -> int:
        return len(self._rows)

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        prompt, value = self._rows[index]
        return ending_row(np.concatenate([prompt, value]), len(value), self.spec.length)

    def completion(self, split: str, index: int) -> tuple[np.ndarray, str]:
        return self._rows[index][0], self._asked[index].value

    def floors(self, split: str = "test") -> dict[str, float]:
        """How often the commonest value of the other rows, and of those with the same last line, where there are any, contain the
        value; and what saying again as many tokens as are generated, from the end of the text or from its beginning, does."""
        values = shallow.commonest_of_others([one.value for one in self._asked])
        by_cue, of_cue = collections.defaultdict(list), list(values)
        for i, one in enumerate(self._asked):
            by_cue[one.cue].append(i)
        for alike in by_cue.values():
            for i, other in zip(alike, shallow.commonest_of_others([self._asked[i].value for i in alike]), strict=True):
                of_cue[i] = values[i] if other is None else other
        prompts = [prompt for prompt, _ in self._rows]
        share = lambda said: float(
            np.mean([one.value.lower() in (text or "").lower() for one, text in zip(self._asked, said, strict=True)])
        )
        return {
            "commonest value": share(values),
            "commonest of the last line": share(of_cue),
            "end of the text": share([self.decode(prompt[-self.new_tokens :]) for prompt in prompts]),
            "beginning of the text": share([self.decode(prompt[: self.new_tokens]) for prompt in prompts]),
        }

    def content(self) -> str:
        return self._content

    def encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)


def _asked(path: pathlib.Path, number: int, line: bytes) -> Asked:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except ValueError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("text", "value")):
        raise UserError(f'{path}, line {number}, is no JSON object with "text" and "value"')
    text, value = record["text"].strip(), record["value"].strip()
    if not text:
        raise UserError(f"{path}, line {number}, has no text")
    before, line_end, cue = text.rpartition("\n")
    return Asked(before + line_end, cue, value)
