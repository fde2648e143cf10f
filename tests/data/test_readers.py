"""Files of the user's own, against what was written into them by other means: pyarrow, gzip, struct."""

import gzip
import hashlib
import json
import struct
import sys

import numpy as np
import pytest

from common.errors import UserError
from common.files import KEPT
from data import corpora, corpus, flat, records, task
from data.flat import SPLITS

TEXTS = [f"Document {i}: {'Füße ' * (i % 5)}" for i in range(200)]


def documents(stream):
    """The documents of a split, without the blank lines between them."""
    starts = [0, *stream.ends[:-1].tolist()]
    found = [stream.data[a:b].tobytes().decode() for a, b in zip(starts, stream.ends.tolist(), strict=True)]
    assert all(text.endswith("\n\n") for text in found[:-1])
    return [text.removesuffix("\n\n") for text in found]


def place(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16


def write_jsonl(path, texts, opener=open, **more):
    with opener(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"id": 1, "text": text, **more}) + "\n")


def write_parquet(path, texts, name="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), name: texts}), path, row_group_size=30)


def write_zst(path, texts):
    pyarrow = pytest.importorskip("pyarrow")
    frames = [texts[:90], texts[90:]]  # as packed in parts, of which the pile's files are
    path.write_bytes(
        b"".join(
            pyarrow.compress("".join(json.dumps({"text": t}) + "\n" for t in part).encode(), "zstd", asbytes=True)
            for part in frames
        )
    )


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": lambda path, texts: write_jsonl(path, texts, gzip.open),
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_documents_are_split_by_their_hash(tmp_path, name, capsys):
    """All formats give the same text, whatever the order; and each document is where its hash says."""
    WRITERS[name](tmp_path / name, [*TEXTS, ""])
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    load = lambda where, options="": corpora.load(f"{kind}:{where}{options}", str(tmp_path / ".cache"))
    found = load(tmp_path / name, ",valid=0.1,test=0.2")
    assert found.name == f"{kind}:{tmp_path / name},valid=0.1,test=0.2"
    expected = {
        "train": [t for t in TEXTS if 0.2 <= place(t) < 0.9],
        "valid": [t for t in TEXTS if place(t) >= 0.9],
        "test": [t for t in TEXTS if place(t) < 0.2],
    }
    assert {split: documents(found.splits[split]) for split in SPLITS} == expected
    counts = ", ".join(f"{len(texts):,} {split}" for split, texts in expected.items())
    assert f"documents: {counts}; 1 without text are left out" in capsys.readouterr().out
    assert load(tmp_path, ",valid=0.1,test=0.2").fingerprint == found.fingerprint
    assert load(tmp_path / "a.*", ",valid=0.1,test=0.2").fingerprint == found.fingerprint
    # Own documents of a split are taken whole, and nothing is cut off for it.
    (tmp_path / "dev").mkdir()
    WRITERS[name](tmp_path / "dev" / name, TEXTS[:9])
    own = load(tmp_path / name, f",valid={tmp_path / 'dev'}")
    assert documents(own.splits["valid"]) == TEXTS[:9]
    assert documents(own.splits["train"]) == [t for t in TEXTS if place(t) >= 0.05]


def test_large_files_give_up_a_smaller_share(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(records, "HELD_OUT_BYTES", (tmp_path / "a.jsonl").stat().st_size / 50)
    found = corpora.load(f"jsonl:{tmp_path / 'a.jsonl'}", str(tmp_path))
    assert documents(found.splits["valid"]) == [t for t in TEXTS if place(t) >= 0.98]


def test_a_corpus_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    load = lambda: corpora.load(f"jsonl:{tmp_path / 'a.jsonl'}", str(tmp_path / ".cache"))
    first = load()
    with monkeypatch.context() as patched:
        patched.setattr(flat, "fingerprint", None)
        patched.setattr(records, "hashed", None)
        assert load().fingerprint == first.fingerprint
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "one more"])
    assert load().fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": 1}\n', r"a\.jsonl, line 3: 'text' is no text but '1'; give another as field=NAME"),
        (b'{"text": "a"}\n{"texts": "b"}\n', r"a\.jsonl, line 2: there is no 'text' \(did you mean 'texts'\?\)"),
        (b'{"text": "a"\n', r"a\.jsonl, line 1: it is no JSON \("),
        (b'["a"]\n', r"a\.jsonl, line 1: it is no JSON object but"),
        (b'{"text": "\xe4"}\n', r"a\.jsonl, line 1: it is no JSON \("),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' is no valid text \("),
        (b'{"text": "a"}\n', r"of 1 documents none fell to "),
        (b'{"text": ""}\n{"text": null}\n', r"a\.jsonl holds no text: all 2 documents are empty"),
        (b"\n", r"a\.jsonl holds no text"),
        (b'{"text": ' + b"[" * 99_999 + b"\n", r"a\.jsonl, line 1: it is no JSON \(maximum recursion"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpora.load(f"jsonl:{tmp_path / 'a.jsonl'}", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_bad_files_are_named(tmp_path):
    load = lambda name: corpora.load(name, str(tmp_path / ".cache"))
    WRITERS["a.jsonl.gz"](tmp_path / "a.jsonl.gz", TEXTS)
    write_zst(tmp_path / "b.jsonl.zst", TEXTS)
    write_parquet(tmp_path / "c.parquet", TEXTS, "body")
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(UserError, match=rf"{name} cannot be read \(.*\): it is cut or spoilt"):
            load(f"jsonl:{tmp_path / name}")
    with pytest.raises(UserError, match=r"c\.parquet: there is no column 'text' \(choose one of id, body\)"):
        load(f"parquet:{tmp_path / 'c.parquet'}")
    with pytest.raises(UserError, match=r"c\.parquet: the column 'id' holds no text but int64"):
        load(f"parquet:{tmp_path / 'c.parquet'},field=id")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    latin = pyarrow.array([b"F\xfc\xdfe"])
    for columns, message in (
        ({"text": pyarrow.Array.from_buffers(pyarrow.string(), 1, latin.buffers())}, "no intact parquet file .*utf-8"),
        ({"text": latin}, "holds no text but binary"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
        with pytest.raises(UserError, match=rf"d\.parquet.* {message}"):
            load(f"parquet:{tmp_path / 'd.parquet'}")
    plain = pyarrow.array(TEXTS)
    prints = set()
    for i, column in enumerate((plain, plain.dictionary_encode(), plain.cast(pyarrow.string_view()))):
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{i}.parquet")
        prints.add(load(f"parquet:{tmp_path / f'{i}.parquet'}").fingerprint)
    assert len(prints) == 1
    twice = pyarrow.table([latin, latin], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet: there are several columns 'text'"):
        load(f"parquet:{tmp_path / 'd.parquet'}")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c\.parquet is no intact parquet file"):
        load(f"parquet:{tmp_path}")
    with pytest.raises(UserError, match=r"there is no file or folder .*nowhere"):
        load("jsonl:nowhere")
    with pytest.raises(UserError, match=r"no file that ends in \.jsonl"):
        load(f"jsonl:{(tmp_path / 'empty').mkdir() or tmp_path / 'empty'}")


def test_ids_beyond_the_vocabulary_are_told_the_other_type(tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    for given, other in (("", "uint32"), (",dtype=uint16", "uint32"), (",dtype=uint32", "uint16")):
        with pytest.raises(UserError, match=rf"the right dtype \(corpus='bin:PATH,dtype={other}'\)"):
            ids_task(f"{tmp_path / 'a.bin'}{given}", tmp_path / "cache", tokenizer="ids:300")


@pytest.mark.parametrize("cache", ["", "kept", "linked/kept"])
@pytest.mark.parametrize("kind", ["jsonl:web", "jsonl:web/**/*.json*", "file:web"])
def test_what_is_kept_between_runs_is_no_text(tmp_path, monkeypatch, kind, cache):
    """The cache may lie in the folder of the texts, or be it; a second start would read what the first one kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "web")
    cache = cache if cache.startswith("linked") else f"web/{cache}"
    if kind == "file:web":
        (tmp_path / "web" / "a.txt").write_text("".join(TEXTS))
    else:
        write_jsonl(tmp_path / "web" / "a.jsonl", TEXTS)
    options = {"corpus": kind, "length": 8, "cache_dir": str(tmp_path / cache)}
    for tokenizer in ("bpe:300", "character"):
        first = task.create("language_model", tokenizer=tokenizer, **options)
        first.floors("valid")
        assert task.create("language_model", tokenizer=tokenizer, **options).fingerprint() == first.fingerprint()
        assert first.corpus.files["train"] == [tmp_path / "web" / ("a.txt" if kind == "file:web" else "a.jsonl")]
    assert {path.name for path in (tmp_path / cache).iterdir()} - {"a.txt", "a.jsonl"} <= set(KEPT)


def test_options_are_checked_and_paths_may_look_like_them(tmp_path):
    load = lambda name: corpora.load(name, str(tmp_path / ".cache"))
    with pytest.raises(UserError, match=r"no hyperparameter 'feild'; did you mean 'field'"):
        load("jsonl:a.jsonl,feild=body")
    with pytest.raises(UserError, match="has valid twice"):
        load("jsonl:a.jsonl,valid=0.1,field=x,valid=0.2")
    with pytest.raises(UserError, match=r"names no file: give its path, as in corpus='jsonl:PATH'"):
        load("jsonl:")
    for name in ("jsonl:gs://bucket/a.jsonl", "file:a.txt,valid=s3://bucket/b.txt", "bin:https://host/a.bin"):
        with pytest.raises(UserError, match="is at an address, and is read from files of this machine"):
            load(name)
    with pytest.raises(UserError, match="Could not determine home directory"):
        load("file:~nobody-of-that-name/a.txt")
    with pytest.raises(UserError, match="valid is empty"):
        load("jsonl:a.jsonl,valid=")
    with pytest.raises(UserError, match=r"shares above 0 and below 0\.5, or paths; got 0\.9"):
        load(f"file:{__file__},valid=0.9")
    odd = tmp_path / "a,valid=0.1"
    odd.write_text("words " * 99)
    assert load(f"file:{odd}").name == f"file:{odd}"
    assert [kind.partition(":")[0] for kind in corpus.kinds()] == ["bin", "file", "hf", "jsonl", "parquet"]


def test_text_has_shares_and_splits_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 201)))
    (tmp_path / "dev").mkdir()
    for name in ("x", "y"):
        (tmp_path / "dev" / name).write_text(name * 10)
    load = lambda options: corpora.load(f"file:{tmp_path / 'a.txt'}{options}", str(tmp_path / ".cache"))
    sizes = lambda found: [len(found.splits[split].data) for split in SPLITS]
    assert sizes(load("")) == [180, 10, 10] and sizes(load(",valid=0.02")) == [186, 4, 10]
    own = load(f",valid={tmp_path / 'dev'},test={tmp_path / 'dev' / 'y'}")
    assert sizes(own) == [200, 22, 10] and documents(own.splits["valid"]) == ["x" * 10, "y" * 10]


IDS = np.random.default_rng(0).integers(0, 50257, 4000)
IDS[::40] = 50256


def ids_task(path, folder, length=8, **options):
    options = {"tokenizer": "ids:50257", "packing": "documents"} | options
    return task.create("language_model", corpus=f"bin:{path}", length=length, cache_dir=str(folder), **options)


@pytest.mark.parametrize("split", SPLITS)
def test_documents_of_one_token_are_nothing_to_score(tmp_path, split):
    """Each step of training would be left out, and every floor be no number."""
    for name in SPLITS:
        ids = np.tile([5, 7], 100) if name != split else np.full(200, 7)
        (tmp_path / f"{name}.bin").write_bytes(ids.astype("<u2").tobytes())
    make = lambda packing: ids_task(f"{tmp_path},eot=7", tmp_path / "cache", tokenizer="ids:8", packing=packing)
    with pytest.raises(UserError, match=f"the {split} split of .* has documents of one token each.*packing='windows'"):
        make("documents")
    assert make("windows").text_sizes(split) == {"tokens": 199}


def test_a_file_is_of_one_split(tmp_path):
    """What is learned is not what is scored, also where a folder or a link holds it."""
    load = lambda name: corpora.load(name, str(tmp_path / "cache"), ids=True)
    (tmp_path / "web").mkdir()
    write_jsonl(tmp_path / "web" / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "web" / "dev.jsonl", TEXTS)
    (tmp_path / "link").symlink_to(tmp_path / "web" / "a.jsonl")
    (tmp_path / "a.txt").write_text("words " * 99)
    IDS.astype("<u2").tofile(tmp_path / "a.bin")
    for name in (
        f"jsonl:{tmp_path}/web,valid={tmp_path}/web/dev.jsonl",
        f"jsonl:{tmp_path}/web/a.jsonl,test={tmp_path}/link",
        f"file:{tmp_path}/a.txt,valid={tmp_path}/a.txt",
        f"bin:{tmp_path}/a.bin,valid={tmp_path}/a",
    ):
        with pytest.raises(UserError, match=r"is of train and of .*: name the files of train"):
            load(name)
    assert not (tmp_path / "cache").exists()


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 99)
    for cache, message in (
        (tmp_path / "a.txt", r"cannot be written \(Not a directory\)"),
        ("/proc/nowhere", r"cannot be written \(No such file or directory\)"),
        ("gs://bucket/cache", "is no folder of this machine"),
    ):
        with pytest.raises(UserError, match=message):
            corpora.load(f"file:{tmp_path}/a.txt", str(cache))


def test_ids_of_nanogpt(tmp_path):
    """Rows of a split are its ids, and documents end behind each end of text."""
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    IDS[:90].astype("<u2").tofile(tmp_path / "val.bin")
    lm = ids_task(f"{tmp_path},eot=50256,test=0.1", tmp_path / "cache")
    train, valid, test = (lm.tokens.splits[split] for split in SPLITS)
    np.testing.assert_array_equal(np.concatenate([train.data[:], test.data[:]]), IDS)
    assert len(test.data) == 400 and valid.ends.tolist() == [1, 41, 81, 90]
    assert train.ends.tolist() == [*range(1, 3600, 40), 3600]
    rows = [lm.example("valid", i) for i in range(lm.num_examples("valid"))]
    scored = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
    np.testing.assert_array_equal(scored, np.delete(IDS[:90], [0, 1, 41, 81]))
    assert lm.text_sizes("valid") == {"tokens": 86}
    # The floor by counting.
    counts = np.bincount(IDS[:3600], minlength=50257) + 1
    assert lm.floors("valid")["unigram"] == pytest.approx(-np.log2(counts[scored] / counts.sum()).mean(), rel=1e-12)
    assert lm.encode("5 6").tolist() == [5, 6] and lm.decode([5, 6]) == "5 6"
    assert ids_task(f"{tmp_path},eot=50256,test=0.1", tmp_path / "cache").fingerprint() == lm.fingerprint()
    mlm = task.create("masked_lm", corpus=f"bin:{tmp_path}", tokenizer="ids:50257", length=8, cache_dir=str(tmp_path))
    assert mlm.example("valid", 0)["inputs"].max() <= 50257
    with pytest.raises(UserError, match=r"holds token ids up to 50256: .* as in tokenizer='ids:50257'; got 'byte'"):
        ids_task(tmp_path, tmp_path / "cache", tokenizer="byte")
    with pytest.raises(UserError, match=r"holds the id 50256 and tokenizer='ids:50000' has 0 to 49999"):
        ids_task(tmp_path, tmp_path / "cache", tokenizer="ids:50000")
    with pytest.raises(UserError, match="holds token ids, and a text is needed"):
        corpora.load(f"bin:{tmp_path}", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no id of train is eot=50000: give the one that documents end with"):
        ids_task(f"{tmp_path},eot=50000", tmp_path / "cache")


def test_ids_of_llm_c_in_several_files(tmp_path):
    for i, part in enumerate(np.split(IDS, [1000, 1500])):
        header = np.zeros(256, "<i4")
        header[:3] = 20240801, 7, len(part)
        (tmp_path / f"x_train_{i}.bin").write_bytes(header.tobytes() + part.astype("<u4").tobytes())
    lm = ids_task(f"{tmp_path}/x_train_*.bin,valid=0.25,test=0.25", tmp_path / "cache")
    assert [len(lm.tokens.splits[split].data) for split in SPLITS] == [2000, 1000, 1000]
    assert lm.tokens.splits["train"].ends.tolist() == [1000, 1500, 2000]
    np.testing.assert_array_equal(lm.tokens.splits["train"].data[900:1600], IDS[900:1600])
    np.testing.assert_array_equal(np.asarray(lm.tokens.splits["valid"].data), IDS[2000:3000])
    content = (tmp_path / "x_train_2.bin").read_bytes()
    (tmp_path / "x_train_2.bin").write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"x_train_2\.bin holds 2,499 ids, and its header or index says 2,500"):
        ids_task(f"{tmp_path}/x_train_*.bin", tmp_path / "cache")
    (tmp_path / "x_train_2.bin").write_bytes(content[:500])
    with pytest.raises(UserError, match=r"x_train_2\.bin ends within its header"):
        ids_task(f"{tmp_path}/x_train_*.bin", tmp_path / "cache")


def test_ids_of_megatron(tmp_path):
    """An index written by hand: sequences of these sizes, the documents being sequences 0, 1 and 2, 3 (empty), and 4."""
    sizes = [700, 300, 1000, 0, 2000]
    pointers = [0, *(4 * np.cumsum(sizes))[:-1].tolist()]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 5, 5)
    index += struct.pack("<5i", *sizes) + struct.pack("<5q", *pointers) + struct.pack("<5q", 0, 1, 3, 4, 5)
    IDS.astype("<i4").tofile(tmp_path / "text_document.bin")
    (tmp_path / "text_document.idx").write_bytes(index)
    lm = ids_task(f"{tmp_path / 'text_document'},valid=0.2,test=0.1", tmp_path / "cache")
    assert [lm.tokens.splits[split].ends.tolist() for split in SPLITS] == [[700, 2000, 2800], [800], [400]]
    np.testing.assert_array_equal(np.asarray(lm.tokens.splits["train"].data), IDS[:2800])
    (tmp_path / "text_document.idx").write_bytes(index[:-8])
    with pytest.raises(UserError, match=r"text_document\.idx has 126 bytes instead of 134"):
        ids_task(tmp_path / "text_document", tmp_path / "cache")
    for wrong in ((0, 1, 3, 4, 6), (0, 3, 1, 4, 5)):
        (tmp_path / "text_document.idx").write_bytes(index[:-40] + struct.pack("<5q", *wrong))
        with pytest.raises(UserError, match=r"text_document\.idx: documents do not follow each other"):
            ids_task(tmp_path / "text_document", tmp_path / "cache")
    (tmp_path / "text_document.idx").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match=r"text_document\.idx is no index of Megatron"):
        ids_task(tmp_path / "text_document", tmp_path / "cache")


def test_hugging_face_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package `datasets`: pip install -r requirements-hf\.txt"):
        corpora.load("hf:some/data", str(tmp_path))


def test_hugging_face_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="optional, see requirements-hf.txt")
    parts = {"train": TEXTS[:150], "validation": [*TEXTS[150:], None, ""]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"body": v}) for k, v in parts.items()}).save_to_disk(
        tmp_path / "d"
    )
    found = corpora.load(f"hf:{tmp_path / 'd'},field=body", str(tmp_path / "cache"))
    assert documents(found.splits["valid"]) == TEXTS[150:]
    assert documents(found.splits["test"]) == [t for t in TEXTS[:150] if place(t) < 0.05]
    with pytest.raises(UserError, match="there is no column 'text'"):
        corpora.load(f"hf:{tmp_path / 'd'}", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="there is no split 'dev'"):
        corpora.load(f"hf:{tmp_path / 'd'},field=body,valid=dev", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot be read .*--config\.task\.download=True"):
        corpora.load("hf:nobody/nothing", str(tmp_path / "cache"))
