"""Text from a checkpoint: what is drawn, what is kept, and what cannot be."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from common.errors import UserError
from evaluation import sampling
from evaluation.loading import load

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """The run with a `samples/` of its own."""
    folder = tmp_path_factory.mktemp("sampling") / "run"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return load(workdir, "latest")


@pytest.fixture
def drawn(monkeypatch):
    """Settings in place of what a model would say, so that nothing is compiled."""

    def generate(call, initial_carry, params, prompt, length, **settings):
        text = f"{length} {settings}"
        return np.frombuffer(text.encode(), np.uint8)[None], {"prefill_seconds": 0.0, "tokens_per_second": 0.0}

    monkeypatch.setattr(sampling, "generate", generate)


def test_samples_are_reproducible(loaded):
    first, again, other = (sampling.sample(loaded, "the quick", 20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.startswith("the quick")


def test_samples_are_kept_apart(loaded, workdir, drawn):
    """The same settings have the same text and the same file; any other setting has a file of its own."""
    files = lambda: {path.name: path.read_text() for path in (workdir / "samples").glob("*.txt")}
    before = len(files())
    first = sampling.sample(loaded, "the quick", 12)
    assert first in files().values() and len(files()) == before + 1
    assert sampling.sample(loaded, "the quick", 12, temperature=1) == first and len(files()) == before + 1
    others = [
        sampling.sample(loaded, "the quick", 12, seed=1),
        sampling.sample(loaded, "the quick", 12, temperature=0.5),
        sampling.sample(loaded, "the quick", 12, top_k=3),
        sampling.sample(loaded, "the quick", 12, top_p=0.5),
        sampling.sample(loaded, "the quick", 13),
        sampling.sample(loaded, "the lazy", 12),
    ]
    assert len(files()) == before + 7 and {first, *others} <= set(files().values())
    (path,) = [path for path in (workdir / "samples").glob("*.txt") if path.read_text() == others[-1]]
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.name.startswith("step4-seed0-")
    assert record == {
        **loaded.origin,
        "prompt": "the lazy",
        "length": 12,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
    }


def test_the_likeliest_token(loaded):
    """What the carry gives step by step is the likeliest token from the whole sequence at once."""
    greedy = sampling.sample(loaded, "the quick", 5, temperature=0.0)
    ids = loaded.config.task.encode(greedy)
    logits, _ = jax.jit(loaded.built.apply)(loaded.params, ids[None, :-1])
    assert (np.argmax(logits[0], -1)[-5:] == ids[-5:]).all()


def test_other_data_is_recorded(shorter, drawn):
    run = load(shorter, "latest", allow_other_data=True)
    sampling.sample(run, "the", 3)
    (record,) = [json.loads(path.read_text()) for path in (shorter / "samples").glob("*.json")]
    assert record["data_of_the_run"] == run.other_data and record["data"] == run.data


def test_a_text_that_cannot_be_kept(copied, capsys, drawn):
    """It is printed, and then why it is not kept."""
    workdir = copied()
    (workdir / "samples").write_text("a file where the folder should be")
    text = sampling.sample(load(workdir, "latest"), "the", 3)
    printed = capsys.readouterr().out
    assert text in printed
    assert printed.splitlines()[-1].startswith(f"not kept: cannot write to {workdir / 'samples'}: ")


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"length": 0}, "--length must be"),
        ({"temperature": float("nan")}, "--temperature must be"),
        ({"temperature": -1.0}, "--temperature must be"),
        ({"temperature": 1e-40}, "--temperature must be 0"),
        ({"top_k": -1}, "--top_k must be"),
        ({"top_p": 0.0}, "--top_p must be"),
        ({"top_p": float("nan")}, "--top_p must be"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295"),
        ({"seed": 2**32}, "--seed must be from 0 to 4294967295"),
    ],
)
def test_settings_out_of_range(loaded, settings, message):
    with pytest.raises(UserError, match=message):
        sampling.sample(loaded, "the", **{"length": 3} | settings)


def test_prompts_that_cannot_be_continued(loaded):
    with pytest.raises(UserError, match="the prompt is empty"):
        sampling.sample(loaded, "", 3)
    with pytest.raises(UserError, match="not valid UTF-8"):
        sampling.sample(loaded, "the \udcff", 3)
    two_sided = dataclasses.replace(loaded.config.model, causal=False)
    encoder = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=two_sided))
    with pytest.raises(UserError, match="trains no model that continues a text"):
        sampling.sample(encoder, "the", 3)
