"""What holds for every task: hyperparameters that give it again from whatever directory, and a fingerprint of all its rows."""

import contextlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from common.errors import UserError
from common.files import KEPT, Folder
from data import corpora, task, tokenized
from data.loader import Loader, batch_shapes
from tests.data.small_data import NO_OUTLINE, create, options, pseudo_text, reads_files

MOST = 12  # files of a task that are changed


@pytest.mark.parametrize("name", task.names())
def test_hyperparameters_give_the_same_task_from_another_directory(name, tmp_path, monkeypatch):
    given = options(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = {key: value.replace(f"{tmp_path}/", "") for key, value in given.items()}
    first = create(name, **relative)
    assert set(first.hyperparameters) == set(task.defaults(name))
    assert json.loads(json.dumps(first.hyperparameters)) == first.hyperparameters
    assert {key: first.hyperparameters[key] for key in given} == given
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = create(name, **first.hyperparameters)
    assert (again.name, again.spec, again.hyperparameters) == (first.name, first.spec, first.hyperparameters)
    assert again.fingerprint() == first.fingerprint()
    if name in NO_OUTLINE:
        with pytest.raises(UserError, match="only the file"):
            task.outline(name, **first.hyperparameters)
    outline = first if name in NO_OUTLINE else task.outline(name, **first.hyperparameters)
    if not (name == "text" and given.get("protocol") == "s4"):
        assert outline.spec == first.spec and set(outline.hyperparameters) == set(first.hyperparameters)
    shown = Loader(first, "train", 2, 0)[0]
    assert {key: (x.shape, x.dtype) for key, x in shown.items()} == {
        key: (x.shape, x.dtype) for key, x in batch_shapes(outline.spec, 2).items()
    }
    for split in first.splits:
        for key, value in first.example(split, 0, 5).items():
            np.testing.assert_array_equal(again.example(split, 0, 5)[key], value)
    assert {path.name for path in (tmp_path / "cache").glob("*")} <= set(KEPT)


@pytest.mark.parametrize("name", [name for name in task.names() if "file" in task.defaults(name)])
def test_a_file_below_the_folder_or_without_one_is_found_again(name, tmp_path, monkeypatch):
    """Other data lies wherever the name of the file alone would lead."""
    folder = pathlib.Path(options(name, tmp_path)["data_dir"])
    (path,) = folder.iterdir()
    (folder / "below").mkdir()
    own = shutil.copy(path, folder / "below")
    rest = path.read_text().splitlines()[:-1]
    path.write_text("\n".join([*rest, rest[1]]) + "\n")
    other = create(name, data_dir=str(folder)).fingerprint()
    monkeypatch.chdir(folder)
    for given in (
        {"data_dir": str(folder), "file": f"below/{path.name}"},
        {"data_dir": str(tmp_path), "file": str(own)},
        {"file": str(own)},
        {"file": f"below/{path.name}"},
    ):
        first = create(name, **given)
        assert first.fingerprint() != other
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(folder if given["file"] == str(own) else tmp_path)
            again = create(name, **first.hyperparameters)
        assert again.fingerprint() == first.fingerprint() and again.hyperparameters == first.hyperparameters


@pytest.mark.parametrize("name", [name for name in task.names() if reads_files(name) and name not in NO_OUTLINE])
def test_outlines_read_nothing(name, tmp_path):
    """No folder that is named here exists."""
    folders = {key: str(tmp_path / key) for key in ("data_dir", "cache_dir") if key in task.defaults(name)}
    if name in ("listops", "pathfinder"):  # which generate their data unless they are given a folder
        folders = {}
    made = task.outline(name, **folders)
    assert made.spec.length == task.defaults(name).get("length", made.spec.length)
    assert not any(tmp_path.iterdir())
    with pytest.raises(NotImplementedError) if folders else contextlib.nullcontext():
        made.num_examples("train")


def test_outlines_of_characters_are_refused():
    with pytest.raises(UserError, match="how many characters there are only the text says"):
        task.outline("language_model", tokenizer="character")
    with pytest.raises(UserError, match="tokenizer='bpe' is unknown"):
        task.outline("language_model", tokenizer="bpe")
    assert task.outline("masked_lm", tokenizer="bpe:1000").spec.vocab_size == 1001


@pytest.mark.parametrize("name", task.names())
def test_folders_are_annotated(name):
    """A path without the annotation would stay relative."""
    for key, kind in task.find(name).__init__.__annotations__.items():
        assert not key.endswith("_dir") or kind == Folder | None


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MIXOLOGY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").write_bytes(pseudo_text(4000))
    first = task.create("language_model", corpus="file:~/text", length=16, tokenizer="bpe:260", cache_dir="~/other")
    assert first.hyperparameters["corpus"] == f"file:{tmp_path}/text"
    assert first.hyperparameters["cache_dir"] == f"{tmp_path}/other"
    (tokenizer,) = (tmp_path / "other" / "tokenizers").iterdir()
    os.rename(tokenizer, tmp_path / "own.json")
    own = task.create("language_model", corpus="file:~/text", length=16, tokenizer="file:~/own.json")
    assert own.hyperparameters["tokenizer"] == f"file:{tmp_path}/own.json"
    # Where the cache is belongs to the machine.
    assert own.hyperparameters["cache_dir"] is None and own.fingerprint() == first.fingerprint()


def test_auto_is_what_was_found(tmp_path, monkeypatch):
    def unreachable(requirement):
        raise corpora.FetchError("offline")

    monkeypatch.setattr(corpora, "fetch", unreachable)
    for name in ("language_model", "masked_lm", "passkey"):
        made = task.create(name, corpus="auto", cache_dir=str(tmp_path))
        assert made.hyperparameters["corpus"] == "stdlib" and made.name == f"{name}/stdlib"


def test_numbers_that_were_computed_are_told():
    mad = task.create("mad", kind="selective_copying", vocab_size=20)
    assert mad.hyperparameters == {
        "kind": "selective_copying",
        "length": 256,
        "vocab_size": 20,
        "train_examples": 12_800,
        "noise": None,
        "tokens": 16,
    }
    noisy = task.create("mad", kind="noisy_in_context_recall")
    assert noisy.hyperparameters["noise"] == 0.2 and noisy.hyperparameters["tokens"] is None


def numbers(kind):
    """(task, hyperparameter) of all that are of a kind."""
    found = ((name, task.find(name).__init__.__annotations__) for name in task.names())
    return [(name, key) for name, keys in found for key, own in keys.items() if own in (kind, kind | None)]


@pytest.mark.parametrize(("name", "key"), numbers(int) + numbers(float))
def test_numbers_out_of_range_are_refused_by_name(name, key, tmp_path):
    """Or else they make a task that has rows."""
    given = options(name, tmp_path)
    kept = []
    for value in (0, -1, 2**40) if (name, key) in numbers(int) else (-1.0, float("nan"), float("inf")):
        try:
            task.create(name, **given | {key: value}).example("test", 0)
            kept.append(value)
        except UserError as error:
            assert key in str(error), value
    # Expressions may have any number of tokens from 1 on, and keys need get no new values.
    assert kept == [0] * ((name, key) in {("listops", "min_length"), ("mqar", "num_updates")})


@pytest.mark.parametrize("name", [name for name in task.names() if reads_files(name)])
def test_the_fingerprint_is_of_every_file_and_not_of_its_place(name, tmp_path):
    (tmp_path / "here").mkdir()
    given = options(name, tmp_path / "here")
    files = sorted(path for path in (tmp_path / "here").rglob("*") if path.is_file())
    files = files[:: -(-len(files) // MOST)]
    before = create(name, **given).fingerprint()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = {key: value.replace(str(tmp_path / "here"), str(tmp_path / "there")) for key, value in given.items()}
    assert create(name, **moved).fingerprint() == before
    for path in files:
        content = path.read_bytes()
        # The last byte that is no end of a line.
        at = len(content.rstrip()) - 1
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        try:
            assert create(name, **given).fingerprint() != before, path
        except UserError as error:
            assert path.name in str(error) or path.parent.name in str(error)
        path.write_bytes(content)


def test_another_python_has_another_standard_library(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_bytes(pseudo_text(8000))
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    first = task.create("language_model", corpus="stdlib").fingerprint()
    (tmp_path / "two.py").write_bytes(b"x = 1")
    assert task.create("language_model", corpus="stdlib").fingerprint() != first


@pytest.mark.parametrize("name", ["language_model", "masked_lm"])
def test_a_retrained_tokenizer_is_other_data(name, tmp_path, monkeypatch):
    given = options(name, tmp_path) | {"tokenizer": "bpe:280"}
    (tmp_path / "text.txt").write_bytes(b"abab abcabc " * 1000 + b"xyxy zyzzyz " * 2000)
    first = task.create(name, **given).fingerprint()
    monkeypatch.setattr(tokenized, "TRAIN_BYTES", 10)
    monkeypatch.setattr(tokenized, "PIECE_BYTES", 2000)
    assert task.create(name, **given).fingerprint() == first  # the cached one
    assert task.create(name, **given | {"cache_dir": str(tmp_path / "other")}).fingerprint() != first


def test_texts_of_the_same_ids_are_told_apart(tmp_path):
    given = options("language_model", tmp_path) | {"tokenizer": "character"}
    prints = set()
    for letters in ("abc", "xyz"):
        (tmp_path / "text.txt").write_text("".join(letters[ord(c) % 3] for c in pseudo_text(8000).decode()))
        prints.add(task.create("language_model", **given).fingerprint())
    assert len(prints) == 2


@pytest.mark.parametrize("name", ["mqar", "digits_pixels", "language_model"])
def test_order_cutting_and_scale_are_in_the_fingerprint(name, tmp_path, monkeypatch):
    given = options(name, tmp_path)
    first = create(name, **given)
    fresh = lambda: create(name, **given)
    prints = {first.fingerprint()}
    smaller = fresh()
    monkeypatch.setattr(smaller, "num_examples", lambda split: first.num_examples(split) - 1)
    prints.add(smaller.fingerprint())
    # Only rows of an epoch, of a seed, or of a split are others.
    for differs in (
        lambda split, index, epoch, seed: epoch == 2,
        lambda split, index, epoch, seed: seed == 1,
        lambda split, index, epoch, seed: split == "valid",
        lambda split, index, epoch, seed: split == "test" and index == first.num_examples("test") - 1,
    ):
        changed = fresh()

        def row(*where, differs=differs):
            found = first.row(*where)
            return found | {"inputs": found["inputs"][::-1]} if differs(*where) else found

        monkeypatch.setattr(changed, "row", row)
        prints.add(changed.fingerprint())
    permuted = task._permuted
    monkeypatch.setattr(task, "_permuted", lambda rows, seed: permuted(rows, seed + 10))
    prints.add(fresh().fingerprint())
    assert len(prints) == 7
