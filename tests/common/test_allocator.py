"""Freed memory stays with the process, whichever thread had it."""

import os
import subprocess
import sys

import pytest

from common import allocator
from tests.processes import ROOT

# More than an arena of a thread can hold (64 MB) and than glibc maps by itself (32 MB).
PROGRAM = """
import resource, threading
from common import allocator

allocator.keep_freed_memory()

def use():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytes(bytearray(96 * 2**20))  # two blocks, of which the second is written by who asks for it
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=use)
thread.start()
thread.join()
"""


def faults(tunables):
    """Pages that had to be fetched from the system in each of three rounds."""
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    return [
        int(line)
        for line in subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's")
def test_large_blocks_stay_with_the_process():
    kept = faults("")
    assert kept[2] < 100, kept
    # What the user says with glibc's own variable holds.
    given_back = faults("glibc.malloc.mmap_max=65536:glibc.malloc.trim_threshold=131072")
    assert given_back[2] > 10_000, given_back


@pytest.mark.parametrize(("platforms", "only"), [("cpu", True), ("tpu,cpu", False), ("cuda", False)])
def test_only_where_there_is_no_accelerator(platforms, only):
    assert allocator.only_cpu(platforms) == only
