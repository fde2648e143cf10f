"""Which mixers a test is run with, where running it with all of them takes longer than the suite may."""

from collections.abc import Iterable

import pytest

from models import mixer as mixers


def one_of_each_primitive(names: Iterable[str]) -> list:
    """One test parameter for each mixer. All but the first of those that stand on the same primitive are marked slow: what is
    tested is a matter of the primitive, and all are run with -m slow."""
    seen, found = set(), []
    for name in names:
        primitive = mixers.find(name).primitive
        marks = [pytest.mark.xdist_group(name)] + [pytest.mark.slow] * (primitive in seen)
        found.append(pytest.param(name, marks=marks))
        seen.add(primitive)
    return found
