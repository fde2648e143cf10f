"""The contract of a suite, and how to find one.

A suite is one file `evaluation/suites/<name>.py` that defines one subclass of `Suite`. Nothing lists them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from common.plugins import Plugins


class Suite:
    """Tasks and their settings; the docstring says what they are asked for.

    Attributes:
      tasks: pairs of a task's name and, by hyperparameter, the values that make its grid.
    """

    tasks: ClassVar[Sequence[tuple[str, Mapping[str, Sequence[Any]]]]]


_PLUGINS = Plugins("suite", "evaluation.suites", Suite)


def names() -> list[str]:
    """The names of all suites: the files of `evaluation/suites/`."""
    return _PLUGINS.names()


def find(name: str) -> type[Suite]:
    """The class of a suite.

    Raises:
      UserError: if there is none of that name; the message names the nearest.
    """
    return _PLUGINS.find(name)
