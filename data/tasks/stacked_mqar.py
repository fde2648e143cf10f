"""Multi-query associative recall of vectors: a key and its value side by side in one position (HazyResearch/zoology,
zoology/data/stacked_mqar.py), so that no shift by a token is needed and what is left is the memory.

Keys and values are vectors that stay the same in all rows. A row shows `num_kv_pairs` keys, each with a value, `num_passes`
times, each time in another order, and then asks for each key once, in any order, with 0 where a value would be. The label is the
number of its value.

    inputs   [k3 v1] [k7 v4] [k2 v6]  [k7 0] [k2 0] [k3 0]
    labels      .       .       .        4      6      1

Departures from the source: there the user brings the vectors, and the model's output is compared with those of the values; here
they are drawn, N(0, 1), and a linear head over all values learns them. The form whose pairs stay from row to row is left out.
"""

import numpy as np

from common.errors import UserError, check_range
from data.generated import GeneratedTask
from data.rows import one_segment
from data.task import Spec

MOST = 2**16  # of each number: what a row holds is their product
MOST_HELD = 2**27  # numbers of all vectors, and of a row


class StackedMQAR(GeneratedTask):
    """Multi-query associative recall of vectors.

    Args:
      num_kv_pairs: keys of a row, all different, and so their values; a row has as many positions for each pass, and for the
        questions.
      num_passes: times that the pairs are shown.
      vocab_size: vectors, half of them keys and half values.
      vector_size: numbers of each.

    Raises:
      UserError: for fewer keys than pairs, and for numbers out of range.
    """

    sizes: dict[str, int] = {"train": 100_000, "valid": 3_000, "test": 3_000}

    def __init__(self, num_kv_pairs: int = 16, num_passes: int = 1, vocab_size: int = 128, vector_size: int = 16):
        sizes = {
            "num_kv_pairs": num_kv_pairs,
            "num_passes": num_passes,
            "vocab_size": vocab_size,
            "vector_size": vector_size,
        }
        for name, value in sizes.items():
            check_range(name, value, 1, MOST)
        if vocab_size % 2 or vocab_size < 2 * num_kv_pairs:
            raise UserError(f"vocab_size={vocab_size} must be even and at least 2 * num_kv_pairs={2 * num_kv_pairs}")
        self.name = "stacked_mqar"
        length, kinds = (num_passes + 1) * num_kv_pairs, vocab_size // 2
        for what, held in (
            (f"vocab_size={vocab_size} vectors of vector_size={vector_size} hold", vocab_size * vector_size),
            (
                f"a row of num_kv_pairs={num_kv_pairs}, {num_passes + 1} times (num_passes={num_passes}), of two vectors of "
                f"vector_size={vector_size} holds",
                length * 2 * vector_size,
            ),
        ):
            if held > MOST_HELD:
                raise UserError(f"{what} {held:,} numbers, and {MOST_HELD:,} are the most: make one of them smaller")
        self.spec = Spec(None, 2 * vector_size, kinds, "token_labels", length, causal=True)
        self._pairs, self._passes = num_kv_pairs, num_passes
        self._keys, self._values = np.random.default_rng(0).standard_normal((2, kinds, vector_size)).astype(np.float32)

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pairs, length, kinds = self._pairs, self.spec.length, self.spec.targets
        keys, values = (rng.choice(kinds, pairs, replace=False) for _ in range(2))
        order = np.concatenate([rng.permutation(pairs) for _ in range(self._passes + 1)])
        told = length - pairs
        inputs = np.zeros((length, 2, self._keys.shape[1]), np.float32)
        inputs[:, 0] = self._keys[keys[order]]
        inputs[:told, 1] = self._values[values[order[:told]]]
        targets, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        targets[told:], weights[told:] = values[order[told:]], 1
        row = {"inputs": inputs.reshape(length, -1), "targets": targets, "weights": weights}
        return row | one_segment(length)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any value, and of any value of the row."""
        return {"chance": 1 / self.spec.targets, "a value of the row": 1 / self._pairs}
