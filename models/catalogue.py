"""The table of mixers in docs/mixers.md, from what the mixers say of themselves.

python -m models.catalogue                  prints the table
python -m models.catalogue docs/mixers.md   puts it into the page, between the marks
"""

from common import marks
from models import mixer as mixers

NAME = "mixers"
WIDTH = 256  # of the mixers that are asked; none is too narrow for its defaults


def table() -> str:
    """A Markdown table, one row for each mixer with its default hyperparameters; links are those of a page in docs/.

    What differs between a mixer's causal and its two-sided form is said of each.
    """
    header = (
        "mixer",
        "paper",
        "primitive",
        "causal",
        "two-sided",
        "streams",
        "packs",
        "constant carry",
        "in shards",
        "time in T",
    )
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in mixers.names():
        cls = mixers.find(name)
        causal = mixers.sketch(name, WIDTH) if cls.causal else None
        two_sided = (
            mixers.sketch(name, WIDTH, causal=False) if cls.bidirectional else causal
        )  # a wrapper packs as its halves
        own = "own" if cls.bidirectional else "wrapped" if cls.causal else "no"
        streams = causal is not None and causal.streams
        cells = (
            f"[`{name}`](../models/mixers/{name}.py)",
            cls.paper,
            f"`{cls.primitive}`",
            _yes(cls.causal),
            own,
            _yes(streams),
            _of_forms(None if causal is None else _packs(causal), _packs(two_sided)),
            _yes(causal.constant_carry) if streams else "–",
            _shards(causal, two_sided),
            cls.complexity,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _shards(causal: mixers.Mixer | None, two_sided: mixers.Mixer | mixers.Bidirectional) -> str:
    forms = {
        "causal": causal is not None and causal.in_shards,
        "two-sided": two_sided is not causal and two_sided.in_shards,
    }
    return " and ".join(name for name, able in forms.items() if able) or "no"


def _packs(mixer: mixers.Mixer | mixers.Bidirectional) -> str:
    return "yes" if mixer.packing else "padding only" if mixer.padding else "no"


def _of_forms(causal: str | None, two_sided: str) -> str:
    return two_sided if causal in (None, two_sided) else f"causal: {causal}, two-sided: {two_sided}"


if __name__ == "__main__":
    marks.run(__doc__, NAME, table)
