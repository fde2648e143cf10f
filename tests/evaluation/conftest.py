"""One tiny trained run for all tests of this folder, and copies of it to change."""

import json
import pathlib
import shutil

import pytest

from configs import lm, published
from evaluation.loading import load
from tests import texts
from training import loop
from training.config import resolve

STEPS = 4


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of 3,000 words."""
    return texts.words(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that has checkpoints of steps 2 and 4; tests leave its files as they are."""
    config = lm.get_config("mixer=min_gru")
    config.task.update({"corpus": f"file:{text}", "length": 24})
    config.model.update({"width": 8, "depth": 1, "channel_mixer": "none"})
    config.train.update({"steps": STEPS, "batch_size": 8, "eval_every": 2, "checkpoint_every": 2, "eval_batches": 2})
    config.optimizer.update({"name": "adamw", "warmup_steps": 0})
    config.expect = published.expect(8.0, 0.5, "arXiv 1234.56789, table 1", metric="bits_per_byte", seeds=3, hours=0.1)
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(resolve(config), workdir)
    return workdir


@pytest.fixture(scope="session")
def run(trained):
    """The run, loaded with its latest checkpoint."""
    return load(trained, "latest")


@pytest.fixture
def copied(trained, tmp_path):
    """Copies the run, with other values in sections of its configuration (None for a section takes it out)."""

    def copy(**sections) -> pathlib.Path:
        workdir = tmp_path / "copy"
        shutil.copytree(trained, workdir)
        raw = json.loads((workdir / "config.json").read_text())
        for name, values in sections.items():
            raw[name] = values if values is None else raw.get(name, {}) | values
        raw = {name: values for name, values in raw.items() if values is not None}
        (workdir / "config.json").write_text(json.dumps(raw))
        return workdir

    return copy


@pytest.fixture
def shorter(copied, text, tmp_path) -> pathlib.Path:
    """A copy of the run whose text has been cut to its first half."""
    cut = tmp_path / "cut.txt"
    cut.write_text(text.read_text()[:8000])
    return copied(task={"corpus": f"file:{cut}"})
