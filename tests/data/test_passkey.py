"""The passkey in a text: what the row says, where, and what is scored."""

import re

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest

# Every four bytes are a number of their own.
TEXT = "".join(f"{chr(97 + i // 676)}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}." for i in range(5000))


@pytest.fixture
def passkey(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return lambda **kwargs: task.create("passkey", corpus=f"file:{tmp_path / 'text.txt'}", **kwargs)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("length", [104, 256, 900])
def test_the_number_is_in_the_text_at_its_depth(passkey, depth, length):
    hidden, depths, keys = passkey(length=length, depth=depth), [], set()
    borders = {"train": (0, 18_000), "valid": (18_000, 19_000), "test": (19_000, 20_000)}
    for split, (begin, end) in borders.items():
        for i in range(30):
            row = hidden.example(split, i)
            text = hidden.decode(np.append(row["inputs"], row["targets"][-1]))
            assert len(text) == length + 1
            found = re.fullmatch(
                r"(?P<before>.*)\nThe pass key is (?P<key>\d{5})\. Remember it\. (?P=key) is the pass key\.\n"
                r"(?P<after>.*)\nWhat is the pass key\? The pass key is (?P=key)",
                text,
            )
            haystack = found["before"] + found["after"]
            assert haystack in TEXT[begin:end]
            if length > 104:
                depths.append(len(found["before"]) / len(haystack))
            keys.add(found["key"])
            answer = row["targets"][row["weights"] > 0]
            assert hidden.decode(answer) == found["key"] and row["weights"][-5:].sum() == 5
    assert len(keys) > 80
    if depths:
        assert np.ptp(depths) > 0.9 if depth is None else depths == pytest.approx([depth] * 90, abs=0.01)


@pytest.mark.parametrize("depth", [0.0, 0.5, None])
def test_the_original_in_grass(depth):
    """Nothing is read; the number has as many digits as it has."""
    hidden, sizes = task.create("passkey", filler="grass", length=700, depth=depth), set()
    assert hidden.name == "passkey/grass"
    for i in range(60):
        row = hidden.example("train", i)
        text = hidden.decode(np.append(row["inputs"], row["targets"][-1]))
        found = re.fullmatch(
            r"There is an important info hidden inside .* information there\.\n(?P<before>.*)\nThe pass key is (?P<key>\d+)\. "
            r"Remember it\. (?P=key) is the pass key\.\n(?P<after>.*)\nWhat is the pass key\? The pass key is (?P=key)",
            text,
        )
        assert 1 <= int(found["key"]) < 50_000
        grass = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 9
        assert grass.startswith(found["before"]) and grass.startswith(found["after"])
        assert hidden.decode(row["targets"][row["weights"] > 0]) == found["key"]
        sizes.add(len(found["key"]))
        if depth is not None:
            assert abs(len(found["before"]) - depth * len(found["before"] + found["after"])) <= 0.5
    assert len(sizes) > 1 and hidden.floors() == {"chance": 1 / 49_999}
    with pytest.raises(ValueError, match="filler='gras' is unknown; did you mean 'grass'"):
        task.create("passkey", filler="gras")


def test_rows(passkey):
    check_rows(passkey())
    assert digest(passkey()) == "90ebc78f2d4b952c"
    spec = passkey().spec
    lm = task.create("language_model", corpus=passkey().corpus.name).spec
    assert [getattr(spec, key) for key in ("vocab_size", "targets", "objective", "causal", "length")] == [
        getattr(lm, key) for key in ("vocab_size", "targets", "objective", "causal", "length")
    ]
    assert spec.metric.name == "row_accuracy" and passkey().floors() == {"chance": 1 / 90_000}


def test_fingerprint_is_of_the_whole_text(passkey, tmp_path):
    first = passkey().fingerprint()
    assert first == passkey().fingerprint() != passkey(depth=0.5).fingerprint()
    (tmp_path / "text.txt").write_text(TEXT[:-1] + "!")
    assert passkey().fingerprint() != first


def test_bad_settings(passkey):
    with pytest.raises(ValueError, match="length=103 must be at least 104"):
        passkey(length=103)
    with pytest.raises(ValueError, match=r"valid split .* has 1000 bytes and length=2000 needs"):
        passkey(length=2000)
    for depth in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"depth={depth} must be 0"):
            passkey(depth=depth)
