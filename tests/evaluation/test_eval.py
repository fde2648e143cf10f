"""The command line of eval.py: what it asks of the rooms, and what it refuses at the door."""

import pytest

import eval as entry
from common.errors import UserError
from evaluation import diagnosing, sampling
from evaluation.loading import load

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """The tests have prepared JAX in their own way."""
    monkeypatch.setattr(entry.command, "start", lambda distributed: None)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--lengths=32", "16"], "unrecognized arguments: 16"),
        (["--sample=king", "and", "queen"], "unrecognized arguments: and queen"),
        (["--temp=1"], "unrecognized arguments: --temp=1"),
        (["--lengths=0,x"], "--lengths: takes whole numbers of at least 1"),
        (["--lengths="], "--lengths: takes whole numbers of at least 1"),
        (["--split=tst"], "--split='tst' is unknown; did you mean 'test'"),
        (["--batches=-1"], "--batches must be at least 0"),
        (["--batches=x"], "--batches: invalid int value: 'x'"),
        (["--sample=a", "--temperature=nan"], "--temperature must be"),
        (["--sample=a", "--temperature=-1"], "--temperature must be"),
        (["--sample=a", "--top_p=0"], "--top_p must be"),
        (["--sample=a", "--top_k=-1"], "--top_k must be"),
        (["--sample=a", "--length=0"], "--length must be"),
        (["--sample=a", "--seed=-1"], "--seed must be"),
        (["--sample=a", f"--seed={2**32}"], "--seed must be"),
        (["--task=passky"], "there is no task 'passky'; did you mean 'passkey'"),
        (["--task=passkey", "--set", "task.deep=1"], "no hyperparameter 'deep'; did you mean 'depth'"),
        (["--task=passkey", "--set", "task.depth=0.1", "task.depth=0.5"], "--set task.depth is given twice"),
        (["--lengths=32", "--set", "task.length=16"], "--lengths and --set task.length say the same"),
        (["--output=grids"], "--output is where grids are written"),
        (["--lengths=32", "--lengths=16"], "--lengths: it is given twice"),
        (["--task=passkey", "--set", "task.depth=x"], "--set task.depth takes float, got 'x'"),
        (["--task=passkey", "--set", "depth=1"], "--set takes task.KEY=VALUE"),
        (["--task=passkey", "--set", "mqar.length=64"], "'mqar' is not asked; choose one of task, passkey"),
        (["--suite=recal"], "--suite='recal' is unknown; did you mean 'recall'"),
        (["--suite=recall", "--task=mqar"], "leave --task and --set out"),
        (["--stream", "--hf=b"], "--hf does not go with --stream"),
        (["--sample=a", "--hf=b"], "give --workdir=DIR, a run, or --hf=DIR"),
        (["--hf=b", "--checkpoint=4"], "--checkpoint does not go with --hf"),
        (["--sample=a", "--samples=0"], "--samples must be"),
        (["--sample=a", "--stop="], "--stop is empty"),
        (["--prompts=/nowhere/prompts.txt"], "--prompts=/nowhere/prompts.txt cannot be read"),
        (["--prompts=a", "--sample=b"], "--sample: not allowed with argument --prompts"),
        (["--sample=a", "--diagnose"], "--diagnose: not allowed with argument --sample"),
        (["--sample=a", "--split=test"], "--split does not go with --sample"),
        (["--top_p=0.5"], "--top_p does not go with scoring"),
        (["--diagnose", "--batches=1"], "--batches does not go with --diagnose"),
        (["--show_config", "--checkpoint=best"], "--checkpoint does not go with --show_config"),
    ],
)
def test_refused_before_anything_is_read(arguments, message):
    with pytest.raises(UserError, match=message):
        entry.main(["--workdir=/nowhere", *arguments])


def test_settings_of_the_own_task_are_read_before_the_checkpoint(copied, trained):
    workdir = copied()
    (workdir / "checkpoints").rename(workdir / "gone")
    for setting, message in (
        ("task.lenth=8", "no hyperparameter 'lenth'; did you mean 'length'"),
        ("task.length=x", "takes int"),
    ):
        with pytest.raises(UserError, match=message):
            entry.main([f"--workdir={workdir}", "--set", setting])
    with pytest.raises(UserError, match="has no checkpoint yet"):
        entry.main([f"--workdir={workdir}", "--set", "task.length=8"])
    with pytest.raises(UserError, match=r"--output is empty: give a directory$"):
        entry.main([f"--workdir={trained}", "--set", "task.length=8", "--output="])


def test_a_checkpoint_is_needed():
    for arguments in ([], ["--workdir=a", "--hf=b"]):
        with pytest.raises(UserError, match="give --workdir=DIR, a run, or --hf=DIR"):
            entry.main(arguments)
    with pytest.raises(UserError, match="no task of its own: give --task or --suite"):
        entry.main(["--hf=/nowhere"])
    with pytest.raises(UserError, match="--hf=/nowhere holds no config"):
        entry.main(["--hf=/nowhere", "--suite=language"])


def test_scoring(trained, capsys):
    entry.main([f"--workdir={trained}", "--split=valid", "--checkpoint=2", "--batches=1"])
    printed = capsys.readouterr().out
    assert "checkpoint of step 2" in printed and "valid, length 24, 8 of" in printed


def test_sampling(trained, monkeypatch, tmp_path):
    """What is not given has the defaults that the help names."""
    asked = []
    monkeypatch.setattr(sampling, "sample", lambda run, prompts, **settings: asked.append((prompts, settings)))
    entry.main([f"--workdir={trained}", "--sample=king and queen", "--top_p=0.9"])
    defaults = {"length": 400, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
    defaults |= {"samples": 1, "stop": [], "batch_size": 16}
    assert asked == [(["king and queen"], {**defaults, "top_p": 0.9})]
    (tmp_path / "prompts.txt").write_text("king\nqueen\n")
    entry.main([f"--workdir={trained}", f"--prompts={tmp_path}/prompts.txt", "--samples=3", "--stop=a", "--stop=b"])
    assert asked[1:] == [(["king", "queen"], {**defaults, "samples": 3, "stop": ["a", "b"]})]


def test_other_data(shorter, capsys):
    with pytest.raises(UserError, match="--allow_other_data"):
        entry.main([f"--workdir={shorter}"])
    entry.main([f"--workdir={shorter}", "--allow_other_data", "--batches=1"])
    assert "going on with it" in capsys.readouterr().out


def test_show_config(trained, capsys):
    entry.main([f"--workdir={trained}", "--show_config"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("--config.model.width=8 ") and "#" in line for line in lines)
    assert load(trained).config.model.width == 8


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        entry.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"at most {diagnosing.LONGEST}" in " ".join(printed.split())
    assert all(f"--{name}" in printed for name in {**entry.LOADING, **entry.SCORING, **entry.SAMPLING})
