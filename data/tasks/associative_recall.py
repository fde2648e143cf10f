"""Associative recall: what followed the key when it came before? (H3, arXiv 2212.14052; HazyResearch/safari,
src/dataloaders/synthetics.py).

Each row maps keys to values anew. It is pairs of a key and its value, drawn with replacement, then "=>" and a key, whose value is
the label of the last position; nothing else is scored. A key may be several tokens. With `absent` the key is drawn from all keys,
and the label is "." where the row has not held it.

    inputs   a 7  c 5  a 7  b 5  => c       keys are the first half of the tokens, values the second, then "=>" and "."
    label    5

Departures from the source, which trains on every next token: training scores what evaluation scores. Its rows of
`input_seq_len` tokens before "=>" are `length` - 1 - `key_tokens` here.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask, majority, most_frequent_label
from data.rows import token_row
from data.task import Spec


class AssociativeRecall(GeneratedTask):
    """A question for one value of the row.

    Args:
      length: of the row: pairs, "=>" and a key.
      vocab_size: tokens, "=>" and "." included.
      key_tokens: of a key.
      absent: whether a key that the row has not held may be asked for.

    Raises:
      UserError: for a length that is no number of pairs and a question, and a vocabulary without two keys and two values.
    """

    sizes: dict[str, int] = {"train": 5_000, "valid": 500, "test": 500}
    paper_size: ClassVar[dict] = {"length": 32, "vocab_size": 20}

    def __init__(self, length: int = 32, vocab_size: int = 20, key_tokens: int = 1, absent: bool = False):
        if key_tokens < 1:
            raise UserError(f"key_tokens={key_tokens} must be at least 1")
        pairs, left = divmod(length - 1 - key_tokens, key_tokens + 1)
        if pairs < 1 or left:
            raise UserError(
                f"length={length} must be a number of pairs of {key_tokens + 1} tokens and {key_tokens + 1} more, "
                f"with key_tokens={key_tokens}"
            )
        if vocab_size < 6:
            raise UserError(f"vocab_size={vocab_size} must be at least 6: two keys, two values, '=>' and '.'")
        self.name = "associative_recall"
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._pairs, self._key_tokens, self._absent = pairs, key_tokens, absent
        self._keys = (vocab_size - 2) // 2
        self._values = vocab_size - 2 - self._keys

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        vocab, size = self.spec.vocab_size, self._key_tokens
        keys = rng.integers(self._keys, size=(self._pairs, size))
        _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        value_of = self._keys + rng.integers(self._values, size=len(first))
        values = value_of[which.reshape(-1)]
        # A key of the row, each as likely, or any.
        asked = rng.integers(self._keys, size=size) if self._absent else keys[first[rng.integers(len(first))]]
        (held,) = np.nonzero((keys == asked).all(1))
        inputs = np.concatenate([np.column_stack([keys, values]).ravel(), [vocab - 2], asked])
        labels, scored = np.zeros(len(inputs), np.int64), np.zeros(len(inputs), bool)
        labels[-1], scored[-1] = values[held[0]] if len(held) else vocab - 1, True
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any value, of the most common label, of the label that the row has held most often, and of the value that
        most of its different keys have, each of which is as likely to be asked for."""
        right = 0.0
        for row in self.rows(split):
            pairs = row["inputs"][: -1 - self._key_tokens].reshape(self._pairs, -1)
            values, counts = np.unique(np.unique(pairs, axis=0)[:, -1], return_counts=True)
            best = values[counts == counts.max()]
            right += (row["targets"][-1] in best) / len(best)
        return {
            "chance": 1 / self._values,
            "majority": majority(self, split),
            "most frequent of the row": most_frequent_label(self, split),
            "value of most keys": right / self.num_examples(split),
        }
