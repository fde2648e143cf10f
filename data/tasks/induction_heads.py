"""Induction heads: what followed the special token when it came before? (Mamba, arXiv 2312.00752, section 4.1.2 and Table
11; the format is that of H3, arXiv 2212.14052, as in HazyResearch/safari, src/dataloaders/synthetics.py).

A row is random tokens 0..V-2, with the special token V-1 once at a random place and again at the end. The label of the last
position is the token that followed the first special one; nothing else is scored. Models are trained at length 256 and
evaluated at 64 to 1 048 576.

The Mamba paper leaves the generator open. Here the special token counts among the `vocab_size` tokens, so that chance is
1 / (V - 1), and its first place is even over the row.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask, majority
from data.rows import token_row
from data.task import Spec


class InductionHeads(GeneratedTask):
    """One question at the end of a row of random tokens.

    Args:
      length: of the row, at least 3.
      vocab_size: tokens, the special one included.

    Raises:
      UserError: for a length or vocabulary that leaves nothing to ask.
    """

    # The paper's "epoch" is 8192 batches of 8.
    sizes: dict[str, int] = {"train": 65_536, "valid": 1_000, "test": 1_000}
    paper_size: ClassVar[dict] = {"length": 256, "vocab_size": 16}

    def __init__(self, length: int = 256, vocab_size: int = 16):
        if length < 3:
            raise UserError(f"length={length} must be at least 3: the special token, what follows it, and it again")
        if vocab_size < 3:
            raise UserError(f"vocab_size={vocab_size} must be at least 3: the special token and two to choose from")
        self.name = "induction_heads"
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, special = self.spec.length, self.spec.vocab_size - 1
        inputs = rng.integers(special, size=length, dtype=np.int32)
        first = rng.integers(length - 2)
        answer = inputs[first + 1]
        inputs[first] = inputs[-1] = special
        labels, scored = np.zeros(length, np.int32), np.zeros(length, bool)
        labels[-1], scored[-1] = answer, True
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        return {"chance": 1 / (self.spec.vocab_size - 1), "majority": majority(self, split)}
