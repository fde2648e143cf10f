"""The table of tasks in docs/tasks.md, from the first paragraphs of their files.

python -m data.catalogue                  prints the table
python -m data.catalogue docs/tasks.md    puts it into the page, between the marks
"""

import sys

from common import marks
from data import task as tasks

NAME = "tasks"


def table() -> str:
    """A Markdown table, one row for each task; links are those of a page in docs/."""
    lines = ["| task | what it asks |", "|---|---|"]
    for name in tasks.names():
        docstring = sys.modules[tasks.find(name).__module__].__doc__
        what = " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| [`{name}`](../data/tasks/{name}.py) | {what} |")
    return "\n".join(lines)


if __name__ == "__main__":
    marks.run(__doc__, NAME, table)
