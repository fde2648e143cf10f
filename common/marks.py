"""Tables in pages that the code writes, between two comments that say so."""

import pathlib
import sys
from collections.abc import Callable


def insert(page: str, name: str, table: str) -> str:
    """A Markdown page with `table` between its marks `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
      ValueError: if the page does not have both marks once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the marks {begin} and {end} once each")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(name: str, table: Callable[[], str]) -> None:
    """The command of a table: prints it, or puts it into the page that the command line names."""
    if len(sys.argv) > 1:
        path = pathlib.Path(sys.argv[1])
        path.write_text(insert(path.read_text(), name, table()))
    else:
        print(table())
