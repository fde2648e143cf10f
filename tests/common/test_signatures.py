"""Options read from signatures and docstrings."""

import dataclasses

import pytest

from common import signatures


@dataclasses.dataclass
class Options:
    """Some options.

    Attributes:
      size: how large it is; a line that
        goes on.
      low, high: the ends.
      table: by name.

    Raises:
      ValueError: never.
    """

    size: int = 3
    low: float | None = None
    high: float = 1.0
    table: dict = dataclasses.field(default_factory=lambda: {"a": 1})


def test_defaults():
    found = signatures.defaults(Options, omit=("high",))
    assert found.to_dict() == {"size": 3, "low": None, "table": {"a": 1}}
    found.low = 2.0
    with pytest.raises(TypeError):
        found.low = "two"


def test_an_option_without_a_default_or_a_type():
    with pytest.raises(TypeError, match=r"option 'x' of .* needs a default"):
        signatures.defaults(lambda x: x)

    def untyped(x=None):
        return x

    with pytest.raises(TypeError, match=r"option 'x', whose default is None, is annotated `type \| None`"):
        signatures.defaults(untyped)


def test_descriptions():
    ends = "the ends."
    assert signatures.descriptions(Options, "Attributes") == {
        "size": "how large it is; a line that goes on.",
        "low": ends,
        "high": ends,
        "table": "by name.",
    }
    assert signatures.descriptions(Options, "Args") == {}
