"""The table of architectures in docs/weights.md, from what their files say of themselves.

python -m models.import_hf.catalogue                    prints the table
python -m models.import_hf.catalogue docs/weights.md    puts it into the page, between the marks
"""

import importlib

from common import marks
from models.import_hf import families
from models.import_hf.architectures import ARCHITECTURES

NAME = "architectures"


def table() -> str:
    """A Markdown table, one row for each architecture; links are those of a page in docs/."""
    header = ("`model_type`", "what it is", "mixers")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for kind, architecture in ARCHITECTURES.items():
        document = importlib.import_module(f"{families.__name__}.{kind}").__doc__
        first = " ".join(document.partition("\n\n")[0].split())
        mixers = ", ".join(f"`{name}`" for name in sorted(architecture.mixers))
        lines.append(f"| [`{kind}`](../models/import_hf/families/{kind}.py) | {first.rstrip('.')} | {mixers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    marks.run(__doc__, NAME, table)
