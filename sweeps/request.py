"""What a sweep is asked for, and how a command line says it."""

import dataclasses
import itertools
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
      score: settings of the task that the test split is scored under beside those of training, each "task.KEY=A,B", see
        `evaluation.settings.parse`.
      allow_other_data: whether to go on with cells whose data has changed since they were run.
      hosts: that run each cell together.
      points: combinations of values by key, all with the same keys, that are taken with each of the grid of the axes; None
        where the axes are all.
      over: the axes that `points` stand for, as `sweeps.ladder.climb` makes them of a grid.
      best_of: axes that are tuned: for each combination of the others, the value that is best on validation is reported.
      seeds_of_best: tune with seed 0, and run what was chosen with so many seeds, 0, 1, ...; None for all seeds of the axes.
      reference: the row that the others are compared with: its mixer, or KEY=VALUE; None for the best.
      match_to: the mixer whose amount is the budget of the match; None for the first one.
      base_width: that the number of heads belongs to, which grows with the width, see `sweeps.ladder`; None for the same at every
        width.
      fit: names of `sweeps.fits.FITS` that the report has.
    """

    config: str
    axes: Mapping[str, Sequence[str]]
    workdir: Path
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    match: str | None = None
    budget: float | None = None
    lengths: tuple[int, ...] = ()
    score: tuple[str, ...] = ()
    allow_other_data: bool = False
    hosts: int = 1
    points: Sequence[Mapping[str, str]] | None = None
    over: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    best_of: tuple[str, ...] = ()
    seeds_of_best: int | None = None
    reference: str | None = None
    match_to: str | None = None
    base_width: int | None = None
    fit: tuple[str, ...] = ()

    def __post_init__(self):
        check_range("--hosts", self.hosts, 1)
        drawn = {key: [point[key] for point in self.points] for key in self.points[0]} if self.points else {}
        if clash := sorted({*self.axes, *drawn} & set(self.settings)):
            raise UserError(f"{clash[0]} is both an axis and set: choose one")
        if clash := sorted(set(self.axes) & set(drawn)):
            raise UserError(f"{clash[0]} is both an axis and of the listed cells: choose one")
        self._check_tuning({*self.axes, *drawn})
        wanted = self.reference_values
        if "seed" in wanted:
            raise UserError(f"--reference={self.reference}: rows are means over seeds, name one by its other values")
        if wanted and not any(wanted.items() <= {**self.settings, **values}.items() for values in self.combinations()):
            raise UserError(
                f"--reference={self.reference} is no row of the report: it is a mixer, or KEY=VALUE of an axis"
            )
        for key, values in self.axes.items():
            if len(set(values)) < len(values) or not all(values):
                raise UserError(f"the values of {key} must be different and not empty, got {','.join(values)!r}")
        for key, values in (
            *self.axes.items(),
            *drawn.items(),
            *((key, [value]) for key, value in self.settings.items()),
        ):
            if comma := next((value for value in values if "," in value and not is_flag(key)), None):
                raise UserError(
                    f"{key}={comma!r} goes into the experiment file's argument, where commas separate: give it as a key of "
                    f"the configuration, such as task.{key}"
                )
        if not self.axes and not self.points:
            raise UserError("a sweep needs an axis, such as --over seed=0,1,2")
        if self.match is not None:
            check_choice("match", self.match, MEASURES)
        if self.match is not None and self.base_width is not None:
            raise UserError("--ladder says the widths, and --match solves for them: choose one")
        if self.budget is not None and self.match is None:
            raise UserError(f"a budget needs a measure: add --match={'|'.join(MEASURES)}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise UserError(f"the budget must be a number above 0, got {self.budget}")
        if self.match and self.budget is None and self.first_mixer is None:
            raise UserError(
                "match needs something to match: an axis of mixers (mixer=A,B; the first is the reference) or a budget"
            )

    def _check_tuning(self, keys: set[str]) -> None:
        for key in self.best_of:
            if key in self.reference_values:
                raise UserError(
                    f"--reference={self.reference} and --best_of={key}: what is tuned away tells no row from another"
                )
            if key == "seed":
                raise UserError("a seed is not tuned: results would be those of lucky ones")
            check_choice("--best_of", key, sorted(keys))
        if self.seeds_of_best is not None:
            check_range("--seeds_of_best", self.seeds_of_best, 1)
            if not self.best_of:
                raise UserError("--seeds_of_best needs --best_of=KEY: it runs what was chosen with more seeds")
            if "seed" in keys or "seed" in self.settings:
                raise UserError("--seeds_of_best has its own seeds, 0, 1, ...: leave out seed")

    @property
    def grid(self) -> dict[str, Sequence[str]]:
        """The axes that were asked for with their values, points or not; without what a program listed and what was drawn."""
        return {**self.over, **self.axes}

    @property
    def first_mixer(self) -> str | None:
        """The mixer whose amount is the budget of a match; None where mixers are no axis."""
        first = {key: values[0] for key, values in self.axes.items()} | dict(self.points[0] if self.points else {})
        return self.match_to or first.get("mixer")

    @property
    def reference_values(self) -> dict[str, str]:
        """The values that the reference has; {} where none is named."""
        if self.reference is None:
            return {}
        return pairs("--reference", self.reference.split(",") if "=" in self.reference else [f"mixer={self.reference}"])

    def combinations(self) -> list[dict[str, str]]:
        """The values of each cell, by key."""
        axes = dict(self.axes) | ({"seed": ["0"]} if self.seeds_of_best is not None else {})
        grid = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
        return [{**point, **values} for point in self.points or [{}] for values in grid]


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

    Spaces around a value are none of it. Commas in brackets do not separate, nor do those of a value in quotes, which are taken
    off: "(1,2),(3,4)" has the values (1,2) and (3,4), and "'a,b',c" has a,b and c.

    Raises:
      UserError: if a bracket or quote is not closed, or a quoted value is followed by something else than a comma.
    """
    values, value, closing, quote, quoted = [], "", [], None, False
    for position, character in enumerate(text):
        if quote is not None:
            if character != quote:
                value += character
            elif closing:  # inside of brackets, quotes are part of the value
                value, quote = value + character, None
            else:
                if text[position + 1 :].lstrip()[:1] not in ("", ","):
                    raise UserError(f"a comma must follow the value in quotes in {text!r}")
                quote, quoted = None, True
        elif character in "'\"" and (closing or not value):
            quote = character
            value += character if closing else ""
        elif character == "," and not closing:
            values.append(value if quoted else value.rstrip())
            value, quoted = "", False
        elif character.isspace() and not closing and (quoted or not value):
            continue  # around a value
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
    return [*values, value if quoted else value.rstrip()]


def names(option: str, text: str) -> tuple[str, ...]:
    """NAME,NAME,... in their order; none for no text.

    Raises:
      UserError: for one that is empty or is there twice.
    """
    items = text.split(",") if text else []
    if not all(items) or len(set(items)) < len(items):
        raise UserError(f"{option} takes different names joined by commas, not {text!r}")
    return tuple(items)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """N,N,... as numbers in order, each once.

    Raises:
      UserError: for anything but whole numbers above 0.
    """
    items = text.split(",") if text else []
    if not all(item.isascii() and item.isdigit() and int(item) for item in items):
        raise UserError(f"{option} takes whole numbers above 0 joined by commas, not {text!r}")
    return tuple(sorted({int(item) for item in items}))
