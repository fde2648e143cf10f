"""What the comparison of whole steps refuses before any of its processes is started."""

import os

import pytest

from benchmarks import steps
from common.errors import UserError


@pytest.mark.parametrize(
    "option, message",
    [
        ("--cores=0", "--cores must be from 1"),
        ("--rounds=0", "--rounds must be from 1"),
        ("--modes=eagr", "--modes='eagr' is unknown; did you mean 'eager'"),
        ("--sizes=default,lage", "--sizes='lage' is unknown; did you mean 'large'"),
        ("--mixers=atention", "did you mean 'attention'"),
        ("--implementation=blockwize", "blockwize"),
    ],
)
def test_what_is_refused(option, message):
    with pytest.raises(UserError, match=message):
        steps.main([option])


def test_the_speed_of_products():
    """That of one core: of a process that may use no other."""
    before = os.sched_getaffinity(0)
    assert 1e8 < steps._matmul_peak(max(before)) < 1e13 and os.sched_getaffinity(0) == before
