"""LAMBADA's rows beside its passages."""

import json

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.small_data import write_passages


def test_the_last_word_is_asked_for(tmp_path):
    write_passages(tmp_path)
    lambada = task.create("lambada", data_dir=str(tmp_path), length=20)
    texts = [json.loads(line)["text"] for line in (tmp_path / "passages.jsonl").read_text().splitlines()]
    for split in lambada.splits:
        assert lambada.num_examples(split) == 5
        for i, text in enumerate(texts):
            row = lambada.row(split, i, 0, 0)
            size = int(row["segment_ids"].sum())
            word = " " + text.split()[-1]
            assert lambada.decode(row["inputs"][:size]) == text[-size - 1 : -1] and size == min(20, len(text) - 1)
            (places,) = np.nonzero(row["weights"])
            assert places.tolist() == list(range(size - len(word), size))
            assert lambada.decode(row["targets"][places]) == word
    assert lambada.text_sizes("test") == {"tokens": 17, "bytes": 17}
    # "saw" is said once before the last word, as every word is but the one that is asked for.
    assert lambada.floors() == {
        "commonest last word": 0.0,
        "commonest of the passage": 0.0,
        "commonest name of the passage": 0.0,
    }
    assert lambada.spec.metric.name == "row_accuracy" and lambada.spec.padded
    (perplexity,) = (metric for metric in lambada.spec.metrics if metric.name == "word_perplexity")
    assert perplexity.value({"nats": np.log(8) * 5, "rows": 5, "weight": 17}) == pytest.approx(8)


def test_names(tmp_path):
    """Commas belong to no word, and what begins a sentence is a name only if no passage has it without a capital."""
    texts = ["The cat met Ann, and the dog met Ann", "The end, the end of Bob. The Bob", "a rose is a rose"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    floors = task.create("lambada", data_dir=str(tmp_path), length=20).floors()
    assert floors["commonest name of the passage"] == pytest.approx(2 / 3)


def test_the_commonest_word_is_that_of_the_other_passages(tmp_path):
    last = "b a b c b a d b".split()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"x {word}"}) + "\n" for word in last))
    right = 0
    for i, word in enumerate(last):
        others = last[:i] + last[i + 1 :]
        right += word == min(others, key=lambda one: (-others.count(one), one))
    assert task.create("lambada", data_dir=str(tmp_path), length=20).floors()["commonest last word"] == right / 8 == 0.5


def test_what_is_no_passage(tmp_path):
    write_passages(tmp_path)
    with pytest.raises(UserError, match="length=2 is less than the 4 tokens of a word"):
        task.create("lambada", data_dir=str(tmp_path), length=2)
    with pytest.raises(UserError, match="tokenizer='bpe:300' is made from a corpus: give 'byte', or 'file:PATH'"):
        task.create("lambada", data_dir=str(tmp_path), tokenizer="bpe:300")
    for line, message in (
        ("{}", "is no JSON object"),
        ('{"text": "a \\ud83d b"}', "is no JSON object"),
        ('{"text": "word"}', "has one word only"),
    ):
        (tmp_path / "passages.jsonl").write_text(line)
        with pytest.raises(UserError, match=f"line 1, {message}"):
            task.create("lambada", data_dir=str(tmp_path))
