"""Scores of a checkpoint at several lengths, and the floors beside them."""

import json
import re
from types import SimpleNamespace

import pytest

from common.errors import UserError
from data import task as tasks
from evaluation import scoring
from evaluation.answers import Answers
from evaluation.loading import load
from tests.data.small_data import write_passages

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run


def floors(printed: str) -> list[list[str]]:
    """The lines of each table of floors, its heading first."""
    blocks = [block.splitlines() for block in printed.split("\n\n")]
    return [block for block in blocks if any("<--" in line for line in block)]


def test_what_is_generated_contains_the_value(run, tmp_path):
    """Values out of, and beside, what the model says when it is asked byte by byte."""
    texts = ["the quick", "seven wizards jumps over", "q"]
    answers = Answers(run, max_length=96)
    said = answers.generate_until(
        [SimpleNamespace(args=(text, {"until": ["\n"], "max_gen_toks": 48, "do_sample": False})) for text in texts]
    )
    wanted = [re.findall(r"\S\S+", said[0])[0][:6].upper(), "~~", re.findall(r"\S\S+", said[2])[-1][-4:]]
    lines = [json.dumps({"text": text, "value": value}) for text, value in zip(texts, wanted)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    task = tasks.create("completion", data_dir=str(tmp_path), length=48)
    found = scoring.score_task(run, task)
    assert found.result["contains"] == pytest.approx(2 / 3) and found.result["row_accuracy"] <= 2 / 3
    low, high = found.intervals["contains"]
    assert low < 2 / 3 < high


def test_lengths_and_floors(run, trained, capsys):
    """The scores at the length of training are the loop's; floors stand beside each length, from the rows of that length."""
    (length, at_training), (other, _) = scoring.score(run, "valid", [24, 48])
    assert (length, other) == (24, 48)
    first, second = floors(capsys.readouterr().out)
    assert first[0].endswith("length 24") and second[0].endswith("length 48")
    assert any("5-gram" in line for line in first) and any("uniform" in line for line in second)
    # All bytes after the first are scored at every length, so these floors are the same.
    assert [line for line in first[1:] if "<--" not in line] == [line for line in second[1:] if "<--" not in line]
    assert at_training["tokens"] == run.config.task.text_sizes("valid")["tokens"]


def test_a_part_of_a_split(run, trained, capsys):
    """It has the scores of the training's own evaluation, and no floors of rows that are not scored."""
    ((_, found),) = scoring.score(run, "valid", batches=2)
    printed = capsys.readouterr().out
    assert "16 of" in printed and "without floors" in printed and not floors(printed)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (recorded,) = [line for line in lines if line["split"] == "valid" and line["step"] == 4]
    assert found["bits_per_byte"] == pytest.approx(recorded["bits_per_byte"], rel=1e-5)
    scoring.score(run, "valid", batches=10**6)
    assert len(floors(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("options", [{"carry": True}, {"loss_chunks": 4}])
def test_how_a_run_was_trained_is_nothing_to_other_tasks(run, copied, tmp_path, options):
    """Rows that stand alone, a metric of whole rows, and rows of fewer positions than the loss has chunks."""
    other = load(copied(train=options), "latest")
    write_passages(tmp_path)
    short = tasks.create("language_model", **run.config.task.hyperparameters | {"length": 2})
    for task in (tasks.create("lambada", data_dir=str(tmp_path), length=24), short):
        assert scoring.score_task(other, task, "test", 1).result == scoring.score_task(run, task, "test", 1).result


def test_scores_that_need_the_whole_split(run, monkeypatch):
    """Words and bytes are counted of a whole split, so a part of it has no score per word."""
    sizes = {"tokens": 100, "bytes": 300, "words": 50}
    monkeypatch.setattr(type(run.config.task), "text_sizes", lambda task, split: sizes)
    ((_, whole),) = scoring.score(run, "test")
    ((_, part),) = scoring.score(run, "test", batches=1)
    assert "word_perplexity" in whole and "word_perplexity" not in part


def test_what_is_not_there(run):
    with pytest.raises(UserError, match="--split='tst' is unknown; did you mean 'test'"):
        scoring.score(run, "tst")
