"""Phone book: a number is looked up by its name (Jelassi et al., "Repeat After Me", arXiv 2402.01032).

A row is text as bytes: lines of a name and its number, as many as fit into `length`, then two examples that are entries of the
book, then a name, whose number is the answer. What is left of the length is line ends in front. The row has the form of the
language model's, so that a byte-level language model answers without further training; scored are the twelve bytes of the number,
and a row is right where each of them is the most likely byte after what stands before it, which is what greedy decoding says.

    Ann Baker: 609-323-7777
    Tom Weber: 212-555-0123
    ...

    Tom Weber: 212-555-0123
    Ann Baker: 609-323-7777
    Eva Moser: 401-867-5309

Evaluate it over a grid of `length` and `depth`. The wording of the lines and the names are ours.
"""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Spec

FIRST = (
    "Ada Alan Amir Ann Anton Aya Ben Bea Carl Chen Clara Dan Dora Elif Emma Eric Eva Farid Felix Gina "
    "Greta Hana Hugo Ida Igor Ines Ivan Jack Jana Jin Joan Jose Juan Kai Kofi Lara Leo Lin Lisa Luca Mara "
    "Mark Maya Mei Mila Nina Noah Nora Olga Omar Oscar Otto Paul Petra Rosa Sami Sara Sven Tara Tom Uma "
    "Vera Yuki Zoe"
).split()
LAST = (
    "Abbott Adams Baker Bauer Becker Bell Berg Brown Carter Castro Chavez Cohen Cole Costa Cruz Diaz "
    "Duval Evans Fischer Ford Garcia Gomez Grant Gray Haas Hall Hansen Hill Huber Ito Jones Kane Keller "
    "Kim Klein Koch Kumar Lange Larsen Lee Lopez Mason Meyer Moreau Moser Nolan Novak Olsen Ortiz Park "
    "Patel Perez Reed Rossi Sato Silva Singh Smith Stone Tanaka Vogel Wang Weber Young"
).split()
NUMBER = 12
EXAMPLES = 2


class PhoneBook(GeneratedTask):
    """A number of twelve characters, to be found by its name.

    Args:
      length: inputs of a row.
      depth: where the entry is, 0 (the first line) to 1 (the last); None for everywhere, evenly.

    Raises:
      UserError: for a length too short for three entries or longer than there are names for, and a depth outside 0 to 1.
    """

    sizes: dict[str, int] = {"train": 100_000, "valid": 200, "test": 200}
    paper_size: ClassVar[dict] = {"length": 4096}

    def __init__(self, length: int = 512, depth: float | None = None):
        if depth is not None and not 0 <= depth <= 1:
            raise UserError(f"depth={depth} must be 0 (the first entry) to 1 (the last), or None for everywhere")
        longest = max(map(len, FIRST)) + max(map(len, LAST)) + NUMBER + 4
        # Entries, examples, the question, and an empty line.
        least, most = (2 * EXAMPLES + 2) * longest, len(FIRST) * len(LAST) * (NUMBER + 10)
        if not least <= length <= most:
            raise UserError(f"length={length} must be {least} to {most}: three entries at least, and none twice")
        self.name = "phone_book"
        self.spec = Spec(256, None, 256, "causal_lm", length, metrics=("row_accuracy", "accuracy"))
        self._depth = depth

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length = self.spec.length
        lines, sizes = [], []
        # Rarely more than are needed; none twice.
        names = rng.permutation(len(FIRST) * len(LAST))[: length // (NUMBER + 9) + 1]
        numbers = rng.integers((200, 200, 0), (1000, 1000, 10_000), size=(len(names), 3))
        for name, (area, middle, end) in zip(names.tolist(), numbers.tolist()):
            first, last = divmod(name, len(LAST))
            lines.append(f"{FIRST[first]} {LAST[last]}: {area}-{middle}-{end:04}\n")
            sizes.append(len(lines[-1]))
        # The three longest of the entries may be asked for, whichever are; with an empty line between.
        room = length + 1 - 1 - (EXAMPLES + 1) * max(sizes)
        lines = lines[: int(np.searchsorted(np.cumsum(sizes), room, "right"))]
        asked = int(rng.integers(len(lines))) if self._depth is None else round(self._depth * (len(lines) - 1))
        others = np.delete(np.arange(len(lines)), asked)
        shown = rng.permutation(others)[:EXAMPLES]
        text = "".join([*lines, "\n", *(lines[i] for i in shown), lines[asked]])[:-1].rjust(length + 1, "\n")
        ids = self.encode(text)
        return token_row(ids[:-1], ids[1:], np.arange(length) >= length - NUMBER)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Row accuracy of any number, and of any number of the book but those of the examples, which are never asked for."""
        shares = [
            1 / (self.decode(row["inputs"]).strip("\n").partition("\n\n")[0].count("\n") + 1 - EXAMPLES)
            for row in self.rows(split)
        ]
        return {"chance": 1 / (800 * 800 * 10_000), "a number of the book": float(np.mean(shares))}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")
