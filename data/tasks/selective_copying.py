"""Selective copying: pick the data out of the noise and say it in order (Mamba, arXiv 2312.00752, appendix E.1).

    inputs   0 0 5 0 3 0 0 7 0  15 15 15
    labels   . . . . . . . . .   5  3  7

Of the V tokens 0 is noise, 1..V-2 are data and V-1 asks for the next data token. The data tokens are drawn evenly, with
replacement, and stand at random places before the questions. At a constant distance a convolution can copy; here only a
model that looks at what it reads can.

The paper says length 4096 and 16 tokens, the noise included, and leaves the rest open; here the length includes the questions,
and the token that asks is one of the 16 (as in state-spaces/s4, src/dataloaders/datasets/copying.py).
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask, most_frequent_label
from data.rows import token_row
from data.task import Spec


class SelectiveCopying(GeneratedTask):
    """Data tokens at random places, to be copied in order.

    Args:
      length: of the row, its questions included.
      tokens: data tokens of a row.
      vocab_size: tokens, noise and question included.

    Raises:
      UserError: if the tokens do not fit into the row, or there is no choice of tokens.
    """

    paper_size: ClassVar[dict] = {"length": 4096, "tokens": 16, "vocab_size": 16}

    def __init__(self, length: int = 48, tokens: int = 4, vocab_size: int = 16):
        if tokens < 1 or length < 2 * tokens:
            raise UserError(f"length={length} must be at least 2 * tokens={2 * tokens}, with at least one token")
        if vocab_size < 4:
            raise UserError(
                f"vocab_size={vocab_size} must be at least 4: noise, question and two tokens to choose from"
            )
        self.name = "selective_copying"
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._tokens = tokens

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, tokens, vocab = self.spec.length, self._tokens, self.spec.vocab_size
        body = length - tokens
        data = rng.integers(1, vocab - 1, size=tokens)
        inputs = np.zeros(length, np.int64)
        inputs[np.sort(rng.choice(body, tokens, replace=False, shuffle=False))] = data
        inputs[body:] = vocab - 1
        labels, scored = np.zeros(length, np.int64), np.zeros(length, bool)
        labels[body:], scored[body:] = data, True
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any data token, and of the one that is most frequent in the row."""
        return {
            "chance": 1 / (self.spec.vocab_size - 2),
            "most frequent of the row": most_frequent_label(self, split),
        }
