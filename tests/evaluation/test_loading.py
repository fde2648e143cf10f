"""Which runs and checkpoints can be loaded, and what is said of the others."""

import json

import pytest

from common.errors import UserError
from configs import lm
from data import task
from evaluation.loading import configuration, load
from training import loop
from training.config import resolve

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run


def test_checkpoints_by_name_and_step(trained):
    assert load(trained, "latest").step == 4
    assert load(trained, "2").step == 2
    assert load(trained).step in (2, 4)


@pytest.mark.parametrize(
    "checkpoint,message",
    [
        ("bst", r"--checkpoint=bst is unknown, and no step \(there are 2, 4\); did you mean 'best'\?"),
        ("-2", r"no step \(there are 2, 4\)"),
        ("3", r"there is no checkpoint 3 in .*; there are \[2, 4\]"),
    ],
)
def test_checkpoints_that_are_not_there(trained, checkpoint, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        load(trained, checkpoint)


def test_paths(trained, monkeypatch):
    """`~` is the home directory, and an empty name is not the current directory."""
    monkeypatch.setenv("HOME", str(trained.parent))
    assert configuration("~/run").seed == 0
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match="--workdir is empty"):
        load("")


def test_a_run_that_cannot_be_used(copied, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        load(tmp_path)
    workdir = copied()
    for content, message in [
        ('{"task": ', "cannot be read as JSON"),
        ("[]", "config.json is damaged: it has no section task and no section model"),
        ('{"seed": 0, "task": 3, "train": {}}', "has no section task and no section model"),
        (
            '{"seed": 0, "task": {}, "model": {}, "optimizer": {}, "train": {}, "mesh": {}}',
            "config.task.name is missing",
        ),
    ]:
        (workdir / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load(workdir)


def test_a_run_without_checkpoints(copied):
    workdir = copied()
    (workdir / "checkpoints").rename(workdir / "gone")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(workdir)


def test_a_configuration_of_older_code(copied, trained):
    """What a configuration lacks has its default."""
    workdir = copied()
    raw = json.loads((workdir / "config.json").read_text())
    del raw["train"]["z_loss"], raw["model"]["dropout"]
    (workdir / "config.json").write_text(json.dumps(raw))
    assert load(workdir, "latest").config.raw == load(trained, "latest").config.raw


def test_a_configuration_of_another_model(copied):
    """Its parameters have the same shapes, and its numbers would be others."""
    workdir = copied()
    raw = json.loads((workdir / "config.json").read_text())
    raw["model"]["logit_scale"] = 2.0
    (workdir / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"than the checkpoint was trained with \(model\.logit_scale: 1\.0 -> 2\.0\)"):
        load(workdir)


def test_another_tokenizer_of_token_ids(text, tmp_path):
    """The ids are the same, and the text that they stand for is not: that is refused, or recorded beside what is made."""
    file = tmp_path / "tokenizer.json"
    made = task.create("language_model", corpus=f"file:{text}", length=8, tokenizer="bpe:270").tokenizer
    file.write_text(made.to_json())
    made.encode(text.read_text()).astype("<u2").tofile(tmp_path / "ids.bin")
    config = lm.get_config("mixer=min_gru")
    config.task.update({"corpus": f"bin:{tmp_path}/ids.bin", "length": 8, "tokenizer": f"file:{file}"})
    config.model.update({"width": 8, "depth": 1, "channel_mixer": "none"})
    config.train.update({"steps": 1, "batch_size": 8, "eval_batches": 1})
    config.optimizer.update({"name": "adamw", "warmup_steps": 0})
    loop.train(resolve(config), tmp_path / "run")
    run = load(tmp_path / "run")
    assert run.origin == {"step": 1, "data": run.data}
    changed = json.loads(file.read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"the tokenizer of .* is not the one that is here now .*--allow_other_data"):
        load(tmp_path / "run")
    other = load(tmp_path / "run", allow_other_data=True)
    here, trained = other.config.task.tokenizer.fingerprint, run.config.task.tokenizer.fingerprint
    assert other.origin == {**run.origin, "tokenizer_of_the_run": trained, "tokenizer": here} and here != trained


def test_other_data(shorter, trained, capsys):
    """It is refused, by its fingerprints and with the option to go on; going on is said and recorded."""
    own, here = load(trained).data, configuration(shorter).task.fingerprint()
    with pytest.raises(UserError, match=rf"{own[:12]}.*{here[:12]}.*--allow_other_data"):
        load(shorter)
    capsys.readouterr()
    run = load(shorter, allow_other_data=True)
    assert "going on with it" in capsys.readouterr().out
    assert run.origin == {"step": run.step, "data": here, "data_of_the_run": own}
    assert load(trained).origin == {"step": run.step, "data": own}
