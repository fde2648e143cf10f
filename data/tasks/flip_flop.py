"""Flip-flop language modelling: read the bit that was written last (Liu et al., arXiv 2306.00946).

A row is pairs of an instruction and a bit. "write" is followed by a random bit that is stored, "ignore" by a random bit that
is not, and "read" by the stored one. The first instruction is write and the last is read; the others are ignore with
probability p, and write and read with (1 - p) / 2 each. FFL(p) is the language; models are trained on FFL(.8). Scored is the
bit after each read, so that 1 - accuracy is the paper's read error rate (its "attention glitches").

    tokens   0 1 read the bits 0 and 1; 2 write, 3 read, 4 ignore
    inputs   2 1  4 0  3 1  4 1  3 1
    labels   . .  . .  1 .  . .  1 .

Valid is always like train. The test setting "sparse" is FFL(.98), where writes are far back, and "dense" is FFL(.1), where
there are many; both come from outside the training distribution. The paper tests on 16 000, 160 000 and 4 000 rows; here
sparse has 16 000 and the others 4 000: 57 000 reads or more at length 512.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Spec

WRITE, READ, IGNORE = 2, 3, 4
TEST_SETTINGS = {"same": None, "sparse": 0.98, "dense": 0.1}


class FlipFlop(GeneratedTask):
    """Read the bit that was written last.

    Args:
      length: of the row, even.
      p_ignore: probability of ignore in train and valid, and in test where `test` is "same".
      test: the test split: "same", "sparse" or "dense".

    Raises:
      UserError: for a length without a write and a read, a p_ignore that is no probability, an unknown test setting.
    """

    paper_size: ClassVar[dict] = {"length": 512}

    def __init__(self, length: int = 64, p_ignore: float = 0.8, test: str = "same"):
        check_choice("test", test, TEST_SETTINGS)
        if length < 4 or length % 2:
            raise UserError(f"length={length} must be even and at least 4: a write, a read, and their bits")
        if not 0 <= p_ignore <= 1:
            raise UserError(f"p_ignore={p_ignore} must be a probability, 0 to 1")
        self.sizes = {"train": 1_600_000, "valid": 1_000, "test": 16_000 if test == "sparse" else 4_000}
        self.name = f"flip_flop/{test}"
        self.spec = Spec(5, None, 5, "token_labels", length, causal=True)
        self._p_ignore = {split: p_ignore for split in self.splits}
        if test != "same":
            self._p_ignore["test"] = TEST_SETTINGS[test]

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pairs, p = self.spec.length // 2, self._p_ignore[split]
        uniform = rng.random(pairs)
        instructions = np.where(uniform < p, IGNORE, np.where(uniform < (1 + p) / 2, WRITE, READ))
        instructions[0], instructions[-1] = WRITE, READ
        bits = rng.integers(2, size=pairs)
        reads = instructions == READ
        written = np.maximum.accumulate(np.where(instructions == WRITE, np.arange(pairs), 0))
        bits = np.where(reads, bits[written], bits)
        inputs, labels, scored = (np.zeros(2 * pairs, kind) for kind in (np.int64, np.int64, bool))
        inputs[::2], inputs[1::2] = instructions, bits
        labels[::2], scored[::2] = bits, reads
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any bit, and of the bit before the read, whatever its instruction."""
        right, reads = 0, 0
        for row in self.rows(split):
            (read,) = np.nonzero(row["weights"])
            right += np.sum(row["inputs"][read - 1] == row["targets"][read])
            reads += len(read)
        return {"chance": 0.5, "last bit": float(right / reads)}
