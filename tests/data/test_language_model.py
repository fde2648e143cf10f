"""Rows of the byte-level language modelling task against the text they are cut from."""

import hashlib

import numpy as np
import pytest

from common.errors import UserError
from data import task
from data.loader import Loader
from tests.data.small_data import pseudo_text

KEYS = ("inputs", "positions", "segment_ids", "targets", "weights")
DTYPES = {
    "inputs": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}


@pytest.fixture
def text_task(tmp_path):
    """A task over one file of 3000 bytes."""
    (tmp_path / "text.txt").write_bytes(pseudo_text(3000))
    return lambda **kwargs: task.create(
        "language_model", corpus=f"file:{tmp_path / 'text.txt'}", cache_dir=str(tmp_path / ".cache"), **kwargs
    )


@pytest.fixture
def document_task(tmp_path):
    """A task over a folder of documents of very different sizes, one of them empty."""
    text, start = pseudo_text(4000), 0
    for i, size in enumerate([700, 1, 1, 90, 0, 3, 1200, 17, 16, 15, 400, 2, 1, 30, 5, 40, 7, 60, 20, 2, 1, 80, 9, 33]):
        (tmp_path / f"{i:02}.txt").write_bytes(text[start : start + size])
        start += size
    return lambda **kwargs: task.create(
        "language_model", corpus=f"file:{tmp_path}", cache_dir=str(tmp_path / ".cache"), packing="documents", **kwargs
    )


def documents_of(lm, split):
    """Per byte of the split, the number of its document, by a plain loop."""
    stream, number, result = lm.corpus.splits[split], 0, []
    for i in range(len(stream.data)):
        number += i in stream.ends.tolist()
        result.append(number)
    return result


@pytest.mark.parametrize("length", [7, 16, 150, 149, 500])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_scores_every_byte_once_in_order(text_task, length, split):
    lm = text_task(length=length)
    text = pseudo_text(3000)[2700:2850] if split == "valid" else pseudo_text(3000)[2850:]
    rows = [lm.example(split, i) for i in range(lm.num_examples(split))]
    scored = np.concatenate([row["targets"][row["weights"] == 1] for row in rows])
    assert bytes(scored.astype(np.uint8)) == text[1:]
    read = np.concatenate([row["inputs"][row["weights"] == 1] for row in rows])
    assert bytes(read.astype(np.uint8)) == text[:-1]
    for row in rows:
        assert {key: value.dtype for key, value in row.items()} == DTYPES
        assert all(value.shape == (length,) for value in row.values())
        np.testing.assert_array_equal(row["segment_ids"], row["weights"])
        np.testing.assert_array_equal(row["positions"], np.arange(length) * row["segment_ids"])
        assert row["weights"].any()
    with pytest.raises(IndexError, match=f"rows 0 to {len(rows) - 1}"):
        lm.example(split, len(rows))


def test_a_training_epoch_is_a_permutation_of_disjoint_windows(text_task):
    length, text = 16, pseudo_text(3000)[:2700]
    lm = text_task(length=length)
    rows = lm.num_examples("train")
    assert rows == 2700 // length - 1

    def starts(seed, epoch):
        found = []
        for i in range(epoch * rows, (epoch + 1) * rows):
            row = lm.example("train", i, seed)
            window = bytes(np.append(row["inputs"], row["targets"][-1]).astype(np.uint8))
            assert text.count(window) == 1
            np.testing.assert_array_equal(row["targets"][:-1], row["inputs"][1:])
            np.testing.assert_array_equal(row["weights"], np.ones(length))
            np.testing.assert_array_equal(row["segment_ids"], np.ones(length))
            np.testing.assert_array_equal(row["positions"], np.arange(length))
            found.append(text.index(window))
        return found

    epochs = [starts(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    offsets = [min(epoch) for epoch in epochs]
    assert len(set(offsets)) > 1 and max(offsets) < length
    for epoch, offset in zip(epochs, offsets, strict=True):
        assert sorted(epoch) == [offset + k * length for k in range(rows)]
    orders = {
        tuple((start - offset) // length for start in epoch) for epoch, offset in zip(epochs, offsets, strict=True)
    }
    assert len(orders) == len(epochs) and tuple(range(rows)) not in orders
    default = lm.example("train", 5)
    np.testing.assert_array_equal(default["inputs"], lm.example("train", 5, 0)["inputs"])


@pytest.mark.parametrize("length", [5, 16])
def test_packed_documents_are_cut_exactly(document_task, length):
    lm = document_task(length=length)
    for split in lm.splits:
        data, document = lm.corpus.splits[split].data, documents_of(lm, split)
        scored = []
        for i in range(min(lm.num_examples(split), 60)):
            row = lm.example(split, i)
            if split == "train":
                window = bytes(row["inputs"].astype(np.uint8))
                assert data.tobytes().count(window) == 1
                start = data.tobytes().index(window)
            else:
                start = i * length
            segment, position = 1, 0
            for t in range(length):
                at = start + t
                if at + 1 >= len(data):
                    assert [row[key][t] for key in KEYS] == [0, 0, 0, 0, 0]
                    continue
                if t and document[at] != document[at - 1]:
                    segment, position = segment + 1, 0
                inside = document[at] == document[at + 1]
                expected = [data[at], position, segment, data[at + 1] if inside else 0, float(inside)]
                assert [row[key][t] for key in KEYS] == expected
                position += 1
                scored += [at + 1] * inside
        if split != "train":
            assert scored == [at for at in range(1, len(data)) if document[at] == document[at - 1]]


def test_examples_are_the_same_for_ever(text_task, document_task):
    """The hash changes with the shuffle, the cutting or the packing: then resumed runs would see other data."""
    digest = hashlib.sha256()
    for lm in (text_task(length=16), document_task(length=16)):
        for split, index, seed in (("train", 0, 0), ("train", 1000003, 7), ("valid", 1, 0), ("test", 2, 0)):
            row = lm.example(split, index, seed)
            for key in KEYS:
                digest.update(key.encode() + row[key].astype("<f4").tobytes())
    assert digest.hexdigest() == "09289a54511120e17bf3e90e65f3e85ff0f9a5dca0767dc08e665ede05cecf3a"


def test_fingerprint_depends_on_the_rows(text_task, tmp_path):
    first = text_task(length=16).fingerprint()
    assert len({first, text_task(length=20).fingerprint(), text_task(length=16).fingerprint()}) == 2
    (tmp_path / "text.txt").write_bytes(pseudo_text(2999) + b"!")
    assert text_task(length=16).fingerprint() != first


def test_text_round_trip(text_task):
    lm = text_task(length=16)
    ids = lm.encode("Être, or not?")
    assert ids.dtype == np.int32 and lm.decode(ids) == "Être, or not?"
    assert lm.decode([104, 105, 255]) == "hi�"


def test_floors_of_a_text_with_a_period(tmp_path):
    """What repeats every 11 bytes with one of two letters at random costs one bit for each 11 bytes, and no less."""
    rng = np.random.default_rng(0)
    text = b"".join(b"abcdefghij" + (b"x", b"y")[rng.integers(2)] for _ in range(3000))
    (tmp_path / "text").write_bytes(text)
    lm = task.create("language_model", corpus=f"file:{tmp_path / 'text'}", length=16, cache_dir=str(tmp_path))
    for split in ("valid", "test"):
        floors = lm.floors(split)
        assert list(floors)[:2] == ["uniform", "5-gram"] and list(floors)[2].startswith("n-gram (order ")
        assert floors["uniform"] == 8 and len(floors) == 3
        assert all(abs(value - 1 / 11) < 0.02 for name, value in floors.items() if name != "uniform")
    with pytest.raises(ValueError, match="split='train'"):
        lm.floors("train")


def test_bad_input_says_what_to_change(text_task, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'documents'"):
        text_task(packing="document")
    long = text_task(length=2000)
    for asked in (long.fingerprint, lambda: long.num_examples("train"), lambda: Loader(long, "train", 1, 0)):
        with pytest.raises(ValueError, match=r"train split .* has 2700 bytes and length=2000 needs 4000"):
            asked()
    # What has no rows to be trained on can be scored.
    assert long.num_examples("test") == 1 and long.example("test", 0)["weights"].sum() == 149
    (tmp_path / "text.txt").write_bytes(b"x" * 23)
    with pytest.raises(ValueError, match=r"valid split .* has 1 bytes and length=16 needs 2"):
        text_task(length=16)
    (tmp_path / "text.txt").write_bytes(pseudo_text(3000))
    with pytest.raises(ValueError, match=r"length must be from 1 to .*, got 0"):
        text_task(length=0)
    lm = text_task(length=16)
    with pytest.raises(ValueError, match="did you mean 'valid'"):
        lm.example("validation", 0)
    with pytest.raises(IndexError):
        lm.example("train", -1)


def test_positions_are_reported_each(tmp_path):
    (tmp_path / "text.txt").write_bytes(pseudo_text(8000))
    create = lambda **options: task.create(
        "language_model", corpus=f"file:{tmp_path / 'text.txt'}", length=64, **options
    )
    names = [metric.name for metric in create(positions="5+50").spec.metrics]
    assert names == [*(metric.name for metric in create().spec.metrics), "bits_at_5", "bits_at_50", "in_context_score"]
    # One that is given twice is one, and has no score against itself.
    assert [m.name for m in create(positions="5+05").spec.metrics] == [*names[:-3], "bits_at_5"]
    assert [m.name for m in create(positions="5+5+50").spec.metrics] == names
    for wrong in (
        {"positions": "0"},
        {"positions": "5,50"},
        {"positions": "65"},
        {"positions": "5", "packing": "documents"},
    ):
        with pytest.raises(UserError, match="takes positions 1 to length=64 of a row"):
            create(**wrong)
