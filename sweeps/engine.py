"""What an engine is: it starts the processes of a sweep's cells. Each file of `sweeps/engines/` defines one.

Engines hold no state. Whom a cell was given to, what it has done and what is left of it is read from its directory, so that the
same command, given again from anywhere, goes on with what is there. `sweeps.driver` does that, for all engines.
"""

import abc
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from common import remote
from common.errors import UserError, check_range, near
from common.plugins import Plugins
from training.command_line import ROOT

# What a cell's processes get of the environment where it is given to an engine.
PASSED = ("JAX_", "XLA_", "MIXOLOGY_", "LIBTPU_", "TF_CPP_", "HF_", "TFDS_")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a cell is to have.

    Attributes:
      hosts: that run it together, a process on each.
      accelerators: of each host: a number, or KIND:NUMBER; None for what the engine gives by itself.
      minutes: after which it is stopped, saved; None for no limit of ours.

    Raises:
      UserError: for numbers below 1.
    """

    hosts: int = 1
    accelerators: str | None = None
    minutes: int | None = None

    def __post_init__(self):
        check_range("--hosts", self.hosts, 1)
        if self.minutes is not None:
            check_range("--minutes", self.minutes, 1)
        if self.accelerators is not None and not re.fullmatch(r"([^:]+:)*0*[1-9]\d*", self.accelerators):
            raise UserError(f"--accelerators takes NUMBER or KIND:NUMBER, for each host, not {self.accelerators!r}")

    @property
    def kind(self) -> str:
        """The kind of accelerator; empty where only their number is asked for."""
        return (self.accelerators or "").rpartition(":")[0]

    @property
    def count(self) -> str:
        """Accelerators of each host; empty where none are asked for."""
        return (self.accelerators or "").rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an engine knows of a job.

    Attributes:
      state: "queued"; "running"; "ended", and the cell's directory says how; "cancelled", by somebody; or "unknown", where the
        engine cannot tell, and only the directory can.
      why: a word of the engine's on how it has ended.
    """

    state: str
    why: str | None = None


ALONE = Resources()


class Engine(abc.ABC):
    """Starts cells, each a command that runs a cell where it is, on every one of its hosts.

    Args:
      workdir: directory of the sweep.
      resources: of each cell.
      options: of the engine, by name.
      workers: cells that run at the same time; None for as many as there is room for.

    Raises:
      UserError: for what the engine does not have.
    """

    name: str  # that of its file
    poll = 2.0  # seconds between two questions
    lasting = True  # whether jobs go on when the command that submitted them has ended
    remote = False  # whether the cells may be on an object store
    waits = True  # whether a command can wait for jobs
    known_options: ClassVar[Mapping[str, str] | None] = None  # what each is; None where the engine takes any

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.name = vars(cls).get("name", cls.__module__.rpartition(".")[2])

    def __init__(
        self,
        workdir: Path,
        resources: Resources = ALONE,
        options: Mapping[str, str] | None = None,
        workers: int | None = None,
    ):
        if remote.is_address(workdir) and not self.remote:
            raise UserError(
                f"--workdir={workdir}: --engine={self.name} gives cells to machines by a directory that all see; give one (a "
                "mounted bucket, say), or take --engine=local"
            )
        if workers is not None:
            check_range("--workers", workers, 1)
        self.workdir = workdir
        self.resources = resources
        self.options = dict(options or {})
        self.workers = workers
        for key in self.options if self.known_options is not None else ():
            if not self.known_options:
                raise UserError(f"--engine={self.name} has no options, it was given {', '.join(self.options)}")
            if key not in self.known_options:
                raise UserError(f"--engine={self.name} has no option {key}; {near(key, self.known_options)}")
        self.check()

    def check(self) -> None:  # noqa: B027 (a subclass may have nothing to say)
        """Raises a UserError for resources, options or workers that the engine cannot have."""

    @abc.abstractmethod
    def submit(self, cells: Sequence[Path], retries: int) -> list[str]:
        """Gives cells, by their directories, to the engine; returns its names for the jobs.

        Args:
          cells: directories that hold `job/cell.json`.
          retries: how often the engine may start a job anew by itself that has ended with 75 or was lost.

        Raises:
          UserError: if the engine cannot be reached, or does not take them.
        """

    @abc.abstractmethod
    def states(self, given: Mapping[str, Path]) -> dict[str, Seen]:
        """What has become of jobs: by their names, with the directories of their cells."""

    @abc.abstractmethod
    def cancel(self, given: Mapping[str, Path]) -> None:
        """Stops jobs; those that run save first. It does not wait for them."""

    def kill(self, given: Mapping[str, Path]) -> None:
        """Ends jobs at once."""
        self.cancel(given)

    def command(self, cell: Path) -> list[str]:
        """The command that runs a cell where it is."""
        return [sys.executable, str(ROOT / "sweep.py"), f"--cell={cell}"]


def passed_environment() -> dict[str, str]:
    """What the processes of cells on other machines get of this process's environment."""
    return {key: value for key, value in os.environ.items() if key.startswith(PASSED)}


_PLUGINS = Plugins("engine", "sweeps.engines", Engine)


def names() -> list[str]:
    """The names of all engines: the files of `sweeps/engines/`."""
    return _PLUGINS.names()


def find(name: str) -> type[Engine]:
    """The class of an engine.

    Raises:
      UserError: if there is none of that name; the message has the near ones.
    """
    return _PLUGINS.find(name)
