"""Completions beside the texts of their file."""

import json

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.generated_rows import digest
from tests.data.small_data import write_completions

LONG = "nothing here. " * 20 + "The colour is ultramarine. " + "nothing here. " * 20 + "\nColour:"


def test_the_value_is_asked_for(tmp_path):
    write_completions(tmp_path)
    made = task.create("completion", data_dir=str(tmp_path), length=64)
    assert digest(made) == "4573a6ad1ea508b1"
    records = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert made.spec.metric.name == "contains" and made.new_tokens == 48 and made.spec.padded
    for split in made.splits:
        assert made.num_examples(split) == 3
        for i, record in enumerate(records):
            row, text, value = made.row(split, i, 0, 0), record["text"].strip(), f" {record['value']}"
            size, (places,) = int(row["segment_ids"].sum()), np.nonzero(row["weights"])
            assert made.decode(row["targets"][places]) == value and places[-1] == size - 1
            assert made.decode(row["inputs"][:size]) == (text + value)[:-1]
            prompt, wanted = made.completion(split, i)
            assert made.decode(prompt) == text and wanted == record["value"]
    # No value is that of another text, and none ends on a line that another has.
    assert made.floors() == {
        "commonest value": 0.0,
        "commonest of the last line": 0.0,
        "end of the text": pytest.approx(1.0),
        "beginning of the text": pytest.approx(1.0),
    }


def test_floors_know_the_other_rows_only(tmp_path):
    """Beside a count over all other rows; the last one ends on a line of its own, and gets the commonest of all."""
    values = ["Alien", "Alien", "ali", "Up", "Up", "Up", "Tot", "Alien"]
    cues = ["F:", "F:", "F:", "F:", "G:", "G:", "G:", "H:"]
    rows = [{"text": f"{i}\n{cue}", "value": value} for i, (cue, value) in enumerate(zip(cues, values))]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = np.zeros(2)
    for i, (cue, value) in enumerate(zip(cues, values)):
        others = [values[j] for j in range(8) if j != i]
        alike = [values[j] for j in range(8) if j != i and cues[j] == cue] or others
        for which, known in enumerate((others, alike)):
            right[which] += value.lower() in min(known, key=lambda one: (-known.count(one), one)).lower()
    floors = task.create("completion", data_dir=str(tmp_path), length=64).floors()
    assert [floors["commonest value"], floors["commonest of the last line"]] == (right / 8).tolist()
    assert 0 < right[0] < right[1] < 8


@pytest.mark.parametrize("length", [60, 100, 300])
def test_long_texts_keep_the_place_of_the_value(tmp_path, length):
    """In the middle of what is kept, beside the last line."""
    lines = [
        {"text": LONG, "value": "Ultramarine"},
        {"text": LONG.replace("ultramarine", "so"), "value": "Ultramarine"},
    ]
    lines.append({"text": LONG.replace("\n", " "), "value": "ultramarine"})
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = task.create("completion", data_dir=str(tmp_path), length=length)
    for i, (line, there) in enumerate(zip(lines, (True, False, True))):
        prompt = made.decode(made.completion("test", i)[0])
        assert len(prompt) + len(line["value"]) == length and prompt.endswith("Colour:")
        assert ("ultramarine" in prompt) == there
        row = made.row("test", i, 0, 0)
        assert row["segment_ids"].all() and row["weights"].sum() == len(line["value"]) + 1
    if length == 300:
        prompt = made.decode(made.completion("test", 0)[0])
        assert abs(prompt.index("ultramarine") - (length - 20) / 2) < 10


def test_what_is_no_completion(tmp_path):
    with pytest.raises(UserError, match=r"holds 0 \.jsonl files"):
        task.create("completion", data_dir=str(tmp_path))
    for line, message in (
        ("{}", 'line 1, is no JSON object with "text" and "value"'),
        ('{"text": "a", "value": "b \\ud83d"}', "line 1, is no JSON object"),
        ('{"text": " ", "value": "a"}', "has no text"),
        ('{"text": "a", "value": "b"}', "holds no text with a value"),
        (json.dumps({"text": "a", "value": "b" * 40}), "length=64 is less than four times the 41 tokens"),
    ):
        (tmp_path / "texts.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            task.create("completion", data_dir=str(tmp_path), length=64)
