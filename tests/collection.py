"""Which mixers a test is run with, where running it with all of them takes longer than the suite may."""

from collections.abc import Iterable

import pytest

from models import mixer as mixers


def one_of_each_primitive(names: Iterable[str], others: pytest.MarkDecorator = pytest.mark.slow) -> list:
    """One test parameter for each mixer. What is tested is a matter of the primitive, and so all but the first of those that
    stand on the same primitive bear the mark `others`: they are run with -m slow, or with -m thorough."""
    seen, found = set(), []
    for name in names:
        primitive = mixers.find(name).primitive
        marks = [pytest.mark.xdist_group(name)] + [others] * (primitive in seen)
        found.append(pytest.param(name, marks=marks))
        seen.add(primitive)
    return found
