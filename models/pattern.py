"""The layers of a model, as text.

    mamba+local_attention                   two blocks, which the depth repeats
    3*gated_delta_net/moe+attention/moe     three blocks, then one; "/moe" is their channel mixer
    attention|mamba2                        one block, whose two mixers act side by side
    2*(mamba/none+attention/post)+mamba     brackets; "/post" is where the block has its norms

An item is the name of a mixer, or several joined by "|". Words behind a "/" choose the block's channel mixer or the position of
its norms, in any order, in place of `model.channel_mixer` and `model.norm_position`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.errors import UserError, near
from models.channel_mixers import CHANNEL_MIXERS

CHANNELS = ("none", *CHANNEL_MIXERS, "moe")
# Where a branch f has its norms: x + f(norm(x)); norm(x + f(x)); x + norm(f(norm(x))); x + norm(f(x)); h + f(h) with h = norm(x).
NORM_POSITIONS = ("pre", "post", "sandwich", "output", "input")

MOST = 1000  # times that an item may be multiplied by

_TOKEN = re.compile(r"\s*(\d+(?=\s*\*)|[*+()]|[^\s*+()]+)")


class Item(NamedTuple):
    """A block.

    Attributes:
      mixers: names of its mixers; more than one act side by side.
      channel: its channel mixer, one of `CHANNELS`; None for that of the model.
      norm_position: one of `NORM_POSITIONS`; None for that of the model.
    """

    mixers: tuple[str, ...]
    channel: str | None = None
    norm_position: str | None = None


def parse(text: str, key: str = "model.pattern") -> Item:
    """The item of a text without "+", "*" and brackets.

    Args:
      text: such as "attention|mamba2/moe".
      key: of the configuration, for the message.

    Raises:
      UserError: for an empty name, a mixer that is there twice, an unknown word behind a "/", or two of a kind.
    """
    names, *words = text.split("/")
    mixers = tuple(names.split("|"))
    if not all(mixers):
        raise UserError(
            f"{key}: {text!r} names no mixer; an item is a mixer, or several joined by '|', as in 'mamba/moe'"
        )
    if len(set(mixers)) < len(mixers):
        raise UserError(f"{key}: the mixers side by side in {text!r} must be different")
    chosen = {}
    for word in words:
        kind = "channel" if word in CHANNELS else "norm_position" if word in NORM_POSITIONS else None
        if kind is None:
            known = (*CHANNELS, *NORM_POSITIONS)
            raise UserError(
                f"{key}: {word!r} in {text!r} is neither a channel mixer nor a position of norms; {near(word, known)}"
            )
        if kind in chosen:
            raise UserError(f"{key}: {text!r} has both {chosen[kind]!r} and {word!r}, where a block takes one")
        chosen[kind] = word
    return Item(mixers, **chosen)


def expand(texts: Iterable[str], key: str = "model.pattern") -> tuple[str, ...]:
    """The items of a pattern, one text each, without multipliers and brackets.

    Args:
      texts: each an item, or a pattern as in the module's docstring.
      key: of the configuration, for the message.

    Raises:
      UserError: for what is no pattern; items are not looked into, see `parse`.
    """
    return tuple(item for text in texts for item in _expand(text, key))


def _expand(text: str, key: str) -> list[str]:
    tokens = _TOKEN.findall(text)[::-1]

    def refuse(found: str | None):
        what = "it ends too soon" if found is None else f"{found!r} is out of place"
        return UserError(f"{key}: {text!r} is no pattern, {what}; one is like '3*gla/moe+attention' or '2*(mamba+gla)'")

    def take() -> str | None:
        return tokens.pop() if tokens else None

    def term() -> list[str]:
        first = take()
        if first is not None and first.isdigit() and tokens[-1:] == ["*"]:
            take()
            if not 1 <= int(first[:9]) <= MOST:
                raise UserError(f"{key}: {first} in {text!r}: multipliers are from 1 to {MOST}")
            return int(first) * term()
        if first == "(":
            found = joined()
            if (end := take()) != ")":
                raise refuse(end)
            return found
        if first is None or first in "*+)":
            raise refuse(first)
        return [first]

    def joined() -> list[str]:
        found = term()
        while tokens and tokens[-1] == "+":
            take()
            found = found + term()
        return found

    found = joined()
    if tokens:
        raise refuse(tokens[-1])
    return found


def mixers_of(items: Sequence[str]) -> tuple[str, ...]:
    """The names of the mixers in a pattern, each once, in the order of their first appearance."""
    return tuple(dict.fromkeys(name for text in items for name in parse(text).mixers))
