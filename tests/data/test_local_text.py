"""What is read of a file or a folder, and what is said of the rest."""

import gzip

import pytest

from common.errors import UserError
from data import corpora, local_text

# Files that are no text, and what the message says of them.
REFUSED = {
    "nul.dat": (b"\1\0" + b"text" * 9, "has bytes that are 0 and so is no text"),
    "ids.bin": (b"\1\0" * 9, "is no text; if it holds token ids, read it with corpus='bin:PATH'"),
    "notepad.txt": ("Größe\n".encode("utf-16"), r"is UTF-16: .*\(iconv -f UTF-16 -t UTF-8\)"),
    "wide.txt": ("no mark".encode("utf-16-le"), "is UTF-16LE: "),
    "wider.txt": ("no mark".encode("utf-16-be"), "is UTF-16BE: "),
    "widest.txt": ("\ufeffmark".encode("utf-32-le"), "is UTF-32LE: "),
    "text.txt.gz": (gzip.compress(b"text"), r"is compressed: unpack it first \(gunzip\)"),
    "renamed.txt": (gzip.compress(b"text"), r"is compressed: unpack it first \(gunzip\)"),
    "text.zst": (b"\x28\xb5\x2f\xfd", r"is compressed: .*\(unzstd\)"),
    "texts.zip": (b"PK\3\4", r"is compressed: .*\(unzip\)"),
    "table.parquet": (b"PAR1", "is a table: read it with corpus='parquet:PATH'"),
    "rows.jsonl": (b'{"url": "a"}\n', "holds JSON: read it with corpus='jsonl:PATH'"),
    "rows.json": (b'[\n  {"text": "a"}\n]', "holds JSON: read it with corpus='jsonl:PATH'"),
    "rows.txt": (
        b'{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n',
        "holds JSON: read it with corpus='jsonl:PATH'",
    ),
    "rows.jsonl.gz": (gzip.compress(b'{"text": "a"}\n'), "is compressed JSON: read it with corpus='jsonl:PATH'"),
}


def read(path):
    """The text of the files that are text."""
    texts, told = local_text.sift(local_text.find(path))
    local_text.say_once(told)
    assert all(file.stat().st_size == size for file, size in texts)
    return [file.read_bytes() for file, _ in texts]


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_text_is_refused(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {message}"):
        corpora.load(f"file:{tmp_path / name}")
    with pytest.raises(UserError, match=rf"holds no text file; (.*\n)+  left out: 1 \({name}\): {message}"):
        corpora.load(f"file:{tmp_path}")


@pytest.mark.parametrize("text", ["{braces} here\n{and} there\n", '{"json": 1}\n', "Größe", "", "plain\r\ntext"])
def test_text_is_text(tmp_path, text):
    (tmp_path / "text").write_bytes(text.encode())
    assert read(tmp_path / "text") == [text.encode()]


def test_a_folder_is_read_in_order_of_names_and_said_once(tmp_path, capsys):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path, content in {
        root / "b.txt": b"second",
        root / "a" / "z.txt": b"first",
        root / ".hidden": b"no",
        root / ".git" / "config": b"no",
        root / "c.dat": b"\1\0" + b"text" * 9,
        root / "utf16.txt": "no".encode("utf-16"),
        root / "d.txt": b"",
        root / "e.txt": b"third",
        outside / "deep" / "f.txt": b"linked",
    }.items():
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
    (root / "f").symlink_to(outside)  # is followed
    (root / "inside").symlink_to(root / "a")
    (outside / "deep" / "back").symlink_to(root)
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "g.txt").symlink_to(outside / "deep" / "f.txt")
    for _ in range(2):
        assert read(root) == [b"first", b"second", b"", b"third", b"linked", b"linked"]
    said = capsys.readouterr().out
    assert said.startswith(f"{root}: 6 files, 28 bytes\n") and said.count(f"{root}: ") == 1
    for line in (
        "2 (.git, .hidden): hidden",
        "2 (f/deep/back, inside): links to a folder that is read already",
        "1 (broken): no file: a broken link or a device",
        "1 (c.dat): has bytes that are 0 and so is no text",
        "1 (utf16.txt): is UTF-16: convert it to UTF-8",
    ):
        assert f"\n  left out: {line}" in said


def test_many_names_are_counted(tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"text")
    for i in range(7):
        (tmp_path / f".{i}").touch()
    read(tmp_path)
    assert "left out: 7 (.0, .1, .2, .3, .4 and 2 more): hidden" in capsys.readouterr().out


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"text")

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(local_text, "open", refuse, raising=False)
    for path in (tmp_path / "text", tmp_path):
        with pytest.raises(UserError, match=r"/text cannot be read \(Permission denied\)"):
            read(path)
    monkeypatch.setattr(local_text.pathlib.Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"the folder .* cannot be read \(Permission denied\)"):
        read(tmp_path)
