"""How programs end: what a user can mend is one message, a fault of the program keeps its traceback."""

import signal

import pytest

from common import command
from common.errors import UserError


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


def test_how_long_processes_wait_for_each_other_is_a_time():
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--start_seconds must be from 1 to 86400"):
            command.start({"distributed": True, "start_seconds": seconds})
    with pytest.raises(UserError, match="--process_id is for one of several processes: give --distributed"):
        command.start({"distributed": False, "process_id": "1"})
