"""What a corpus is, and the contract of the readers of files, which are found in `data/readers/`."""

import abc
import dataclasses
import inspect
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from common.errors import UserError
from common.files import absolute
from common.plugins import Plugins
from data import flat
from data.flat import Stream

# Documents and words of PG-19's splits as published (github.com/google-deepmind/pg19): its perplexity is by this count of
# words, however a model cuts the text.
PG19_WORDS = {"train": (28_602, 1_973_136_207), "valid": (50, 3_007_061), "test": (100, 6_966_499)}


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three splits, or the ids of one.

    Attributes:
      name: by which `data.corpora.load` reads the same text again, from whatever directory: never "auto", files with their
        absolute path, TFDS data sets with their version.
      splits: of the text.
      fingerprint: SHA-256 of their bytes and document ends.
      line_words: whether the words of the corpus include an end of sentence for each line.
      largest_id: the largest of token ids; None for text.
      files: that the splits are read from, where they are files of this machine; those of train may be cut into all splits.
    """

    name: str
    splits: dict[str, Stream]
    fingerprint: str
    line_words: bool = False
    largest_id: int | None = None
    files: Mapping[str, Sequence[pathlib.Path]] = dataclasses.field(default_factory=dict)

    def words(self, split: str) -> int:
        """Words of a split, by which its perplexity per word is reckoned: exp(nats of the whole split / words).

        They are what stands between white space (of ASCII), and the ends of lines where the corpus counts them; for PG-19 the
        published number.
        """
        stream = self.splits[split]
        if self.name.startswith("tfds:pg19") and len(stream.ends) == PG19_WORDS[split][0]:
            return PG19_WORDS[split][1]
        words, before, start = 0, True, 0
        for data in flat.blocks(stream.data):
            space = (data == 32) | ((data >= 9) & (data <= 13))
            begins = ~space & np.append(before, space[:-1])
            # Where nothing separates documents, a word ends with its document.
            low, high = np.searchsorted(stream.ends, [start, start + len(data)])
            first = stream.ends[low:high] - start
            begins[first] = ~space[first]
            words += np.count_nonzero(begins) + self.line_words * np.count_nonzero(data == ord("\n"))
            before, start = space[-1], start + len(data)
        return int(words)


class Reader(abc.ABC):
    """A kind of corpus, "<kind>:PATH,option=value,...": one file `data/readers/<kind>.py` that defines one subclass.

    The keywords of its constructor are its options. All are strings.

    Attributes:
      paths: options that are a share of the text or a path.
    """

    paths: ClassVar[tuple[str, ...]] = ("valid", "test")

    @abc.abstractmethod
    def read(self, path: str, cache: pathlib.Path, download: bool) -> Corpus:
        """The corpus, without its name.

        Args:
          path: what stands behind the kind, without the options.
          cache: see `common.files.cache_folder`.
          download: whether what is not here may be downloaded.

        Raises:
          UserError: for what is not there or cannot be read.
        """

    def where(self, path: str) -> str:
        """The path that means the same from whatever directory."""
        return absolute(path)


READERS = Plugins("kind of corpus", "data.readers", Reader)


def read(kind: str, rest: str, cache: pathlib.Path, download: bool) -> Corpus:
    """The corpus of a reader.

    Args:
      kind: a file of `data/readers/`.
      rest: the path and the options. A path may hold commas: options are what stands at the end and looks like them.
      cache, download: as in `Reader.read`.

    Raises:
      UserError: for an unknown option, with the near names, and as `Reader.read` does.
    """
    reader, path, options = _parse(kind, rest)
    corpus = reader.read(path, cache, download)
    for key in set(options) & set(reader.paths):
        options[key] = options[key] if share(options[key]) is not None else absolute(options[key])
    name = f"{kind}:{reader.where(path)}" + "".join(f",{key}={value}" for key, value in options.items())
    return dataclasses.replace(corpus, name=name)


def _parse(kind: str, rest: str) -> tuple[Reader, str, dict[str, str]]:
    path, options = rest, {}
    while found := re.fullmatch(r"(.+),([a-z_]+)=([^,]*)", path, re.DOTALL):
        if os.path.exists(absolute(path)):  # False of a name that is too long, which the options may be
            break
        path = found[1]
        if found[2] in options:
            raise UserError(f"corpus='{kind}:{rest}' has {found[2]} twice")
        options = {found[2]: found[3]} | options
    READERS.check(kind, options)
    for key, value in options.items():
        if not value:
            raise UserError(f"corpus='{kind}:{rest}': {key} is empty; give it a value or leave it out")
    return READERS.find(kind)(**options), path, options


def kinds() -> list[str]:
    """The kinds of corpora that have readers, with their options: "jsonl:PATH[,field=...]"."""
    found = []
    for kind in READERS.names():
        keys = list(inspect.signature(READERS.find(kind).__init__).parameters)[1:]
        found.append(f"{kind}:PATH" + "".join(f"[,{key}=...]" for key in keys))
    return found


def share(value: str) -> float | None:
    """The share that an option says; None where it is a path.

    Raises:
      UserError: for a number that is no share.
    """
    try:
        number = float(value)
    except ValueError:
        return None
    if not 0 < number < 0.5:
        raise UserError(f"valid and test are shares above 0 and below 0.5, or paths; got {value}")
    return number
