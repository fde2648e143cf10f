"""Whether ids are the same tokens, beside vocabularies that are written out."""

import json
import shutil
from types import SimpleNamespace

import pytest

from data import corpora, task, tokenized, tokenizers, vocabularies

ENGLISH, GREEK = "the cat sat on the mat; the hat is flat\n", "η γάτα κάθισε στο χαλί και το καπέλο είναι επίπεδο\n"


@pytest.fixture
def made(tmp_path):
    """A tokenizer by its name and text."""

    def make(name, text):
        path = tmp_path / f"{len(text)}.txt"
        path.write_text(text * 100)
        return tokenized.load(name, corpora.load(f"file:{path}", str(tmp_path)), tmp_path).tokenizer

    return make


def test_trained_tokenizers_are_compared_by_their_tokens(made):
    """No English text tells two apart that were trained on other scripts."""
    greek, other = made("bpe:290", GREEK), made("bpe:290", GREEK.upper())
    assert greek.encode(vocabularies.PROBE).tolist() == other.encode(vocabularies.PROBE).tolist()
    assert vocabularies.same(greek, other) is False and vocabularies.same(greek, made("bpe:290", GREEK)) is True
    assert vocabularies.same(made("character", ENGLISH), made("character", GREEK)) is False
    assert vocabularies.same(made("character", ENGLISH), made("character", ENGLISH[::-1])) is True
    # The ids of a part of a vocabulary are the same, and yet it cuts texts otherwise.
    part = made("bpe:280", GREEK)
    assert part.vocabulary() == greek.vocabulary()[: part.vocab_size]
    assert vocabularies.same(part, greek) is False and vocabularies.same(greek, part) is False


def test_a_file_is_the_tokenizer_that_it_was_written_from(made, tmp_path):
    ours = made("bpe:290", ENGLISH)
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    folder = tmp_path / "pair"
    folder.mkdir()
    model = json.loads(ours.to_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    for name in (vocabularies.of_checkpoint(tmp_path), vocabularies.of_checkpoint(folder)):
        assert vocabularies.same(tokenizers.alone(name), ours) is True
    shutil.copy(tmp_path / "tokenizer.json", folder)
    assert vocabularies.of_checkpoint(folder) == f"file:{folder}/tokenizer.json"


def test_bytes_and_what_has_no_text(made):
    byte, subword = tokenizers.Byte(), made("bpe:290", ENGLISH)
    assert vocabularies.same(byte, subword) is False and vocabularies.same(byte, made("character", ENGLISH)) is False
    numbers = task.create("mqar", vocab_size=256, length=16, num_kv_pairs=4)
    ids = tokenizers.Ids(256)
    for unknown in (None, ids, SimpleNamespace(tokenizer=ids, encode=ids.encode), numbers):
        assert vocabularies.same(byte, unknown) is None and vocabularies.same(unknown, byte) is None
    # A task that cuts texts itself is known by how it does.
    assert vocabularies.same(SimpleNamespace(encode=byte.encode, tokenizer=None), byte) is True
    assert vocabularies.same(SimpleNamespace(encode=lambda text: byte.encode(text) + 1, tokenizer=None), byte) is False


def test_tokenizers_of_checkpoints(tmp_path):
    """A folder without any says nothing; one whose tokenizer cannot be read does."""
    assert vocabularies.of_checkpoint(tmp_path) is None and vocabularies.unread(tmp_path) is None
    for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
        assert vocabularies.of_checkpoint(tmp_path) is None and vocabularies.unread(tmp_path) == tmp_path / name
        (tmp_path / name).unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    assert vocabularies.of_checkpoint(tmp_path) == f"file:{tmp_path}" and vocabularies.unread(tmp_path) is None


def test_tokens_that_were_added_are_none_of_the_text(made, tmp_path):
    """A file with a token for the end of a text is that without one, and two that give one id to two of them are not the same."""
    import tokenizers as package

    ours = made("bpe:290", ENGLISH)
    for name in ("end", "pad"):
        (tmp_path / f"{name}.json").write_text(ours.to_json())
        more = package.Tokenizer.from_file(str(tmp_path / f"{name}.json"))
        more.add_special_tokens([f"<|{name}|>"])
        more.save(str(tmp_path / f"{name}.json"))
    end, pad = (tokenizers.alone(f"file:{tmp_path}/{name}.json") for name in ("end", "pad"))
    assert end.vocab_size == ours.vocab_size + 1 and vocabularies.same(end, ours) is True
    assert vocabularies.same(end, pad) is False
