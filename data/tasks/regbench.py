"""RegBench: the language of an automaton that only the row's own strings tell of (Akyürek et al., arXiv 2401.12973;
berlino/seq_icl, src/dataloaders/dfa.py).

Each row has a random automaton of its own: 4 to 12 states, an alphabet of 4 to 18 of the 18 letters, and out of each state 1
to 3 letters, to states other than itself and each other. It is walked from its first state, every way out as likely; 10 to 19
strings of 1 to 49 letters, with "|" between, are the row, cut off at `length` or filled up with ".". The label of each
position is the next token; what is scored are letters, not "|".

What is compared is the share of letters that are right; who knows the automaton is right where there is one way out, and a half
or a third of the times elsewhere: `task.ceiling(split)`. The paper's accuracy (whether the likeliest letter is a legal one) and
its total variation need more than the next token.

Departures from the source: rows are new in each epoch (there, 5000 automata), and automata are not minimised, which changes no
string. A string has any of its lengths as likely.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Spec

LETTERS = 18
SEPARATOR, BLANK = LETTERS, LETTERS + 1
STATES = (4, 13)
STRINGS = (10, 20)
SIZES = (1, 50)
WAYS = (1, 4)


class RegBench(GeneratedTask):
    """Next letters of strings of a new automaton in each row.

    Args:
      length: of the row; 1000 holds every row.

    Raises:
      UserError: for a length that is too short for a string to say something of the next one.
    """

    sizes: dict[str, int] = {"train": 5_000, "valid": 250, "test": 250}
    paper_size: ClassVar[dict] = {"length": 1000}

    def __init__(self, length: int = 256):
        if length < 2:
            raise UserError(f"length={length} must be at least 2")
        self.name = "regbench"
        self.spec = Spec(LETTERS + 2, None, LETTERS + 2, "causal_lm", length, unit="letter", metric="accuracy")

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text, _ = self.strings(rng)
        labels = text[1:]
        return token_row(text[:-1], labels, labels < LETTERS)

    def strings(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row [length + 1], and the number of ways out at each of them that is a letter, else 0."""
        letters, targets = self.automaton(rng)
        tokens, ways = [], []
        for number in range(rng.integers(*STRINGS)):
            if number:
                tokens.append(SEPARATOR)
                ways.append(0)
            state = 0
            for draw in rng.random(rng.integers(*SIZES)).tolist():
                way = int(draw * len(letters[state]))
                tokens.append(letters[state][way])
                ways.append(len(letters[state]))
                state = targets[state][way]
        size = self.spec.length + 1
        tokens, ways = tokens[:size], ways[:size]
        blanks = size - len(tokens)
        return np.array(tokens + [BLANK] * blanks), np.array(ways + [0] * blanks)

    def automaton(self, rng: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
        """For each state the letters that lead out of it, and where they lead."""
        states = int(rng.integers(*STATES))
        alphabet = rng.permutation(LETTERS)[: rng.integers(4, LETTERS + 1)]
        letters, targets = [], []
        for state in range(states):
            ways = int(rng.integers(*WAYS))
            others = np.delete(np.arange(states), state)
            letters.append(rng.permutation(alphabet)[:ways].tolist())
            targets.append(rng.permutation(others)[:ways].tolist())
        return letters, targets

    def ceiling(self, split: str = "test") -> float:
        """The accuracy of who knows the automata: one divided by the ways out, averaged over what is scored."""
        shares = []
        for index in range(self.num_examples(split)):
            _, ways = self.strings(np.random.default_rng([self.splits.index(split), 0, index, 0]))
            shares.append(1 / ways[1:][ways[1:] > 0])
        return float(np.mean(np.concatenate(shares)))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any letter, and of what followed most often in the row so far: the last letter, or the last two (and where
        that was never there, one less); of equally frequent letters the one that came first."""
        right, count = np.zeros(2), 0
        for row in self.rows(split):
            text = [*row["inputs"].tolist(), int(row["targets"][-1])]
            seen: dict[tuple, dict[int, int]] = {}
            for t in range(1, len(text)):
                contexts = [tuple(text[max(0, t - n) : t]) for n in (2, 1, 0)]
                if row["weights"][t - 1]:
                    count += 1
                    for order, known in enumerate((contexts[1:], contexts)):
                        table = next((seen[context] for context in known if context in seen), {})
                        right[order] += max(table, key=table.get, default=-1) == text[t]
                if text[t] < LETTERS:
                    for context in set(contexts):
                        table = seen.setdefault(context, {})
                        table[text[t]] = table.get(text[t], 0) + 1
        return dict(zip(("chance", "2-gram of the row", "3-gram of the row"), [1 / LETTERS, *(right / count).tolist()]))
