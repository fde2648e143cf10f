"""What tests of sweeps have in common."""

import sys

import numpy as np
import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = "the quick brown fox jumps over the lazy dog".split()
    path.write_text(" ".join(words[i] for i in np.random.default_rng(0).integers(0, len(words), 600)))
    return path


@pytest.fixture
def no_plots(monkeypatch):
    """Plots are tested by themselves."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
