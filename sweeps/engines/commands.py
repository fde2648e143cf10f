"""No engine at all: writes a command for each cell, for whatever can run commands."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.console import say
from common.errors import UserError
from common.files import write_atomically
from sweeps.engine import Engine, Seen

FILE = "commands.txt"


class Commands(Engine):
    """Writes the command of each cell that has something left to do into one file, a line for each.

    A cell over several hosts is its command on each of them. It needs what `train.py --distributed` needs.
    """

    waits = False
    known_options = {}

    def check(self) -> None:
        if self.resources.accelerators or self.resources.minutes or self.workers:
            raise UserError("--engine=commands only writes commands: it knows --hosts alone")

    def submit(self, cells: Sequence[Path], retries: int) -> list[str]:
        path = self.workdir / FILE
        write_atomically(path, "".join(shlex.join(self.command(cell)) + "\n" for cell in cells))
        say(f"{path} has the commands of {len(cells)} cells")
        return [cell.name for cell in cells]

    def states(self, given: Mapping[str, Path]) -> dict[str, Seen]:
        return dict.fromkeys(given, Seen("unknown"))

    def cancel(self, given: Mapping[str, Path]) -> None:
        raise UserError("this engine has started nothing: SIGTERM to a cell's process makes it save and stop")
