"""Multi-query associative recall (Zoology, arXiv 2312.04927; HazyResearch/zoology, zoology/data/multiquery_ar.py).

A row begins with `num_kv_pairs` pairs of a key and its value, interleaved. Behind them each key comes once more, at even
distances g from the end of the pairs, g drawn without replacement with p(g) proportional to (g + 1)^(power_a - 1). The
label of a repeated key is its value, which is not among the inputs there. All other inputs are 0, or any token where
`random_non_queries` (also the keys' tokens, as in the source). Of the V tokens 1..V/2-1 are keys and V/2..V-1 values.

    inputs   2 8  4 7  0 0  4 0  0 0  2 0
    labels   . .  . .  . .  7 .  . .  8 .

Departures from the source: training rows are new in each epoch (there, 100 000 are seen 64 times), and the random fillers
follow the seed.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Spec


class MQAR(GeneratedTask):
    """Multi-query associative recall.

    Args:
      length: of the row.
      num_kv_pairs: keys of a row, all different, and so their values.
      vocab_size: tokens.
      power_a: 1 spreads the questions evenly; small values put most of them soon behind the pairs.
      random_non_queries: whether inputs that say nothing are random tokens instead of 0.

    Raises:
      UserError: if the pairs do not fit into the row or the vocabulary.
    """

    sizes: dict[str, int] = {"train": 100_000, "valid": 3_000, "test": 3_000}
    # Figure 2's hardest setting; the others are (length, num_kv_pairs) = (64, 4), (128, 8), (256, 16).
    paper_size: ClassVar[dict] = {"length": 512, "num_kv_pairs": 64, "vocab_size": 8192}

    def __init__(
        self,
        length: int = 32,
        num_kv_pairs: int = 4,
        vocab_size: int = 64,
        power_a: float = 0.01,
        random_non_queries: bool = False,
    ):
        if num_kv_pairs < 1 or length % 2 or length < 4 * num_kv_pairs:
            raise UserError(
                f"length={length} must be even and at least 4 * num_kv_pairs={4 * num_kv_pairs}, with at least one pair"
            )
        if vocab_size // 2 - 1 < num_kv_pairs:
            raise UserError(
                f"vocab_size={vocab_size} has {max(vocab_size // 2 - 1, 0)} keys and num_kv_pairs={num_kv_pairs} needs "
                f"as many; make it at least {2 * num_kv_pairs + 2}"
            )
        if not 0 < power_a < np.inf:
            raise UserError(f"power_a={power_a} must be a number greater than 0; 1 spreads the questions evenly")
        self.name = "mqar"
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._pairs, self._random = num_kv_pairs, random_non_queries
        self._log_p = (power_a - 1) * np.log(np.arange(1, length // 2 - num_kv_pairs + 1))

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        vocab, pairs, length = self.spec.vocab_size, self._pairs, self.spec.length
        keys = 1 + rng.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + rng.choice(vocab - vocab // 2, pairs, replace=False)
        # The largest of log p + Gumbel noise, in order, are draws without replacement.
        gaps = np.argsort(-(self._log_p + rng.gumbel(size=len(self._log_p))))[:pairs]
        asked = 2 * pairs + 2 * gaps
        # Random fillers, or the 0s that they replace.
        inputs = rng.integers(vocab, size=length) if self._random else np.zeros(length, np.int64)
        inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2], inputs[asked] = keys, values, keys
        labels, scored = np.zeros(length, np.int64), np.zeros(length, bool)
        labels[asked], scored[asked] = values, True
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any value, of any value of the row, and of the row's values one after the other."""
        vocab, right, rows = self.spec.vocab_size, 0, 0
        for row in self.rows(split):
            values = row["inputs"][1 : 2 * self._pairs : 2]
            right += np.sum(row["targets"][row["weights"] > 0] == values)
            rows += 1
        return {
            "chance": 1 / (vocab - vocab // 2),
            "a value of the row": 1 / self._pairs,
            "values in order": float(right / (rows * self._pairs)),
        }
