"""The table of mixers in the README, from what the mixers say of themselves.

python -m models.catalogue            prints the table
python -m models.catalogue README.md  puts it into a file, between the marks
"""

import pathlib
import sys

from models import mixer as mixers

BEGIN, END = "<!-- mixers: begin -->", "<!-- mixers: end -->"


def table() -> str:
    """A Markdown table, one row for each mixer."""
    header = ("mixer", "paper", "primitive", "causal", "two-sided", "streams", "packs", "constant carry", "time in T")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    yes = lambda value: "yes" if value else "no"
    for name in mixers.names():
        cls = mixers.find(name)
        two_sided = "own" if cls.bidirectional else "wrapped" if cls.causal else "no"
        packs = "yes" if cls.packing else "padding only" if cls.padding else "no"
        carry = yes(cls.constant_carry) if cls.streaming else "–"
        flags = (yes(cls.causal), two_sided, yes(cls.streaming), packs, carry)
        cells = (f"[`{name}`](models/mixers/{name}.py)", cls.paper, f"`{cls.primitive}`", *flags, cls.complexity)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(text: str) -> str:
    """`text` with the table between the marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = pathlib.Path(sys.argv[1])
        path.write_text(insert(path.read_text()))
    else:
        print(table())
