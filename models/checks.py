"""The checks of hyperparameters, where a mixer is built: each raises a `UserError` that names the one to change."""

import contextlib
import math
from collections.abc import Iterator

from common.errors import UserError


def at_least(least: float, **given: float | None) -> None:
    """Checks numbers against a lower bound.

    Args:
      least: the smallest number that is allowed.
      **given: the numbers, under their hyperparameters' names; None, which stands for a default, passes.

    Raises:
      UserError: for a number that is below, or not finite.
    """
    for key, value in given.items():
        if value is not None and not least <= value < math.inf:
            raise UserError(f"`{key}` must be at least {least}, got {value}")


def positive(**given: float | None) -> None:
    """Raises a UserError for a number, given under its hyperparameter's name, that is not positive and finite; None passes."""
    for key, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"`{key}` must be positive and finite, got {value}")


def finite(**given: float | None) -> None:
    """Raises a UserError for a number, given under its hyperparameter's name, that is not finite; None passes."""
    for key, value in given.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"`{key}` must be finite, got {value}")


def even(**given: int) -> None:
    """Raises a UserError for a number, given under its hyperparameter's name, that is not even or not positive."""
    for key, value in given.items():
        if value < 2 or value % 2:
            raise UserError(f"`{key}` must be an even number, 2 or more, got {value}")


def ascending(**given: float) -> None:
    """Raises a UserError if two numbers, given under their hyperparameters' names, are not 0 < first <= second < infinity."""
    (low, first), (high, second) = given.items()
    if not 0 < first <= second < math.inf:
        raise UserError(f"0 < `{low}` <= `{high}` must hold, got {low}={first} and {high}={second}")


def whole(product: float) -> int:
    """A number of channels, rounded down; a product that misses a whole number by rounding errors alone is that number, so that
    i / width times the width is i for every i."""
    nearest = round(product)
    return nearest if abs(product - nearest) <= 1e-12 * abs(nearest) else math.floor(product)


def scaled(width: int, **factor: float) -> int:
    """A whole number of channels.

    Args:
      width: number of channels that is scaled.
      **factor: one number, under its hyperparameter's name.

    Returns:
      width times the factor, as `whole` rounds it.

    Raises:
      UserError: if that is less than 1, or the factor is not finite.
    """
    positive(**factor)
    ((key, value),) = factor.items()
    if whole(value * width) < 1:
        raise UserError(f"`{key}`={value} times the width {width} must be 1 or more; increase `{key}` or the width")
    return whole(value * width)


def unused(needs: str, **given: bool) -> None:
    """Raises a UserError for a hyperparameter without effect that was given, which is True under its name; `needs` says what it
    acts on."""
    for key, is_given in given.items():
        if is_given:
            raise UserError(f"`{key}` has no effect: {needs}")


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Puts `what` before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def head_size(total: int, heads: int, what: str, key: str = "heads") -> int:
    """total / heads.

    Args:
      total: number of channels (or of heads) to be divided.
      heads: number of equal parts.
      what: the total in words, such as "width", for the message.
      key: the hyperparameter that `heads` is.

    Raises:
      UserError: if it is not whole.
    """
    if heads < 1 or total < 1 or total % heads:
        raise UserError(f"{what} {total} cannot be divided into {heads} {key}; change it or `{key}`")
    return total // heads


def check_rotated(size: int, what: str = "the size of a rotated head", key: str = "heads") -> None:
    """Raises a UserError if `size` channels cannot be rotated in pairs; `what` and `key` as in `head_size`."""
    if size % 2:
        raise UserError(f"{what} must be even, since channels are rotated in pairs, got {size}; change `{key}`")


def grouped_heads(width: int, heads: int, kv_heads: int | None, head_channels: int | None) -> tuple[int, int]:
    """The channels of a head, width / heads by default, and the number of key-value heads, by default that of query heads.

    Raises:
      UserError: if `heads` does not divide the width that is theirs, or `kv_heads` does not divide `heads`.
    """
    size = head_size(width, heads, "width") if head_channels is None else head_channels
    kv_heads = heads if kv_heads is None else kv_heads
    head_size(heads, kv_heads, "the number of query heads", "kv_heads")
    return size, kv_heads
