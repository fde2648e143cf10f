"""Multi-query associative recall of keys of two tokens, which both must be looked at (HazyResearch/zoology,
zoology/data/compositional_ar.py).

A row begins with `num_kv_pairs` = n^2 triples of two key tokens and a value: each of n first tokens with each of n second
ones, in any order, so that neither token alone tells the value. Behind them each key comes once more, at distances of three
tokens that are drawn as in `mqar`. The label of its second token is the value. All other inputs are 0, or any token where
`random_non_queries`. Of the V tokens the first third (without 0) are first tokens, the second third second ones, the others
values.

    inputs   2 5 8  3 5 9  2 6 11  3 6 10  0 0 0  3 5 0 ...
    labels   . . .  . . .  . . .   . . .   . . .  . 9 . ...
"""

import math

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Spec


class CompositionalMQAR(GeneratedTask):
    """Multi-query associative recall of keys of two tokens.

    Args:
      length: of the row.
      num_kv_pairs: keys of a row, a square number.
      vocab_size: tokens.
      power_a: 1 spreads the questions evenly; small values put most of them soon behind the triples.
      random_non_queries: whether inputs that say nothing are random tokens instead of 0.

    Raises:
      UserError: for a number that is no square, and if the triples do not fit into the row or the vocabulary.
    """

    sizes: dict[str, int] = {"train": 100_000, "valid": 3_000, "test": 3_000}

    def __init__(
        self,
        length: int = 64,
        num_kv_pairs: int = 4,
        vocab_size: int = 96,
        power_a: float = 0.01,
        random_non_queries: bool = False,
    ):
        self._side = math.isqrt(max(num_kv_pairs, 0))
        if num_kv_pairs < 1 or self._side**2 != num_kv_pairs:
            raise UserError(f"num_kv_pairs={num_kv_pairs} must be a square number: 1, 4, 9, 16, ...")
        if length < 6 * num_kv_pairs:
            raise UserError(f"length={length} must be at least 6 * num_kv_pairs={6 * num_kv_pairs}")
        if vocab_size // 3 - 1 < self._side or vocab_size - 2 * (vocab_size // 3) < num_kv_pairs:
            raise UserError(
                f"vocab_size={vocab_size} is too small for {self._side} first tokens and as many second ones, and "
                f"num_kv_pairs={num_kv_pairs} values, of a third each, without 0: make it larger"
            )
        if not 0 < power_a < np.inf:
            raise UserError(f"power_a={power_a} must be a number greater than 0; 1 spreads the questions evenly")
        self.name = "compositional_mqar"
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._pairs, self._random = num_kv_pairs, random_non_queries
        self._log_p = (power_a - 1) * np.log(np.arange(1, (length - 3 * num_kv_pairs) // 3 + 1))

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, vocab, side, pairs = self.spec.length, self.spec.vocab_size, self._side, self._pairs
        third, begin = vocab // 3, 3 * pairs
        first = 1 + rng.choice(third - 1, side, replace=False)
        second = third + rng.choice(third, side, replace=False)
        order = rng.permutation(pairs)
        keys = np.column_stack([np.repeat(first, side), np.tile(second, side)])[order]
        values = 2 * third + rng.choice(vocab - 2 * third, pairs, replace=False)
        # The largest of log p + Gumbel noise, in order, are draws without replacement.
        asked = begin + 3 * np.argsort(-(self._log_p + rng.gumbel(size=len(self._log_p))))[:pairs]
        inputs = rng.integers(vocab, size=length) if self._random else np.zeros(length, np.int64)
        inputs[:begin] = np.column_stack([keys, values]).ravel()
        inputs[asked], inputs[asked + 1] = keys.T
        labels, scored = np.zeros(length, np.int64), np.zeros(length, bool)
        labels[asked + 1], scored[asked + 1] = values, True
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any value, of any value of the row, and of any value that stands behind one of the key's two tokens."""
        vocab = self.spec.vocab_size
        return {
            "chance": 1 / (vocab - 2 * (vocab // 3)),
            "a value of the row": 1 / self._pairs,
            "a value of half the key": 1 / self._side,
        }
