"""Texts for tests that train on one."""

from pathlib import Path

import numpy as np


def words(path: Path) -> Path:
    """Writes 3,000 words that are drawn from a few, and returns the path."""
    few = "the quick brown fox jumps over the lazy dog while seven wizards box".split()
    rng = np.random.default_rng(0)
    path.write_text(" ".join(few[i] for i in rng.integers(0, len(few), 3000)))
    return path
