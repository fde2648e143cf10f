"""RULER: needles, chains of variables, counts of words and questions about documents in a long text (arXiv 2404.06654;
NVIDIA/RULER, scripts/data/synthetic/), its thirteen tasks by `kind`.

kind                     text      key    value   keys values asked
single_1 (S-NIAH-1)      noise     word   number  1    1      1
single_2 (S-NIAH-2)      corpus    word   number  1    1      1
single_3 (S-NIAH-3)      corpus    word   uuid    1    1      1
multikey_1               corpus    word   number  4    1      1
multikey_2               needles   word   number  all  1      1
multikey_3               needles   uuid   uuid    all  1      1
multivalue               corpus    word   number  1    4      4
multiquery               corpus    word   number  4    1      4
vt                       noise: a number is given to a variable, and on to four others; which are they?
cwe                      a list of words: the ten that come most often (6 times, from length 4096 on 30; the others once, or 3)
fwe                      words by Zipf's law with exponent 2, of which the most frequent is "...": the next three
qa_1, qa_2               documents of invented people and towns: where one lives, and in which land that town is

A row is text as bytes that ends with the answer, in the form of the language model's, so that a byte-level language model answers
without further training. A row is right where each byte of the answer is the most likely one after what stands before it. What is
left of the length is line ends in front.

Departures. The length is of bytes. Where there are several answers they are expected in the order of the text (of the question
for multiquery, of their counts for fwe), where the source takes them in any: numbers of vt, cwe, fwe, multivalue and multiquery
are lower bounds. Words are invented (the source draws on lists of English ones), the corpus stands for its essays, the documents
for SQuAD and HotpotQA, and vt and cwe have no worked example in front.
"""

import bisect
import itertools
import math
import uuid
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder
from data import corpora
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Outline, Spec

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "One of the special magic {kind} for {key} is: {value}.\n"
NEEDLES = {  # text, kind of keys and of values, keys, values of a key, keys that are asked for
    "single_1": ("noise", "words", "numbers", 1, 1, 1),
    "single_2": ("corpus", "words", "numbers", 1, 1, 1),
    "single_3": ("corpus", "words", "uuids", 1, 1, 1),
    "multikey_1": ("corpus", "words", "numbers", 4, 1, 1),
    "multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "multivalue": ("corpus", "words", "numbers", 1, 4, 1),
    "multiquery": ("corpus", "words", "numbers", 4, 1, 4),
}
KINDS = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
LEAST, MOST = 1024, 2**22
COMMON, LONG = 10, 4096  # words of cwe, and the length from which on they come more often
HOPS = 4
ZIPF = 2


def _spec(length: int) -> Spec:
    return Spec(256, None, 256, "causal_lm", length, metrics=("row_accuracy", "accuracy"))


class Ruler(GeneratedTask):
    """One of the thirteen tasks.

    Args:
      kind: a name of the table above.
      length: inputs of a row, in bytes.
      corpus: a name of `data/corpora.py`, for the kinds whose text is one; the others read none.
      cache_dir: for fetched text; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.
      data_dir: folder of corpora that are read from one; see `data/corpora.py`.
      download: whether a TFDS data set that is not prepared may be downloaded, which can be gigabytes.

    Raises:
      UserError: for an unknown kind or corpus, and a length out of range.
      data.corpora.FetchError: where the corpus must be downloaded and cannot be.
    """

    sizes: dict[str, int] = {"train": 100_000, "valid": 100, "test": 500}
    paper_size: ClassVar[dict] = {"length": 4096}

    def __init__(
        self,
        kind: str = "single_2",
        length: int = LEAST,
        corpus: str = "shakespeare",
        cache_dir: Folder | None = None,
        data_dir: Folder | None = None,
        download: bool = False,
    ):
        check_choice("kind", kind, KINDS)
        if not LEAST <= length <= MOST:
            raise UserError(f"length={length} must be {LEAST} to {MOST} bytes")
        self.name, self.spec = f"ruler/{kind}", _spec(length)
        self.kind, self.corpus = kind, None
        if kind in NEEDLES and NEEDLES[kind][0] == "corpus":
            self.corpus = corpora.load(corpus, cache_dir, data_dir, download)
            self.name += f"/{self.corpus.name}"
            self.resolved = {"corpus": self.corpus.name}

    @classmethod
    def outline(cls, kind: str, length: int, **_) -> Outline:
        return Outline(f"ruler/{kind}", _spec(length))

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text, answer, _ = self.text(split, rng)
        length = self.spec.length
        ids = np.frombuffer(text, np.uint8).astype(np.int32)
        ids = np.pad(ids, (length + 1 - len(ids), 0), constant_values=ord("\n"))
        return token_row(ids[:-1], ids[1:], np.arange(length) >= length - len(answer))

    def text(self, split: str, rng: np.random.Generator) -> tuple[bytes, str, float]:
        """The text of a row with its answer, the answer, and one in how many guesses is right where the text is only known to
        hold the parts of the answer, in their order if that is the answer's."""
        if self.kind in NEEDLES:
            return self._needles(split, rng)
        body, question, answer, guesses = getattr(self, f"_{self.kind.split('_')[0]}")(rng)
        return (body + question + answer).encode(), answer, guesses

    def _needles(self, split, rng):
        haystack, key_kind, value_kind, num_keys, num_values, asked = NEEDLES[self.kind]
        draw = {"words": _compound, "numbers": _number, "uuids": _uuid}
        keys = _different(draw[key_kind], rng, num_keys)
        values = _different(draw[value_kind], rng, num_keys * num_values)
        needles = [NEEDLE.format(kind=value_kind, key=keys[i // num_values], value=v) for i, v in enumerate(values)]
        order = rng.permutation(len(needles))
        wanted = [int(i) for i in order if i // num_values == 0] if num_values > 1 else list(range(asked))
        answers, query = [values[i] for i in wanted], _list(keys[:asked])
        several = len(answers) > 1
        some, are, s = ("Some", "are all", "") if several else ("A", "is", value_kind[:-1])
        name = s or value_kind
        head = (
            f"{some} special magic {name} {'are' if several else 'is'} hidden within the following text. "
            f"Make sure to memorize it. I will quiz you about the {name} afterwards.\n"
        )
        question = f"What {are} the special magic {name} for {query} mentioned in the provided text? "
        question += f"The special magic {name} for {query} mentioned in the provided text {'are' if several else 'is'} "
        answer = ", ".join(answers)
        room = self.spec.length + 1 - len(head) - len(question) - len(answer)
        candidates = len(values)
        if haystack == "needles":
            count = room // 60  # no needle is shorter
            others = zip(_different(draw[key_kind], rng, count), _different(draw[value_kind], rng, count))
            filler = [NEEDLE.format(kind=value_kind, key=key, value=value) for key, value in others if key not in keys]
            filler = filler[: _fitting(map(len, filler), room - sum(map(len, needles)))]
            candidates += len(filler)
        elif haystack == "noise":
            filler = [NOISE] * ((room - sum(map(len, needles))) // len(NOISE))
        if haystack != "corpus":
            for place, needle in zip(np.sort(rng.integers(len(filler) + 1, size=len(needles)))[::-1], order[::-1]):
                filler.insert(int(place), needles[needle])
            body = "".join(filler).encode()
        else:
            stream = self.corpus.splits[split].data
            size = room - sum(map(len, needles)) - 2 * len(needles)
            # Cycled, as the source does.
            stream = (
                np.take(stream, rng.integers(len(stream)) + np.arange(size), mode="wrap").astype(np.uint8).tobytes()
            )
            cuts = [0, *np.sort(rng.integers(size + 1, size=len(needles))).tolist(), size]
            pieces = [stream[a:b] for a, b in itertools.pairwise(cuts)]
            body = pieces[0] + b"".join(
                b"\n" + needles[needle].encode() + piece for needle, piece in zip(order, pieces[1:], strict=True)
            )
            body += b"\n"
        # Of several values of one key there are no others.
        guesses = 1 if num_values > 1 else math.perm(candidates, asked)
        return head.encode() + body + question.encode() + answer.encode(), answer, guesses

    def _vt(self, rng):
        names = _different(lambda rng: "".join(chr(65 + i) for i in rng.integers(26, size=5)), rng, HOPS + 1)
        value = int(rng.integers(10_000, 99_999))
        chain = [f"VAR {names[0]} = {value}\n"] + [f"VAR {b} = VAR {a}\n" for a, b in itertools.pairwise(names)]
        head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
        question = f"Find all variables that are assigned the value {value} in the text above: they are "
        answer = ", ".join(names)
        room = self.spec.length + 1 - sum(map(len, [head, question, answer, *chain]))
        lines = [NOISE] * (room // len(NOISE))
        for place, link in zip(np.sort(rng.choice(len(lines) + 1, len(chain), replace=False))[::-1], chain[::-1]):
            lines.insert(int(place), link)
        return head + "".join(lines), question, answer, 1  # there are no other variables

    def _cwe(self, rng):
        often, rarely = (30, 3) if self.spec.length >= LONG else (6, 1)
        head = "Below is a numbered list of words. Memorize the ones that appear most often.\n"
        question = "\nWhat are the 10 most common words in the above list? They are "
        words = _different(_word, rng, COMMON + 1 + (self.spec.length - 9 * COMMON * often) // (9 * rarely))
        common, others = words[:COMMON], words[COMMON:]
        room = self.spec.length + 1 - len(head) - len(question) - len(", ".join(common))
        listed = common * often + [word for word in others for _ in range(rarely)]
        # A word with its number, a dot and two blanks, wherever it will be.
        fitting = _fitting((len(word) + len(str(i)) + 3 for i, word in enumerate(listed, 1)), room)
        fitting -= (fitting - COMMON * often) % rarely
        listed = [listed[i] for i in rng.permutation(fitting)]
        answer = ", ".join(dict.fromkeys(word for word in listed if word in common))
        body = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return head + body, question, answer, math.comb(len(set(listed)), COMMON)

    def _fwe(self, rng):
        head = "Read the following coded text and track the frequency of each coded word.\n"
        question = "\nDo not provide any explanation. What are the three most frequently appeared words in the above coded text, "
        question += "besides dots? They are "
        words = [
            "...",
            *_different(
                lambda rng: "".join(chr(97 + i) for i in rng.integers(26, size=6)), rng, self.spec.length // 50
            ),
        ]
        room = self.spec.length + 1 - len(head) - len(question) - 3 * 8
        shares = np.arange(1, len(words) + 1) ** -float(ZIPF) / (math.pi**2 / 6)
        sizes = np.array([len(word) + 1 for word in words])
        total = bisect.bisect_right(range(room), room, key=lambda total: int((shares * total).astype(int) @ sizes)) - 1
        counts = (shares * total).astype(int)
        coded = [word for word, count in zip(words, counts) for _ in range(count)]
        body = " ".join(coded[i] for i in rng.permutation(len(coded)))
        return head + body, question, ", ".join(words[1:4]), math.perm(int(np.sum(counts[1:] > 0)), 3)

    def _qa(self, rng):
        head = "Answer the question based on the given documents.\n\nThe following are given documents.\n\n"
        count = self.spec.length // 120  # no two documents, of a person and of a town, are shorter
        words = [word.capitalize() for word in _different(_word, rng, 3 * count + 8)]
        lands, towns, names = words[:8], words[8 : 8 + count], words[8 + count :]
        people = [" ".join(pair) for pair in zip(names[::2], names[1::2])]
        land_of = [lands[i] for i in rng.integers(len(lands), size=count)]
        born, inhabitants = rng.integers(1900, 2000, size=count), rng.integers(1000, 99_999, size=count)
        texts = []
        for i in range(count):
            texts.append(f"{people[i]} was born in {born[i]} and lives in {towns[i]}.")
            texts.append(f"{towns[i]} is a town in {land_of[i]}. It has {inhabitants[i]} inhabitants.")
        if self.kind == "qa_1":
            question, answer = f"Question: In which town does {people[0]} live? Answer: ", towns[0]
        else:
            question, answer = f"Question: In which land is the town where {people[0]} lives? Answer: ", land_of[0]
        room = self.spec.length + 1 - len(head) - len(question) - len(answer)
        frame = lambda i, text: f"Document {i}:\n{text}\n\n"
        kept = _fitting((len(frame(i, text)) for i, text in enumerate(texts, 1)), room) // 2
        body = "".join(frame(i, texts[j]) for i, j in enumerate(rng.permutation(2 * kept), 1))
        # The land in which most towns are is the best guess.
        most = 1 if self.kind == "qa_1" else max(map(land_of[:kept].count, lands))
        return head + body, question, answer, kept / most

    def floors(self, split: str = "test") -> dict[str, float]:
        """Row accuracy of any answer of the form that is asked for and of which the text holds the parts: numbers, words, ..., in
        the order of the text where that is asked for; of lands the one that the text has most often."""
        share = 0.0
        for index in range(self.num_examples(split)):
            rng = np.random.default_rng([self.splits.index(split), 0, index, 0])
            share += 1 / self.text(split, rng)[2]
        return {"any of the text": share / self.num_examples(split)}

    def content(self) -> str:
        return "" if self.corpus is None else self.corpus.fingerprint

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")


def _word(rng: np.random.Generator) -> str:
    """An invented word of two or three syllables."""
    syllables = [
        f"{'bcdfglmnprstvz'[c]}{'aeiou'[v]}" for c, v in rng.integers((14, 5), size=(rng.integers(2, 4), 2)).tolist()
    ]
    return "".join(syllables) + "lnrst"[rng.integers(5)]


def _compound(rng: np.random.Generator) -> str:
    return f"{_word(rng)}-{_word(rng)}"


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10**6, 10**7))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _different(draw, rng: np.random.Generator, count: int) -> list[str]:
    """So many different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _fitting(sizes: Iterable[int], room: int) -> int:
    """How many of the first pieces fit."""
    return int(np.searchsorted(np.cumsum(list(sizes)), room, "right"))
