"""Copying after a delay: a word, a silence, the word again (Hochreiter and Schmidhuber 1997; Arjovsky et al., arXiv
1511.06464; state-spaces/s4, src/dataloaders/datasets/copying.py).

    inputs   5 3 7  0 0 0 0 0 0  9 9 9
    labels   . . .  . . . . . .  5 3 7

Of the V tokens 0 is silence, 1..V-2 are data and V-1 asks for the next data token. The distance of a token and its answer is
`length - tokens`, the same for all: a longer row is a longer delay. Only the answers are scored, so that a model that
remembers nothing has accuracy 1 / (V - 2) whatever the delay.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask, most_frequent_label
from data.rows import token_row
from data.task import Spec


class Copying(GeneratedTask):
    """Data tokens, to be copied after a delay.

    Args:
      length: of the row: the tokens, the silence and the questions.
      tokens: data tokens of a row.
      vocab_size: tokens, silence and question included.

    Raises:
      UserError: if the tokens do not fit into the row, or there is no choice of tokens.
    """

    # The s4-copying experiment of state-spaces/s4: no silence.
    paper_size: ClassVar[dict] = {"length": 2048, "tokens": 1024, "vocab_size": 64}

    def __init__(self, length: int = 64, tokens: int = 8, vocab_size: int = 10):
        if tokens < 1 or length < 2 * tokens:
            raise UserError(f"length={length} must be at least 2 * tokens={2 * tokens}, with at least one token")
        if vocab_size < 4:
            raise UserError(
                f"vocab_size={vocab_size} must be at least 4: silence, question and two tokens to choose from"
            )
        self.name = "copying"
        self.spec = Spec(vocab_size, None, vocab_size, "token_labels", length, causal=True)
        self._tokens = tokens

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, tokens, vocab = self.spec.length, self._tokens, self.spec.vocab_size
        data = rng.integers(1, vocab - 1, size=tokens)
        inputs, labels, scored = np.zeros(length, np.int64), np.zeros(length, np.int64), np.zeros(length, bool)
        inputs[:tokens], inputs[-tokens:] = data, vocab - 1
        labels[-tokens:], scored[-tokens:] = data, True
        return token_row(inputs, labels, scored)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any data token, and of the one that is most frequent in the row."""
        return {
            "chance": 1 / (self.spec.vocab_size - 2),
            "most frequent of the row": most_frequent_label(self, split),
        }
