"""What a sweep is asked for, and how a command line says it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError, check_choice, check_range
from sweeps.sizing import MEASURES

BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What a sweep is asked for.

    Attributes:
      config: FILE or FILE:ARGUMENT of the experiment.
      axes: values by key; their product is the grid. A key with a dot, and `seed`, is one of the configuration; any other
        belongs into the experiment file's argument.
      workdir: directory of the sweep.
      settings: one value by key, for all cells. Hyperparameters of a mixer go to the cells that have the mixer.
      match: one of `MEASURES`, to size all mixers to one budget; None to take the configuration's width.
      budget: of the match; None for that of the first mixer of the axis `mixer`, all other values being the same.
      lengths: that the test split is scored at beside the one of training.
      allow_other_data: whether to go on with cells whose data has changed since they were run.
      hosts: that run each cell together.
    """

    config: str
    axes: Mapping[str, Sequence[str]]
    workdir: Path
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    match: str | None = None
    budget: float | None = None
    lengths: tuple[int, ...] = ()
    allow_other_data: bool = False
    hosts: int = 1

    def __post_init__(self):
        check_range("--hosts", self.hosts, 1)
        if clash := sorted(set(self.axes) & set(self.settings)):
            raise UserError(f"{clash[0]} is both an axis and set: choose one")
        for key, values in self.axes.items():
            if len(set(values)) < len(values) or not all(values):
                raise UserError(f"the values of {key} must be different and not empty, got {','.join(values)!r}")
        for key, values in (*self.axes.items(), *((key, [value]) for key, value in self.settings.items())):
            if comma := next((value for value in values if "," in value and not is_flag(key)), None):
                raise UserError(
                    f"{key}={comma!r} goes into the experiment file's argument, where commas separate: give it as a key of "
                    f"the configuration, such as task.{key}"
                )
        if not self.axes:
            raise UserError("a sweep needs an axis, such as --over seed=0,1,2")
        if self.match is not None:
            check_choice("match", self.match, MEASURES)
        if self.budget is not None and self.match is None:
            raise UserError(f"a budget needs a measure: add --match={'|'.join(MEASURES)}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise UserError(f"the budget must be a number above 0, got {self.budget}")
        if self.match and self.budget is None and "mixer" not in self.axes:
            raise UserError(
                "match needs something to match: an axis of mixers (mixer=A,B; the first is the reference) or a budget"
            )


def is_flag(key: str) -> bool:
    """Whether a key is one of the configuration, and not of the experiment file's argument."""
    return key == "seed" or "." in key


def pairs(option: str, items: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE, ... as a dict.

    Raises:
      UserError: for another form, or a key that is there twice; the message begins with the option.
    """
    found = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"{option} takes KEY=VALUE, not {item!r}")
        if key in found:
            raise UserError(f"{option} has {key} twice")
        found[key] = value
    return found


def split_values(text: str) -> list[str]:
    """The values of an axis, "A,B,C".

    Commas in brackets do not separate, nor do those of a value in quotes, which are taken off: "(1,2),(3,4)" has the values
    (1,2) and (3,4), and "'a,b',c" has a,b and c.

    Raises:
      UserError: if a bracket or quote is not closed, or a quoted value is followed by something else than a comma.
    """
    values, value, closing, quote = [], "", [], None
    for position, character in enumerate(text):
        if quote is not None:
            if character != quote:
                value += character
            elif closing:  # inside of brackets, quotes are part of the value
                value, quote = value + character, None
            else:
                if text[position + 1 : position + 2] not in ("", ","):
                    raise UserError(f"a comma must follow the value in quotes in {text!r}")
                quote = None
        elif character in "'\"" and (closing or not value):
            quote = character
            value += character if closing else ""
        elif character == "," and not closing:
            values.append(value)
            value = ""
        else:
            if character in BRACKETS:
                closing.append(BRACKETS[character])
            elif closing and character == closing[-1]:
                closing.pop()
            elif character in BRACKETS.values():
                raise UserError(f"{character!r} closes nothing in {text!r}; quotes around the value leave it as it is")
            value += character
    if quote is not None or closing:
        missing = quote if quote is not None else closing[-1]
        raise UserError(f"{missing!r} is missing in {text!r}")
    return [*values, value]


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """N,N,... as numbers in order, each once.

    Raises:
      UserError: for anything but whole numbers above 0.
    """
    items = text.split(",") if text else []
    if not all(item.isascii() and item.isdigit() and int(item) for item in items):
        raise UserError(f"{option} takes whole numbers above 0 joined by commas, not {text!r}")
    return tuple(sorted({int(item) for item in items}))
