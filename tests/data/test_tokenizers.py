"""Tokens against the text that they stand for."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from common.errors import UserError
from data import corpora, task, tokenized, tokenizers

TEXT = "Größe 🙂, naïveté!\n" + "the cat sat on the mat; the hat\n\tis flat.\n\n  " * 40


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    return corpora.load(f"file:{tmp_path / 'text.txt'}")


def whole_text(corpus, split):
    """The split's text without the characters that its borders cut."""
    return corpus.splits[split].data.tobytes().decode(errors="ignore")


@pytest.mark.parametrize("name", ["byte", "character", "bpe:256", "bpe:290"])
@pytest.mark.parametrize("piece", [2**20, 64])
def test_tokens_give_the_text_back(corpus, tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(tokenized, "PIECE_BYTES", piece)
    tokens = tokenized.load(name, corpus, tmp_path)
    for split in corpora.SPLITS:
        ids = np.asarray(tokens.splits[split].data)
        assert tokens.tokenizer.decode(ids) == whole_text(corpus, split)
        assert ids.max() < tokens.tokenizer.vocab_size and tokens.splits[split].ends.tolist() == [len(ids)]
        assert tokens.num_bytes[split] == len(corpus.splits[split].data)
        assert tokens.first_bytes[split].tolist() == [len(tokens.tokenizer.decode(ids[:1]).encode())]
    text = "the naïve cat 🙂\n"
    ids = tokens.tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokens.tokenizer.decode(ids) == text
    assert (
        tokens.tokenizer.vocab_size == {"byte": 256, "character": len(set(TEXT)), "bpe:256": 256, "bpe:290": 290}[name]
    )


def test_bytes_are_the_corpus_itself(corpus, tmp_path):
    tokens = tokenized.load("byte", corpus, tmp_path / "cache")
    assert tokens.splits is corpus.splits and tokens.fingerprint == corpus.fingerprint
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"half"])
@pytest.mark.parametrize("name", ["tokenizers/*.txt", "tokens/*/train", "tokens/*/facts.json"])
def test_a_damaged_cache_is_said(corpus, tmp_path, name, content):
    """Nothing is trained on a text that a power cut has cut."""
    tokenized.load("character", corpus, tmp_path)
    (path,) = tmp_path.glob(name)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: delete it and run again|the corpus has no character"):
        tokenized.load("character", corpus, tmp_path)


def test_bpe_is_trained_once_and_always_the_same(corpus, tmp_path, monkeypatch):
    first = tokenized.load("bpe:290", corpus, tmp_path / "one")
    assert tokenized.load("bpe:290", corpus, tmp_path / "two").fingerprint == first.fingerprint
    assert tokenized.load("bpe:280", corpus, tmp_path / "two").fingerprint != first.fingerprint
    monkeypatch.setattr(tokenizers, "byte_level", None)
    monkeypatch.setattr(tokenized, "_convert", None)
    assert tokenized.load("bpe:290", corpus, tmp_path / "one").fingerprint == first.fingerprint
    for file in (tmp_path / "one" / "tokenizers").iterdir():
        file.write_text("{")
    with pytest.raises(UserError, match=r"bpe290.* is damaged: delete it"):
        tokenized.load("bpe:290", corpus, tmp_path / "one")


def test_bpe_merges_the_commonest_pairs(tmp_path):
    (tmp_path / "text").write_text("ababab ababab cb " * 200)
    corpus = corpora.load(f"file:{tmp_path / 'text'}")
    tokenizer = tokenized.load("bpe:258", corpus, tmp_path).tokenizer
    merges = json.loads((tmp_path / "tokenizers" / f"{corpus.fingerprint[:32]}-bpe258-1.json").read_text())["model"][
        "merges"
    ]
    assert ["".join(pair) for pair in merges] == ["ab", "abab"]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("ababab cb")] == ["abab", "ab", " ", "c", "b"]


def test_a_tokenizer_comes_from_a_file(corpus, tmp_path):
    ours = tokenized.load("bpe:290", corpus, tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    assert tokenized.load(f"file:{path}", corpus, tmp_path).fingerprint == ours.fingerprint
    model = json.loads(path.read_text())["model"]
    for name, (vocabulary, merges) in {
        "hf": ("vocab.json", "merges.txt"),
        "gpt2": ("encoder.json", "vocab.bpe"),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / vocabulary).write_text(json.dumps(model["vocab"]))
        (tmp_path / name / merges).write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
        assert tokenized.load(f"file:{tmp_path / name}", corpus, tmp_path).fingerprint == ours.fingerprint


def test_a_file_does_not_cut_or_fill_up_texts(corpus, tmp_path):
    """What a tokenizer.json says of batches is no part of its tokens; its fingerprint is that of the file, as ever."""
    import tokenizers as package

    tokenized.load("bpe:290", corpus, tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    plain = tokenizers.alone(f"file:{path}")
    cutting = package.Tokenizer.from_file(str(path))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=3, pad_token="!")
    cutting.save(str(tmp_path / "cutting.json"))
    found = tokenizers.alone(f"file:{tmp_path / 'cutting.json'}")
    for text in ("the cat sat on the mat", "a"):
        ids = plain.encode(text).tolist()
        assert found.encode(text).tolist() == ids and found.encode_prompt(text).tolist() == ids
        assert found.encode_all([text, "the"])[0][0].tolist() == ids
    as_it_is = package.Tokenizer.from_file(str(tmp_path / "cutting.json")).to_str()
    assert found.fingerprint == hashlib.sha256(as_it_is.encode()).hexdigest() != plain.fingerprint


def test_documents_keep_their_borders(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"Dokument {i}: " + "Füße " * (i % 7))
    corpus = corpora.load(f"file:{tmp_path}")
    make = lambda **kwargs: task.create(
        "language_model", corpus=f"file:{tmp_path}", length=8, cache_dir=str(tmp_path / ".cache"), **kwargs
    )
    for name in ("character", "bpe:270"):
        lm = make(tokenizer=name, packing="documents")
        for split in corpora.SPLITS:
            tokens, text = lm.tokens.splits[split], corpus.splits[split]
            ends = [0, *tokens.ends.tolist()]
            documents = [lm.decode(tokens.data[a:b]) for a, b in itertools.pairwise(ends)]
            starts = [0, *text.ends.tolist()]
            expected = [text.data[a:b].tobytes().decode(errors="ignore") for a, b in itertools.pairwise(starts)]
            assert documents == expected
            sizes = lm.text_sizes(split)
            assert sizes["tokens"] == len(tokens.data) - len(documents) and "words" not in sizes
            if name == "character":
                assert sizes["bytes"] == sum(len(document[1:].encode()) for document in documents)
            if split != "train":
                rows = [lm.example(split, i) for i in range(lm.num_examples(split))]
                assert sum(row["weights"].sum() for row in rows) == sizes["tokens"]
        whole = make(tokenizer=name)
        words = whole.corpus.splits["test"].data.tobytes().split()
        assert whole.text_sizes("test")["words"] == len(words)


@pytest.mark.parametrize("name", ["bpe:256", "bpe:262", "added", "fallback"])
def test_the_first_token_may_be_a_part_of_a_character(tmp_path, name):
    """Its bytes, and those that a model is scored on, beside what the tokens say themselves."""
    import tokenizers as package

    texts = [f"日本{i}です é" if i % 3 else f"x本{i}" for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if name == "added":
        made = tokenizers.byte_level(package.models.BPE.from_file(*byte_files(tmp_path)))
        made.add_tokens([package.AddedToken("日")])
    elif name == "fallback":
        pieces = {f"<0x{i:02X}>": i for i in range(256)} | {"x": 256, "本": 257}
        made = package.Tokenizer(package.models.BPE(pieces, [], byte_fallback=True))
        made.decoder = package.decoders.Sequence([package.decoders.ByteFallback(), package.decoders.Fuse()])
    if not name.startswith("bpe"):
        made.save(str(tmp_path / "own.json"))
        name = f"file:{tmp_path / 'own.json'}"
    lm = task.create(
        "language_model",
        corpus=f"jsonl:{tmp_path / 'a.jsonl'},valid=0.2,test=0.2",
        length=16,
        cache_dir=str(tmp_path / "cache"),
        packing="documents",
        tokenizer=name,
    )
    kept = json.loads(
        next((tmp_path / "cache" / "tokenizers").glob("*")).read_text() if name[:3] == "bpe" else made.to_str()
    )
    tokens = {i: token for token, i in kept["model"]["vocab"].items()} | {
        one["id"]: one["content"] for one in kept["added_tokens"]
    }

    def size(i):
        token = tokens[int(i)]
        if token in ("日", "本"):
            return 3
        return 1 if token.startswith("<0x") else len(token)

    for split in corpora.SPLITS:
        data, ends = lm.tokens.splits[split].data, lm.tokens.splits[split].ends
        assert lm.tokens.first_bytes[split].tolist() == [size(data[start]) for start in [0, *ends[:-1].tolist()]]
        if split != "train":
            rows = [lm.example(split, i) for i in range(lm.num_examples(split))]
            assert lm.text_sizes(split)["bytes"] == sum(size(i) for r in rows for i in r["targets"][r["weights"] > 0])


def byte_files(folder):
    """vocab.json and merges.txt of the bytes."""
    import tokenizers as package

    letters = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def test_language_model_scores_are_those_of_the_text(tmp_path):
    """A model that gives every token of a split its frequency, in bits per byte and per word, and its floors."""
    (tmp_path / "text.txt").write_text("a rose is a rose is a Röse.\n" * 400)
    make = lambda name: task.create(
        "language_model", corpus=f"file:{tmp_path / 'text.txt'}", length=16, cache_dir=str(tmp_path), tokenizer=name
    )
    byte, character, subword = (make(name) for name in ("byte", "character", "bpe:265"))
    assert [lm.spec.metric.name for lm in (byte, character, subword)] == [
        "bits_per_byte",
        "bits_per_character",
        "bits_per_token",
    ]
    assert character.spec.vocab_size == len(set("a rose is a rose is a Röse.\n")) and subword.spec.vocab_size == 265
    assert len({lm.fingerprint() for lm in (byte, character, subword)}) == 3
    assert byte.text_sizes("test") == {
        "tokens": byte.text_sizes("test")["bytes"],
        "bytes": len(byte.corpus.splits["test"].data) - 1,
    } | {"words": len(byte.corpus.splits["test"].data.tobytes().split())}
    for lm in (character, subword):
        floors, sizes = lm.floors("test"), lm.text_sizes("test")
        assert floors["uniform"] == np.log2(lm.spec.vocab_size) and sizes["tokens"] < sizes["bytes"]
        for name, value in byte.floors("test").items():
            if name != "uniform":
                assert floors[name] * sizes["tokens"] == pytest.approx(value * sizes["bytes"], rel=1e-12)


def test_bad_input_says_what_to_change(corpus, tmp_path):
    large = ("bpe:16777217", "bpe:1000000000000", "bpe:" + "9" * 5000)
    for name in ("bytes", "bpe", "bpe:255", "bpe:many", "file:", "", *large):
        with pytest.raises(ValueError, match="is unknown; choose 'byte', 'character', 'bpe:SIZE'"):
            tokenized.load(name, corpus, tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer .*nowhere: give a tokenizer\.json"):
        tokenized.load(f"file:{tmp_path / 'nowhere'}", corpus, tmp_path)
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    with pytest.raises(UserError, match=r"empty\.json is a tokenizer without tokens"):
        tokenized.load(f"file:{tmp_path / 'empty.json'}", corpus, tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is no tokenizer that"):
        tokenized.load(f"file:{tmp_path / 'bad.json'}", corpus, tmp_path)
    with pytest.raises(ValueError, match="the corpus has no character 'Q'"):
        tokenized.load("character", corpus, tmp_path).tokenizer.encode("the Queen")
    (tmp_path / "latin").write_bytes("naïf ".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"train split of .* is no UTF-8 text .*use tokenizer='byte'"):
        tokenized.load("character", corpora.load(f"file:{tmp_path / 'latin'}"), tmp_path)
    (tmp_path / "latin").unlink()
    (tmp_path / "folder").mkdir()
    for i in range(30):  # a document that ends within a character, but not at the border of a split
        (tmp_path / "folder" / f"{i:02}").write_bytes(b"twenty bytes of text" + b"\xc3" * (i == 5))
    broken = corpora.load(f"file:{tmp_path / 'folder'}")
    with pytest.raises(ValueError, match=r"train split of .* is no UTF-8 text"):
        tokenized.load("character", broken, tmp_path)


def test_a_tokenizer_that_loses_text_is_refused(corpus, tmp_path):
    import tokenizers as package

    tokenized.load("bpe:300", corpus, tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    lossy = package.Tokenizer.from_file(str(path))
    lossy.normalizer = package.normalizers.Lowercase()
    lossy.save(str(tmp_path / "lossy.json"))
    with pytest.raises(ValueError, match=r"loses text: 'Größe.* comes back as 'größe"):
        tokenized.load(f"file:{tmp_path / 'lossy.json'}", corpus, tmp_path)
    # And so where no corpus is cut: an answer in capitals could not be said, and all unknown ones would be the same.
    unknown = package.Tokenizer(package.models.WordLevel({"[UNK]": 0, "he": 1, "saw": 2}, unk_token="[UNK]"))
    unknown.pre_tokenizer = package.pre_tokenizers.Whitespace()
    unknown.save(str(tmp_path / "words.json"))
    for name in ("lambada", "completion"):
        (tmp_path / name).mkdir()
        line = {"text": "he saw Ann" if name == "lambada" else "he saw", "value": "Ann"}
        (tmp_path / name / "a.jsonl").write_text(json.dumps(line))
        for file in ("lossy", "words"):
            with pytest.raises(UserError, match=rf"{file}.json' loses text: 'he saw Ann' comes back as '.*"):
                task.create(name, data_dir=str(tmp_path / name), length=64, tokenizer=f"file:{tmp_path / file}.json")
        task.create(name, data_dir=str(tmp_path / name), length=64, tokenizer=f"file:{path}")


def test_a_tokenizer_with_dropout_always_cuts_in_the_same_way(tmp_path, corpus):
    tokenized.load("bpe:290", corpus, tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    kept = json.loads(path.read_text())
    expected = tokenized.load(f"file:{path}", corpus, tmp_path).tokenizer.encode(TEXT)
    (tmp_path / "own.json").write_text(json.dumps(kept | {"model": kept["model"] | {"dropout": 0.5}}))
    tokenizer = tokenized.load(f"file:{tmp_path / 'own.json'}", corpus, tmp_path).tokenizer
    assert len(expected) < len(TEXT.encode())
    for _ in range(3):
        np.testing.assert_array_equal(tokenizer.encode(TEXT), expected)
