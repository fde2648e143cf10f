"""Pairs of papers from made-up files of the released form."""

import os

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.classification_rows import check
from tests.data.small_data import PAIRS, write_pairs


@pytest.fixture
def folder(tmp_path):
    """An archive whose splits hold 4, 3 and 2 of the pairs; one file has no newline at its end."""
    write_pairs(tmp_path)
    return tmp_path


def create(folder, **options):
    return task.create("retrieval", data_dir=str(folder), cache_dir=str(folder / "cache"), **options)


@pytest.mark.parametrize("length", [8, 64])
def test_bytes(folder, length):
    pairs = create(folder, length=length)
    assert pairs.name == "retrieval/lra" and pairs.spec.vocab_size == 257
    assert [pairs.num_examples(split) for split in pairs.splits] == [4, 3, 2]
    for split in pairs.splits:
        for i in range(pairs.num_examples(split)):
            check(pairs, split, i)
            row = pairs.row(split, i, 0, 0)
            assert row["targets"] == float(PAIRS[i][0])
            for side in (0, 1):
                ids = [byte + 1 for byte in PAIRS[i][3 + side].encode()[:length]]
                assert row["inputs"][side].tolist() == ids + [0] * (length - len(ids))
                assert row["segment_ids"][side].sum() == len(ids)


def test_characters(folder):
    pairs = create(folder, protocol="s4", length=12)
    assert pairs.spec.vocab_size == 98
    for i in range(4):
        check(pairs, "train", i)
        row = pairs.row("train", i, 0, 0)
        for side in (0, 1):
            text = PAIRS[i][3 + side].encode()[:11]
            ids = [byte - 32 + 3 if 32 <= byte < 127 else 1 for byte in text] + [2]
            assert row["inputs"][side].tolist() == ids + [0] * (12 - len(ids))
    assert pairs.decode(pairs.encode("a ~z!")) == "a ~z!"


def test_the_index_is_made_once_and_again_for_another_file(folder, monkeypatch):
    monkeypatch.setattr("data.tasks.retrieval._BLOCK", 7)
    first = create(folder)
    made = sorted((folder / "cache" / "retrieval").iterdir())
    assert len(made) == 3
    assert create(folder).fingerprint() == first.fingerprint()
    assert sorted((folder / "cache" / "retrieval").iterdir()) == made
    path = folder / "lra_release" / "tsv_data" / "new_aan_pairs.test.tsv"
    path.write_bytes(path.read_bytes().replace(b"parser", b"tagger"))
    os.utime(path, ns=(1, 1))
    assert create(folder).fingerprint() != first.fingerprint()
    np.testing.assert_array_equal(
        create(folder).row("test", 0, 0, 0)["inputs"][1, :8], [98, 33, *[b + 1 for b in b"tagger"]]
    )


def test_floors(folder):
    pairs = create(folder)
    assert pairs.floors("valid") == {"majority": pytest.approx(1 / 3)}
    assert pairs.floors("test") == {"majority": 0.5}


def test_missing_and_corrupt_files(folder):
    with pytest.raises(ValueError, match=r"retrieval needs data_dir, the folder lra_release of https://"):
        task.create("retrieval")
    path = folder / "lra_release" / "tsv_data" / "new_aan_pairs.test.tsv"
    path.write_text("1.0\ta\tb\tone text\n")
    with pytest.raises(ValueError, match=r"test.tsv, line 1: 4 fields"):
        create(folder).row("test", 0, 0, 0)
    path.write_text("1.0\ta\tb\tc\td\nrelated\ta\tb\tc\td\n")
    with pytest.raises(ValueError, match=r"test.tsv, line 2: it begins with b'related'"):
        create(folder)
    path.write_text("")
    with pytest.raises(ValueError, match=r"test.tsv is empty"):
        create(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"test.tsv is missing: fetch https://"):
        create(folder)
