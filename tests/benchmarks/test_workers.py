"""Processes that take turns."""

import os
import pathlib

import pytest

from benchmarks.workers import Worker, alternate

ROOT = pathlib.Path(__file__).parents[2]


def worker(code: str) -> Worker:
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.workers import serve; "
    return Worker("one", ["-c", head + code], os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are chosen as Linux does it")
def test_turns():
    """Each round is kept, a call's share of it; what a worker says of itself is read."""
    idle = worker("serve({'kind': 'idle'}, lambda number: None)")
    busy = worker("serve({'kind': 'busy'}, lambda number: [sum(range(1_000_000)) for _ in range(number)])")
    broken = worker("raise SystemExit('there is no such mixer')")
    failing = worker("serve({'kind': 'failing'}, lambda number: 1 / 0)")
    alternate([idle, busy, broken, failing], rounds=3, seconds=0.01, most=5)
    assert (idle.facts, busy.facts) == ({"kind": "idle"}, {"kind": "busy"})
    assert len(idle.cpu) == len(idle.wall) == len(busy.cpu) == 3 and not broken.cpu
    assert 0 <= max(idle.cpu) < min(busy.cpu) and busy.megabytes > 1
    assert (idle.error, broken.error) == ("", "there is no such mixer")
    assert failing.error == "ZeroDivisionError: division by zero"
