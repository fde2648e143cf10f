"""Flat files against arrays in memory, and the memory that they take."""

import concurrent.futures
import os
import time

import numpy as np
import pytest

from common import files
from common.errors import UserError
from data import corpora, flat


def write(folder, documents, split="train"):
    writer = flat.Writer(folder, split)
    for document in documents:
        writer.write(document)
        writer.end()
    writer.close()


def test_documents_over_many_shards_are_read_at_any_place(tmp_path, monkeypatch):
    monkeypatch.setattr(flat, "SHARD_BYTES", 7)
    monkeypatch.setattr(flat, "MAPPED", 1)  # memory is given back after every read
    rng = np.random.default_rng(0)
    documents = [rng.bytes(size) for size in (0, 1, 30, 7, 0, 2, 14)]
    for split in flat.SPLITS:
        write(tmp_path, documents, split)
    stream, whole = flat.mapped(tmp_path)["test"], np.frombuffer(b"".join(documents), np.uint8)
    assert len(list(tmp_path.glob("test*"))) == 8 + 1
    assert len(stream.data) == 54 and stream.data.tobytes() == whole.tobytes()
    assert stream.ends.tolist() == [1, 31, 38, 40, 54]
    for start in range(55):
        for stop in range(55):
            np.testing.assert_array_equal(stream.data[start:stop], whole[start:stop])
    assert [stream.data[i] for i in range(-54, 54)] == [whole[i] for i in range(-54, 54)]
    kept = stream.data[3:5]  # of one shard: no copy
    before = kept.tolist()
    stream.data[10:50]
    assert kept.tolist() == before


@pytest.mark.parametrize("block", [2, 5, 2**24])
def test_a_text_is_cut_as_one_in_memory(tmp_path, monkeypatch, block):
    """Byte for byte and document for document, so that fingerprints stay; whatever the pieces in which it is read."""
    rng, sizes = np.random.default_rng(1), [90, 1, 40, 2, 33, 5, 5, 8, 13]
    documents = [rng.integers(1, 256, size).astype(np.uint8).tobytes() for size in sizes]
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "texts" / str(i)).write_bytes(document)
    monkeypatch.setattr(corpora.local_text, "BLOCK", block)
    monkeypatch.setattr(flat, "BLOCK", block)
    found = corpora.load(f"file:{tmp_path / 'texts'}", str(tmp_path / "cache"))
    expected = corpora._cut("", documents)
    assert found.fingerprint == expected.fingerprint
    for split in flat.SPLITS:
        assert found.splits[split].data.tobytes() == expected.splits[split].data.tobytes()
        assert found.splits[split].ends.tolist() == expected.splits[split].ends.tolist()


def resident(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))


def test_memory_does_not_grow_with_what_is_read(tmp_path, monkeypatch):
    """A file of 96 MB is read whole and at random, and 16 MB of it at most stay in memory."""
    monkeypatch.setattr(flat, "MAPPED", 2**22)
    monkeypatch.setattr(flat, "BLOCK", 2**20)
    size = 96 * 2**20
    with open(tmp_path / "big", "wb") as file:
        for _ in range(96):
            file.write(os.urandom(2**20))
    data = flat.Mapped([(tmp_path / "big", 0, size)], "u1")
    before, most = resident("VmRSS"), 0
    for block in flat.blocks(data):
        assert block.max() == 255
        most = max(most, resident("VmRSS"))
    for start in np.random.default_rng(0).integers(size - 2048, size=3000).tolist():
        data[start : start + 2048].sum()
    most = max(most, resident("VmRSS"))
    assert most - before < 2**24


def make(folder, log):
    def fill(made):
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        (made / "file").write_text("whole")

    files.make_folder(folder, fill)
    assert (folder / "file").read_text() == "whole"


def test_one_of_many_makes_a_folder_while_others_wait(tmp_path):
    (tmp_path / "in").mkdir()
    left = tmp_path / "in" / ".folder.x.part"  # of a process that was killed
    left.mkdir()
    (left / "half").write_text("half")
    # The lock is of an open file, so that threads stand for processes.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(make, tmp_path / "in" / "folder", tmp_path / "log") for _ in range(4)]:
            one.result()
    assert (tmp_path / "log").read_text() == "made\n"
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["folder"]


def test_a_file_whose_time_was_set_back_is_another(tmp_path):
    """As by tar, rsync and cp -p: the same size and time, and other bytes."""
    path, cache = tmp_path / "text.txt", str(tmp_path / "cache")
    path.write_text("to be or not to be. " * 200)
    stat, before = path.stat(), corpora.load(f"file:{path}", cache)
    path.write_text("to see or not to see" * 200)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = corpora.load(f"file:{path}", cache)
    assert after.fingerprint != before.fingerprint and b"see" in after.splits["train"].data.tobytes()


@pytest.mark.parametrize("name, content", [("train", b"to be"), ("facts.json", b"{"), ("valid", None)])
def test_a_damaged_folder_of_the_cache_is_not_read(tmp_path, name, content):
    """It would be other data with the fingerprint of what it was made from."""
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be. " * 200)
    corpora.load(f"file:{path}", str(tmp_path / "cache"))
    (damaged,) = (tmp_path / "cache").rglob(name)
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with pytest.raises(
        UserError, match=f"{damaged.parent}, which is kept between runs, is damaged: delete it and run again"
    ):
        corpora.load(f"file:{path}", str(tmp_path / "cache"))


def test_a_cache_that_is_a_file_says_what_to_do(tmp_path):
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written \(.*\): .*MIXOLOGY_CACHE"):
        files.make_folder(tmp_path / "cache" / "a" / "b", None)


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "cache"))

    monkeypatch.setattr(files.pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\): .*MIXOLOGY_CACHE"):
        files.make_folder(tmp_path / "cache" / "a" / "b", None)
    with pytest.raises(UserError, match=r"GB left and .* GB are to be written there"):
        flat.check_room(tmp_path, 2**70)
