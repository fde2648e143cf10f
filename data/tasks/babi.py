"""bAbI (arXiv 1502.05698), questions about small stories, whose facts a long text may hide: BABILong (arXiv 2406.10149;
booydar/babilong, babilong/babilong_utils.py).

Read are the files of the archive tasks_1-20_v1-2.tar.gz: qa1_single-supporting-fact_train.txt and _test.txt of en-10k/ for
kind="qa1", and likewise to qa20. A file of qa1_..._valid.txt is used where there is one, as in en-valid-10k/; else valid is every
tenth story of train.

A row is a question of a story with all that the story says before it, without its other questions. The sentences of the story
stand, in their order, at random places between sentences of `corpus`, which are cut off where the row is full; corpus=None is
bAbI alone (BABILong's 0k), with line ends in front. The row has the form of the language model's, so that a byte-level language
model answers without further training; a row is right where each byte of the answer is the most likely one after what stands
before it.

    <text> Mary moved to the bathroom. <text> John went to the hallway. <text>
    Where is Mary? bathroom

Departures from BABILong. The length is of bytes. The text begins at a random place of the split (there it is read on from row to
row, of PG-19), sentences end at a line's end, or where a full stop, ? or ! stands before a blank, and count from ten words on;
a text without such sentences is cut into pieces of 100 bytes. Stories that are too long for a row are left out. There are no
examples and no instruction in front: this is its form for finetuning. The metric is greedy decoding's, where BABILong looks for
the answer in what is generated.
"""

import collections
import pathlib
import re
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int

from common.errors import UserError, check_choice, check_range
from common.files import Folder, read_bytes
from data import corpora, lra
from data.rows import token_row
from data.task import MOST_IDS, Outline, Spec, Task

KINDS = tuple(f"qa{number}" for number in range(1, 21))
HELD = 10  # of so many stories of train one is of valid, where that has no file
WORDS = 10  # of the shortest sentences of the text
# A stretch of the text in which sentences for a row are looked for is so many times longer than the room for them.
STRETCH = 4
PIECE = 100  # bytes
SENTENCES = re.compile(rb"(?<=[.!?])\s+|\s*\n\s*")


class Question(NamedTuple):
    """What is asked of a story.

    Attributes:
      facts: the sentences of the story before it.
      text: itself, with its question mark.
      answer: of one word, or of several with commas between.
    """

    facts: tuple[str, ...]
    text: str
    answer: str


def _spec(length: int) -> Spec:
    return Spec(256, None, 256, "causal_lm", length, metrics=("row_accuracy", "accuracy"))


class Babi(Task):
    """Questions about stories, which a text surrounds.

    Args:
      facts_dir: the folder with bAbI's files.
      kind: "qa1" to "qa20".
      corpus: a name of `data/corpora.py`; None for none.
      length: inputs of a row, in bytes.
      cache_dir: for fetched text; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.
      data_dir: folder of corpora that are read from one; see `data/corpora.py`.
      download: whether a TFDS data set that is not prepared may be downloaded, which can be gigabytes.

    Raises:
      UserError: where bAbI's files are missing or are none, and where no story fits into a row.
      data.corpora.FetchError: where the corpus must be downloaded and cannot be.
    """

    paper_size: ClassVar[dict] = {"length": 4096}

    def __init__(
        self,
        facts_dir: Folder | None = None,
        kind: str = "qa1",
        corpus: str | None = "shakespeare",
        length: int = 1024,
        cache_dir: Folder | None = None,
        data_dir: Folder | None = None,
        download: bool = False,
    ):
        check_choice("kind", kind, KINDS)
        check_range("length", length, 1, MOST_IDS)
        stories, contents = _read(facts_dir, kind)
        self._questions = {}
        for split, told in stories.items():
            questions = [question for story in told for question in story]
            # The first target follows the first input.
            self._questions[split] = [q for q in questions if len(_row_text(q.facts, q)) <= length + 1]
            if not self._questions[split]:
                raise UserError(
                    f"length={length} is too short for each of the {len(questions)} stories of {kind}'s {split} split: "
                    "give a larger one"
                )
        self.corpus = None
        self.name, self.spec = f"babi/{kind}", _spec(length)
        if corpus is not None:
            self.corpus = corpora.load(corpus, cache_dir, data_dir, download)
            self.name += f"/{self.corpus.name}"
            self.resolved = {"corpus": self.corpus.name}
        self._content = lra.digest(*contents, "" if self.corpus is None else self.corpus.fingerprint)

    @classmethod
    def outline(cls, kind: str, corpus: str | None, length: int, **_) -> Outline:
        return Outline(f"babi/{kind}" + (f"/{corpus}" if corpus else ""), _spec(length))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._questions[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        if split != "train":
            epoch = seed = 0
        question, length = self._questions[split][index], self.spec.length
        rng = np.random.default_rng([self.splits.index(split), epoch, index, seed])
        pieces = [fact.encode() for fact in question.facts]
        if self.corpus is not None:
            around = self._text(rng, split, length + 1 - len(_row_text(pieces, question)))
            for place, fact in zip(np.sort(rng.integers(len(around) + 1, size=len(pieces)))[::-1], pieces[::-1]):
                around.insert(int(place), fact)
            pieces = around
        ids = self.encode(_row_text(pieces, question).rjust(length + 1, b"\n"))
        return token_row(ids[:-1], ids[1:], np.arange(length) >= length - len(question.answer.encode()))

    def _text(self, rng, split, room):
        """Sentences that fill `room` bytes with a blank behind each."""
        stream, found = self.corpus.splits[split].data, []
        while room > 1:
            # Cycled, where the text is shorter.
            places = (rng.integers(len(stream)) + np.arange(STRETCH * room + 200)) % len(stream)
            for sentence in _sentences(np.take(stream, places).astype(np.uint8).tobytes()):
                if room > 1:
                    found.append(sentence[: room - 1])
                    room -= len(found[-1]) + 1
        return found

    def floors(self, split: str = "test") -> dict[str, float]:
        """Row accuracy of the commonest answer of train, of the commonest one to the same question, and of the answer of train
        that the story says last, and first."""
        train, asked = self._questions["train"], self._questions[split]
        common = collections.Counter(q.answer for q in train)
        by_text = collections.defaultdict(collections.Counter)
        for question in train:
            by_text[question.text][question.answer] += 1
        most = common.most_common(1)[0][0]
        same = lambda q: by_text[q.text].most_common(1)[0][0] if q.text in by_text else most

        def mentioned(question, which):
            words = [word for word in re.findall(r"[\w']+", " ".join(question.facts)) if word in common]
            return words[which] if words else most

        share = lambda said: float(np.mean([said(question) == question.answer for question in asked]))
        return {
            "commonest answer": share(lambda q: most),
            "commonest to the question": share(same),
            "said last": share(lambda q: mentioned(q, -1)),
            "said first": share(lambda q: mentioned(q, 0)),
        }

    def content(self) -> str:
        return self._content

    def encode(self, text: str | bytes) -> Int[np.ndarray, "N"]:
        text = text.encode() if isinstance(text, str) else text
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")


def _row_text(pieces: Iterable[str | bytes], question: Question) -> bytes:
    pieces = (piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    return b" ".join(pieces) + f"\n{question.text} {question.answer}".encode()


def _sentences(text: bytes) -> list[bytes]:
    """The sentences of a text of `WORDS` words or more, without the first and the last, which are no whole ones; pieces of it
    where there are none."""
    found = [piece for piece in SENTENCES.split(text)[1:-1] if len(piece.split()) >= WORDS]
    return found or [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def _read(facts_dir: Folder | None, kind: str) -> tuple[dict[str, list[list[Question]]], list[bytes]]:
    """By split the questions of each story, and what the files hold."""
    folder = pathlib.Path(facts_dir or "")
    found = {}
    for split in ("train", "valid", "test"):
        paths = sorted(folder.glob(f"{kind}_*_{split}.txt")) if facts_dir is not None else []
        if len(paths) > 1 or (not paths and split != "valid"):
            raise UserError(
                f"facts_dir={facts_dir} holds {len(paths)} files {kind}_*_{split}.txt: give the folder en-10k of bAbI's "
                "tasks_1-20_v1-2.tar.gz"
            )
        if paths:
            found[split] = paths[0]
    contents = {split: read_bytes(path) for split, path in found.items()}
    stories = {split: _stories(found[split], content) for split, content in contents.items()}
    if "valid" not in stories:
        train = stories["train"]
        stories["valid"] = train[HELD - 1 :: HELD]
        stories["train"] = [story for i, story in enumerate(train) if i % HELD != HELD - 1]
    return stories, list(contents.values())


def _stories(path: pathlib.Path, content: bytes) -> list[list[Question]]:
    """The questions of each story. A line is a number that begins again with each story, a blank, and a sentence; behind a
    question are the answer and the numbers of the facts that it follows from, after tabulators."""
    stories, facts = [], []
    for place, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        number, _, rest = line.partition(" ")
        if not number.isdecimal() or not rest or (not stories and number != "1"):
            raise UserError(f"{path}, line {place} is none of bAbI's: {line[:60]!r}")
        if number == "1":
            stories.append([])
            facts = []
        text, *answer = (part.strip() for part in rest.split("\t"))
        if not answer:
            facts.append(text)
        elif not answer[0]:
            raise UserError(f"{path}, line {place} has no answer: {line[:60]!r}")
        else:
            stories[-1].append(Question(tuple(facts), text, answer[0]))
    return stories
