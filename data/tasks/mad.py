"""The six tasks of Mechanistic Architecture Design (MAD, arXiv 2403.17844; athms/mad-lab, mad/data/instances.py).

in_context_recall        Pairs of a key and a value; each row maps keys to values anew. Scored is the value behind each key
                         that was seen before; the last pair always is such a one.
fuzzy_in_context_recall  Keys and values are motifs of 1 to 3 different tokens. Evaluation asks for keys of 3 tokens only.
                         The row is filled up at its left.
noisy_in_context_recall  As the first, with a share of the pairs replaced by tokens that belong to no key and no value.
selective_copying        Tokens among blanks, then a token that asks, then as many blanks: there the tokens are said in order.
compression              Random tokens, then as many questions: there the tokens are said in order.
memorization             One map of keys to values for all rows and splits, never shown: a key, then a question, there its value.

The sizes of each kind are the paper's baseline; its harder settings change `vocab_size`, `length`, `train_examples`, `noise`
or `tokens`. Training sets are finite: the same rows in each epoch. The paper's score is the accuracy averaged over the
settings, each with the best of the learning rates 1e-4, 5e-4, 1e-3 and the weight decays 0, 0.1: examples/mad.py has them.

Departures from the source. Training scores what evaluation scores (there, recall trains on every next token). Recall rows end
with the last value (there they are one shorter). Recall with noise always has a key to ask for. Selective copying draws its
blanks from the row's own random numbers, and also behind the last token. The fuzzy question is drawn evenly from the row's
keys. The source's compression reads all tokens off the last position through a decoder of its own; here they are said one
after the other, and attention may look back at them: its numbers compare recurrent models with each other and with nothing
else.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Int

from common.errors import UserError, check_choice, check_range
from data.generated import GeneratedTask, majority, most_frequent_label
from data.rows import token_row
from data.task import MOST_ROWS, Spec

# length, vocab_size, train_examples
BASELINES = {
    "in_context_recall": (128, 16, 12_800),
    "fuzzy_in_context_recall": (128, 16, 12_800),
    "noisy_in_context_recall": (128, 32, 12_800),
    "selective_copying": (256, 16, 12_800),
    "compression": (62, 16, 12_800),
    "memorization": (32, 256, 256),
}
NOISE_VOCAB = 16
MOTIF = 3
MAP_SEED = 12345


class MAD(GeneratedTask):
    """One of the six tasks; what is None is the kind's baseline.

    Args:
      kind: a name of the table above.
      length: of the row; even but for selective copying and fuzzy recall. Compression has length // 2 tokens to say.
      vocab_size: tokens, those of questions, blanks and noise (16) included.
      train_examples: rows of the training set.
      noise: share of the pairs that are noise; noisy recall only, 0.2 by default.
      tokens: to copy; selective copying only, 16 by default.

    Raises:
      UserError: for an unknown kind, sizes that do not fit together, and a hyperparameter that the kind does not have.
    """

    paper_size: ClassVar[dict] = {"kind": "in_context_recall"}

    def __init__(
        self,
        kind: str = "in_context_recall",
        length: int | None = None,
        vocab_size: int | None = None,
        train_examples: int | None = None,
        noise: float | None = None,
        tokens: int | None = None,
    ):
        check_choice("kind", kind, BASELINES)
        for key, value, owner in (
            ("noise", noise, "noisy_in_context_recall"),
            ("tokens", tokens, "selective_copying"),
        ):
            if value is not None and kind != owner:
                raise UserError(f"{key}={value} belongs to kind={owner!r}; leave it None with kind={kind!r}")
        given = (length, vocab_size, train_examples)
        length, vocab_size, rows = (
            base if value is None else value for base, value in zip(BASELINES[kind], given, strict=True)
        )
        self.kind = kind
        self.noise = 0.0 if kind != "noisy_in_context_recall" else 0.2 if noise is None else noise
        self.tokens = 16 if tokens is None else tokens
        self._check(length, vocab_size, rows)
        self.sizes = {"train": rows, "valid": 1_280, "test": 1_280}
        self.name = f"mad/{kind}"
        self.resolved = {"length": length, "vocab_size": vocab_size, "train_examples": rows}
        if kind == "noisy_in_context_recall":
            self.resolved["noise"] = self.noise
        if kind == "selective_copying":
            self.resolved["tokens"] = self.tokens
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._map = np.random.default_rng(MAP_SEED).permutation((vocab_size - 1) // 2) + (vocab_size - 1) // 2

    def _check(self, length: int, vocab_size: int, rows: int) -> None:
        # Keys and values, or tokens, need two to choose from; motifs need three different ones.
        smallest, least, even = {
            "in_context_recall": (4, 4, True),
            "fuzzy_in_context_recall": (4 * MOTIF, 2 * MOTIF + 1, False),
            "noisy_in_context_recall": (4, 4 + NOISE_VOCAB, True),
            "selective_copying": (2 * self.tokens + 1, 4, False),
            "compression": (2, 3, True),
            "memorization": (2, 5, True),
        }[self.kind]
        if length < smallest or (even and length % 2):
            raise UserError(
                f"length={length} must be at least {smallest}{' and even' if even else ''} with kind={self.kind!r}"
            )
        if vocab_size < least:
            raise UserError(f"vocab_size={vocab_size} must be at least {least} with kind={self.kind!r}")
        check_range("train_examples", rows, 1, MOST_ROWS)
        check_range("tokens", self.tokens, 1)
        if not 0 <= self.noise < 1:
            raise UserError(f"noise={self.noise} must be at least 0 and less than 1")

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        return super().row(split, index, 0, seed)

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self.kind == "fuzzy_in_context_recall":
            return self._fuzzy(split, rng)
        draw = {
            "in_context_recall": self._recall,
            "noisy_in_context_recall": self._recall,
            "selective_copying": self._selective_copying,
            "compression": self._compression,
            "memorization": self._memorization,
        }[self.kind]
        return draw(rng)

    def _recall(self, rng):
        length, vocab = self.spec.length, self.spec.vocab_size
        if self.kind == "noisy_in_context_recall":
            vocab -= NOISE_VOCAB
        pairs, half = length // 2, vocab // 2
        values = rng.integers(half, vocab, size=half)
        keys = rng.integers(half, size=pairs)
        noise = rng.random(pairs) < self.noise
        # There is a key to ask for at the end, and it is asked for.
        noise[rng.integers(pairs - 1)] = noise[-1] = False
        (real,) = np.nonzero(~noise)
        keys[-1] = rng.choice(np.unique(keys[real[:-1]]))
        inputs = np.stack([keys, values[keys]], 1)
        inputs[noise] = rng.integers(vocab, vocab + NOISE_VOCAB, size=(np.sum(noise), 2))
        scored = np.zeros((pairs, 2), bool)
        scored[real, 0] = True
        scored[real[np.unique(keys[real], return_index=True)[1]], 0] = False
        labels = np.repeat(values[keys], 2)
        return token_row(inputs.ravel(), labels, scored.ravel())

    def _fuzzy(self, split, rng):
        length, vocab = self.spec.length, self.spec.vocab_size
        filler, half = vocab - 1, (vocab - 1) // 2
        pairs = length // 2
        key_sizes = rng.integers(1, MOTIF + 1, size=pairs) if split == "train" else np.full(pairs, MOTIF)
        value_sizes = rng.integers(1, MOTIF + 1, size=pairs)
        keys = _motifs(rng, half, key_sizes)
        values = [tuple(half + token for token in motif) for motif in _motifs(rng, vocab - 1 - half, value_sizes)]
        known, sequence, asked = {}, [], []
        for key, value in zip(keys, values, strict=True):
            value = known.get(key, value)
            # The last place is kept for the question; one more token than the row has inputs is there for the shift.
            if len(sequence) + len(key) + len(value) > length + 1 - 2 * MOTIF:
                break
            sequence += key + value
            asked += [False] * len(key) + [key in known] * len(value)
            known[key] = value
        key, value = list(known.items())[rng.integers(len(known))]
        sequence += key + value
        asked += [False] * len(key) + [True] * len(value)
        padding = length + 1 - len(sequence)
        sequence = np.array([filler] * padding + sequence)
        asked = np.array([False] * padding + asked)
        return token_row(sequence[:-1], sequence[1:], asked[1:])

    def _selective_copying(self, rng):
        length, tokens, vocab = self.spec.length, self.tokens, self.spec.vocab_size
        blank, ask = vocab - 2, vocab - 1
        body = length - tokens - 1
        data = rng.integers(blank, size=tokens)
        # Each blank falls into one of the gaps before, between and behind the tokens.
        gaps = np.bincount(rng.integers(tokens + 1, size=body - tokens), minlength=tokens + 1)
        inputs = np.full(length, blank)
        inputs[np.arange(tokens) + np.cumsum(gaps[:-1])] = data
        inputs[body] = ask
        labels, scored = np.zeros(length, np.int64), np.zeros(length, bool)
        labels[-tokens:], scored[-tokens:] = data, True
        return token_row(inputs, labels, scored)

    def _compression(self, rng):
        half, ask = self.spec.length // 2, self.spec.vocab_size - 1
        data = rng.integers(ask, size=half)
        inputs, labels = np.concatenate([data, np.full(half, ask)]), np.concatenate([data, data])
        return token_row(inputs, labels, np.repeat([False, True], half))

    def _memorization(self, rng):
        pairs, ask = self.spec.length // 2, self.spec.vocab_size - 1
        keys = rng.integers(len(self._map), size=pairs)
        inputs = np.stack([keys, np.full(pairs, ask)], 1).ravel()
        return token_row(inputs, np.repeat(self._map[keys], 2), np.tile([False, True], pairs))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any label, of the most common one, and of the one that the row has held most often so far."""
        vocab = self.spec.vocab_size
        labels = {
            "in_context_recall": vocab - vocab // 2,
            "fuzzy_in_context_recall": vocab - 1 - (vocab - 1) // 2,
            "noisy_in_context_recall": (vocab - NOISE_VOCAB) - (vocab - NOISE_VOCAB) // 2,
            "selective_copying": vocab - 2,
            "compression": vocab - 1,
            "memorization": len(self._map),
        }[self.kind]
        floors = {"chance": 1 / labels, "majority": majority(self, split)}
        if self.kind != "memorization":  # whose rows never hold a label
            floors["most frequent of the row"] = most_frequent_label(self, split)
        return floors


def _motifs(rng: np.random.Generator, tokens: int, sizes: Int[np.ndarray, "N"]) -> list[tuple[int, ...]]:
    """Tuples of different tokens 0..tokens-1, of the sizes."""
    order = np.argsort(rng.random((len(sizes), tokens)), 1)[:, :MOTIF].tolist()
    return [tuple(motif[:size]) for motif, size in zip(order, sizes, strict=True)]
