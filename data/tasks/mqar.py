"""Multi-query associative recall (Zoology, arXiv 2312.04927; HazyResearch/zoology, zoology/data/multiquery_ar.py).

A row begins with `num_kv_pairs` pairs of a key and its value, interleaved. Behind them each key comes once more, at even
distances g from the end of the pairs, g drawn without replacement with p(g) proportional to (g + 1)^(power_a - 1). The
label of a repeated key is its value, which is not among the inputs there. All other inputs are 0, or any token where
`random_non_queries` (also the keys' tokens, as in the source). Of the V tokens 1..V/2-1 are keys and V/2..V-1 values.

    inputs   2 8  4 7  0 0  4 0  0 0  2 0
    labels   . .  . .  . .  7 .  . .  8 .

A `mixture` of settings in training (Based, arXiv 2402.18668, figure 2) is rows of each, as often as it says; what a row is
shorter than the longest is 0 at its end. `num_passes` repeats the pairs before the questions ("Just read twice", arXiv
2407.05483). Behind them `num_updates` of the keys come once more, each with another value, which is then the label (zoology/data/
forgetting_mqar.py). Keys of two tokens are `compositional_mqar`, vectors `stacked_mqar`.

Departures from the source: a batch holds rows of all settings (there, of one); training rows are new in each epoch (there,
100 000 are seen 64 times), and the random fillers follow the seed.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import one_segment
from data.task import Spec


class MQAR(GeneratedTask):
    """Multi-query associative recall.

    Args:
      length: of the row.
      num_kv_pairs: keys of a row, all different, and so their values.
      vocab_size: tokens.
      power_a: 1 spreads the questions evenly; small values put most of them soon behind the pairs.
      random_non_queries: whether inputs that say nothing are random tokens instead of 0.
      num_passes: times that the pairs are shown.
      num_updates: keys that get a new value.
      mixture: settings of training rows in place of `length` and `num_kv_pairs`, which are then those of valid and test:
        "LENGTH:PAIRS" or "LENGTH:PAIRS*SHARE", joined by "+", such as "64:4*5+128:8+256:16"; empty for none.

    Raises:
      UserError: if the pairs do not fit into the row or the vocabulary; for a mixture that is none, or longer than `length`.
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
        num_passes: int = 1,
        mixture: str = "",
        num_updates: int = 0,
    ):
        if num_passes < 1:
            raise UserError(f"num_passes={num_passes} must be at least 1")
        settings, shares = parse_mixture(mixture)
        for rows, pairs in [(length, num_kv_pairs), *settings]:
            _check(rows, pairs, vocab_size, num_passes, num_updates)
        if not 0 < power_a < np.inf:
            raise UserError(f"power_a={power_a} must be a number greater than 0; 1 spreads the questions evenly")
        self.name = "mqar"
        longest = max((rows for rows, _ in settings), default=length)
        if longest > length:
            raise UserError(
                f"length={length} is less than {longest}, the longest of mixture={mixture!r}: make it as long"
            )
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._pairs, self._random, self._passes = num_kv_pairs, random_non_queries, num_passes
        self._settings, self._shares = settings, np.cumsum(shares)
        self._power, self._updates = power_a, num_updates

    @classmethod
    def at_length(cls, options: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Without the mixture, which is of training."""
        return {**options, "length": length, "mixture": ""}

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, pairs = self.spec.length, self._pairs
        if split == "train" and self._settings:
            length, pairs = self._settings[np.searchsorted(self._shares, rng.random() * self._shares[-1], "right")]
        vocab, whole, begin = self.spec.vocab_size, self.spec.length, 2 * (pairs * self._passes + self._updates)
        keys = 1 + rng.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + rng.choice(vocab - vocab // 2, pairs, replace=False)
        # The largest of log p + Gumbel noise, in order, are draws without replacement.
        log_p = _log_p(self._power, (length - begin) // 2)
        gaps = np.argsort(-(log_p + rng.gumbel(size=len(log_p))))[:pairs]
        asked = begin + 2 * gaps
        # Random fillers, or the 0s that they replace.
        inputs = np.zeros(whole, np.int32)
        if self._random:
            inputs[:length] = rng.integers(vocab, size=length)
        told = 2 * pairs * self._passes
        shown = inputs[:told].reshape(self._passes, pairs, 2)
        shown[..., 0], shown[..., 1] = keys, values
        if self._updates:
            changed, kinds = rng.choice(pairs, self._updates, replace=False), vocab - vocab // 2
            others = rng.integers(1, kinds, size=self._updates)  # none leads back to the same value
            values[changed] = vocab // 2 + (values[changed] - vocab // 2 + others) % kinds
            inputs[told:begin] = np.column_stack([keys[changed], values[changed]]).ravel()
        inputs[asked] = keys
        # As `data.rows.token_row` makes it, without its copies: these rows are wanted fast.
        targets, weights = np.zeros(whole, np.int32), np.zeros(whole, np.float32)
        targets[asked], weights[asked] = values, 1
        return {"inputs": inputs, "targets": targets, "weights": weights} | one_segment(whole)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any value, of any value of the row, and of the row's values one after the other; where keys get new values
        also of a key's first value."""
        vocab, right, rows = self.spec.vocab_size, 0, 0
        for row in self.rows(split):
            values = row["inputs"][1 : 2 * self._pairs : 2]
            right += np.sum(row["targets"][row["weights"] > 0] == values)
            rows += 1
        return {
            "chance": 1 / (vocab - vocab // 2),
            "a value of the row": 1 / self._pairs,
            "values in order": float(right / (rows * self._pairs)),
        } | ({"first value": 1 - self._updates / self._pairs} if self._updates else {})


def parse_mixture(mixture: str) -> tuple[list[tuple[int, int]], list[float]]:
    """The settings (length, pairs) of "LENGTH:PAIRS*SHARE+...", and their shares, 1 where none is said.

    Raises:
      UserError: for a text that is none.
    """
    settings, shares = [], []
    for item in filter(None, mixture.split("+")):
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})(?:\*(\d{1,15}(?:\.\d+)?))?", item)
        if match is None or float(match[3] or 1) == 0:
            raise UserError(
                f"mixture={mixture!r}: {item!r} is none of LENGTH:PAIRS and LENGTH:PAIRS*SHARE, such as 64:4*5"
            )
        settings.append((int(match[1]), int(match[2])))
        shares.append(float(match[3] or 1))
    return settings, shares


@functools.lru_cache(maxsize=64)
def _log_p(power_a: float, places: int) -> np.ndarray:
    return (power_a - 1) * np.log(np.arange(1, places + 1))


def _check(length: int, num_kv_pairs: int, vocab_size: int, num_passes: int, num_updates: int) -> None:
    shown = 2 * num_passes + 2
    if num_kv_pairs < 1 or length % 2 or length < shown * num_kv_pairs + 2 * max(num_updates, 0):
        told = f", with num_passes={num_passes}" if num_passes > 1 else ""
        more = f" + 2 * num_updates={shown * num_kv_pairs + 2 * num_updates}" if num_updates else ""
        raise UserError(
            f"length={length} must be even and at least {shown} * num_kv_pairs{more or f'={shown * num_kv_pairs}'}, with at "
            f"least one pair{told}"
        )
    if not 0 <= num_updates <= num_kv_pairs:
        raise UserError(f"num_updates={num_updates} must be 0 to num_kv_pairs={num_kv_pairs}")
    if vocab_size // 2 - 1 < num_kv_pairs:
        raise UserError(
            f"vocab_size={vocab_size} has {max(vocab_size // 2 - 1, 0)} keys and num_kv_pairs={num_kv_pairs} needs "
            f"as many; make it at least {2 * num_kv_pairs + 2}"
        )
