"""IMDB reviews from a made-up archive and from a mocked TFDS data set."""

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.classification_rows import check
from tests.data.small_data import REVIEWS, write_reviews

TRAIN, TEST = REVIEWS["train"], REVIEWS["test"]


@pytest.fixture
def archive(tmp_path):
    """A folder with an aclImdb of 4 training and 3 test reviews."""
    write_reviews(tmp_path)
    return str(tmp_path)


def test_bytes_of_the_archive(archive):
    text = task.create("text", data_dir=archive, length=12)
    assert text.name == "text/lra" and text.spec.vocab_size == 257
    assert [text.num_examples(split) for split in text.splits] == [4, 3, 3]
    for split, reviews in (("train", TRAIN), ("valid", TEST), ("test", TEST)):
        expected = [(t, label) for label, kind in enumerate(("neg", "pos")) for t in reviews[kind]]
        for i, (review, label) in enumerate(expected):
            check(text, split, i)
            row = text.row(split, i, 0, 0)
            ids = [byte + 1 for byte in review.encode()[:12]]
            assert row["inputs"].tolist() == ids + [0] * (12 - len(ids)) and row["targets"] == label
            assert row["segment_ids"].sum() == len(ids)
            assert text.decode(row["inputs"]) == review.encode()[:12].decode(errors="replace")


def test_characters_of_the_archive(archive, monkeypatch):
    monkeypatch.setattr("data.tasks.text.MIN_COUNT", 2)
    text = task.create("text", protocol="s4", data_dir=archive, length=12)
    everything = "".join(t for texts in TRAIN.values() for t in texts)
    kept = sorted({c for c in everything if everything.count(c) >= 2}, key=lambda c: (-everything.count(c), c))
    assert text.spec.vocab_size == 3 + len(kept) and "\u00e9" not in kept
    for i, review in enumerate(TRAIN["neg"] + TRAIN["pos"]):
        check(text, "train", i)
        row = text.row("train", i, 0, 0)
        ids = [3 + kept.index(c) if c in kept else 1 for c in review[:11]] + [2]
        assert row["inputs"].tolist() == ids + [0] * (12 - len(ids))
    assert text.decode(text.encode("a \u00e9 film")) == "a \ufffd film"
    # The ids do not depend on the length, so that a model can be evaluated at another.
    longer = task.create("text", protocol="s4", data_dir=archive, length=99)
    np.testing.assert_array_equal(longer.encode(everything), text.encode(everything))


def test_floors_by_hand(archive):
    text = task.create("text", data_dir=archive, length=8)
    totals = np.ones((2, 257))
    for label, kind in enumerate(("neg", "pos")):
        for review in TRAIN[kind]:
            for byte in review.encode()[:8]:
                totals[label, byte + 1] += 1
    right = []
    for label, kind in enumerate(("neg", "pos")):
        for review in TEST[kind]:
            score = [sum(np.log(totals[c, b + 1] / totals[c].sum()) for b in review.encode()[:8]) for c in (0, 1)]
            right.append(np.argmax(score) == label)
    floors = text.floors("test")
    assert floors["byte naive Bayes"] == pytest.approx(np.mean(right))
    assert floors["majority"] == pytest.approx(1 / 3)


def test_tfds_is_read_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=40):
        for protocol in ("lra", "s4"):
            text = task.create("text", protocol=protocol, data_dir=str(tmp_path), length=32)
            assert [text.num_examples(split) for split in text.splits] == [40, 40, 40]
            for split in text.splits:
                check(text, split, 7)
            assert len(text.fingerprint()) == 64


def test_missing_data(archive, tmp_path):
    with pytest.raises(UserError, match=r"TFDS 'imdb_reviews' has no prepared split .*Or unpack https://ai.stanford"):
        task.create("text", data_dir=str(tmp_path / "nothing"))
    (tmp_path / "aclImdb" / "train" / "pos" / "0_7.txt").unlink()
    (tmp_path / "aclImdb" / "train" / "pos" / "1_7.txt").unlink()
    with pytest.raises(UserError, match=r"train/pos holds no reviews .*: unpack https://ai.stanford"):
        task.create("text", data_dir=archive)
