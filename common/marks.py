"""Tables in pages that the code writes, between two comments that say so."""

import pathlib
from collections.abc import Callable

from common import command
from common.errors import UserError


def insert(page: str, name: str, table: str) -> str:
    """A Markdown page with `table` between its marks `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
      UserError: if the page does not have both marks once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(f"the page must have the marks {begin} and {end} once each")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def run(description: str, name: str, table: Callable[[], str]) -> None:
    """The program of a table: prints it, or puts it into the page that the command line names. Does not return.

    Args:
      description: the module's docstring, for --help.
      name: of the marks.
      table: makes it.
    """

    def main(arguments: list[str]) -> None:
        parser = command.Parser(description)
        parser.add_argument("page", nargs="?", type=pathlib.Path, metavar="PAGE", help="a Markdown file with the marks")
        page = parser.parse_args(arguments).page
        if page is None:
            print(table())
        elif not page.is_file():
            raise UserError(f"there is no page {page}")
        else:
            page.write_text(insert(page.read_text(), name, table()))

    command.run(main)
