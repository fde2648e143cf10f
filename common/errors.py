"""Errors that a user can mend, and the hints in their messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What a user asked for cannot be done; the message says what to change.

    Entry points print the message alone and exit with status 1. Every other exception is a fault of the program, or of a mixer or
    task under development, and keeps its traceback.
    """


def nearest(given: object, known: Iterable[str]) -> list[str]:
    """The names that an unknown one may stand for: those spelt like it, and those of whose words it has the initials (lr)."""
    given, known = str(given), list(known)
    initials = [name for name in known if "_" in name and "".join(word[:1] for word in name.split("_")) == given]
    return list(dict.fromkeys([*initials, *difflib.get_close_matches(given, known, n=3, cutoff=0.5)]))[:3]


def near(given: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the names that it may stand for, or else all of them."""
    known = list(known)
    if found := nearest(given, known):
        return f"did you mean {' or '.join(map(repr, found))}?"
    return f"choose one of {', '.join(known)}" if known else "there are none"


def check_choice(what: str, given: object, known: Iterable[str]) -> None:
    """Raises a UserError, with the near names, where `given` is not one of `known`."""
    known = list(known)
    if given not in known:
        raise UserError(f"{what}={given!r} is unknown; {near(given, known)}")


def check_range(what: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises a UserError where a number is not from `low` to `high`, or is none (NaN)."""
    if not low <= value <= high:
        allowed = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise UserError(f"{what} must be {allowed}, got {value}")
