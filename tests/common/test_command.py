"""How programs end: what a user can mend is one message, a fault of the program keeps its traceback."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from common import command
from common.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_handler():
    """Of the process that runs the tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ends(main, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "--one", "two"])
    with pytest.raises(SystemExit) as end:
        command.run(main)
    return end.value.code, capsys.readouterr().err


def test_statuses(capsys, monkeypatch):
    def wrong(arguments):
        raise UserError("change this")

    def broken(arguments):
        raise ValueError("Size of label 'k' does not match")

    assert ends(lambda arguments: None, capsys, monkeypatch) == (None, "")
    assert ends(lambda arguments: command.STOPPED, capsys, monkeypatch) == (75, "")
    assert ends(lambda arguments: len(arguments), capsys, monkeypatch)[0] == 2

    def interrupted(arguments):
        raise KeyboardInterrupt

    def terminated(arguments):
        signal.raise_signal(signal.SIGTERM)

    assert ends(interrupted, capsys, monkeypatch) == (75, "stopped\n")
    assert ends(terminated, capsys, monkeypatch) == (75, "stopped\n")
    assert ends(wrong, capsys, monkeypatch) == (1, "error: change this\n")
    with pytest.raises(ValueError, match="Size of label"):
        command.run(broken)


def test_the_parser_raises_user_errors():
    parser = command.Parser("What it does.", prog="program")
    parser.add_argument("--length", type=int)
    assert parser.parse_args(["--length=3"]).length == parser.parse_args(["--length=3"]).length == 3
    for arguments in (["--length=x"], ["--lengt=3"], ["16"], ["--length"], ["--length=3", "--length=4"]):
        with pytest.raises(UserError, match=r"program --help tells"):
            parser.parse_args(arguments)


def test_files_that_cannot_be_written_are_told_first(tmp_path):
    parser = command.Parser("")
    parser.add_argument("--json", type=command.new_file, default="")
    assert parser.parse_args([]).json is None
    assert parser.parse_args([f"--json={tmp_path}/new.json"]).json == tmp_path / "new.json"
    for text, message in ((f"{tmp_path}/none/x.json", "make it first"), (f"{tmp_path}", "takes the name of a file")):
        with pytest.raises(UserError, match=message):
            parser.parse_args([f"--json={text}"])


def test_how_long_processes_wait_for_each_other_is_a_time():
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--start_seconds must be from 1 to 86400"):
            command.start({"distributed": True, "start_seconds": seconds})
    with pytest.raises(UserError, match="--process_id is for one of several processes: give --distributed"):
        command.start({"distributed": False, "process_id": "1"})


def test_what_the_machine_refuses_is_one_message(capsys, monkeypatch):
    """Wherever it is met; what may be a fault of the program keeps its traceback."""

    def raises(number, name):
        def main(arguments):
            raise OSError(number, os.strerror(number), name)

        return main

    for number, name, said in (
        (errno.ENOSPC, None, "No space left on device"),
        (errno.EDQUOT, "/run/file", "/run/file: Disk quota exceeded"),
        (errno.ENAMETOOLONG, "/run/file", "/run/file: File name too long"),
        (errno.EROFS, "/run/file", "/run/file: Read-only file system"),
    ):
        assert ends(raises(number, name), capsys, monkeypatch) == (1, f"error: {said}\n")
    for number, name in ((errno.ENOENT, "/run/file"), (errno.EPERM, None), (errno.EPIPE, None)):
        with pytest.raises(OSError):
            command.run(raises(number, name))


PROGRAM = """
import os, sys
from common import command
from common.errors import UserError

def main(arguments):
    with open(os.devnull) as file:
        assert file.fileno() > 2, "a file has the number of a standard stream"
    print("ä – 中")
    sys.stdout.write(str(sys.stdin.read()))
    if arguments[0] == "wrong":
        raise UserError("change this – now")
    return int(arguments[0])

command.run(main)
"""


@pytest.mark.parametrize(
    "argument, streams, status, said",
    [
        ("0", "2>err >/dev/full", 1, "error: what is printed cannot be written (No space left on device)"),
        ("75", "2>err | true", 1, "error: what is printed cannot be written (Broken pipe)"),
        ("75", "<&- >&- 2>&-", 75, ""),
        ("wrong", "2>&-", 1, ""),
        ("wrong", "2>/dev/full", 1, ""),
        ("wrong", "2>err", 1, r"error: change this \u2013 now"),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path, argument, streams, status, said):
    """The status is one of ours, and no file of the program gets the number of a stream."""
    (tmp_path / "program.py").write_text(PROGRAM)
    shell = f"sleep 0.2 | {sys.executable} program.py {argument} {streams}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    options = {"shell": True, "executable": "/bin/bash", "cwd": tmp_path, "env": environment, "capture_output": True}
    ended = subprocess.run(f"{shell}; exit ${{PIPESTATUS[1]}}", text=True, **options)
    assert ended.returncode == status, ended
    assert said in ((tmp_path / "err").read_text() if "err" in streams else "")


@pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0), reason="CPython 3.13.0 cannot import its own socket module there"
)
def test_a_directory_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os; os.rmdir({str(gone)!r}); from common import command; command.run(lambda arguments: 0)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=gone, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: the current directory is not there any more")
