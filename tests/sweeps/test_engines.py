"""Processes of this machine that run cells, with programs of a line each."""

import dataclasses
import os
import signal
import sys
import threading
import time

import pytest

from common.errors import UserError
from sweeps.cells import Cell, Step
from sweeps.engines.local import Local


@dataclasses.dataclass(frozen=True)
class Script(Cell):
    """A cell whose steps are Python texts, each done when it has made its file; they diverge if they make another."""

    texts: tuple[str, ...] = ()

    def todo(self):
        files = [self.workdir / f"{i}" for i in range(len(self.texts))]
        return [Step("-c", (text, str(file))) for text, file in zip(self.texts, files) if not file.exists()]

    def diverged(self):
        return "loss is nan" if (self.workdir / "0-diverged").exists() else None


class Scripts(Local):
    """Runs them."""

    def command(self, step):
        return [sys.executable, step.program, *step.arguments]


DONE = "import sys; open(sys.argv[1], 'w')"
WAIT = "import os, time; [time.sleep(.01) for _ in iter(lambda: os.path.exists(other), True)]; "


def script(folder, name, *texts):
    return Script({}, (), folder / name, {}, texts=texts)


def test_local_processes(tmp_path):
    """Steps in order, cells side by side; a failure is its last error, and stops nothing but its cell."""
    # Each of the first two waits for the other, so they must run at the same time.
    meet = "me, other = {!r}, {!r}; open(me, 'w'); " + WAIT + DONE
    a, b = str(tmp_path / "a-was-here"), str(tmp_path / "b-was-here")
    todo = [
        script(tmp_path, "a", meet.format(a, b), DONE),
        script(tmp_path, "b", meet.format(b, a)),
        script(tmp_path, "bad", DONE, "print('about to'); raise ValueError('it broke')"),
        script(tmp_path, "said", "import sys; sys.exit('error: no such thing')"),
        script(tmp_path, "dead", "import os; os.kill(os.getpid(), 9)"),
        script(tmp_path, "idle", "pass"),
        script(tmp_path, "stopped", "import sys; sys.exit(75)"),
        script(tmp_path, "killed", "import os; os.kill(os.getpid(), 15)"),
        script(tmp_path, "wild", "import sys; open(sys.argv[1] + '-diverged', 'w'); sys.exit('error: diverged')"),
    ]
    found = {r.cell.name: (r.status, r.error) for r in Scripts(tmp_path, 2).run(todo)}
    assert found == {
        "a": ("finished", None),
        "b": ("finished", None),
        "bad": ("failed", "ValueError: it broke (<string>, line 1, in <module>)"),
        "said": ("failed", "no such thing"),
        "dead": ("failed", "killed by SIGKILL, perhaps for want of memory"),
        "idle": ("failed", "it ended without having done its work: it printed nothing"),
        "stopped": ("interrupted", None),
        "killed": ("interrupted", None),
        "wild": ("diverged", "loss is nan"),
    }
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert "about to" in log and "Traceback" in log


def test_stopping(tmp_path):
    """The first signal goes on to the cells, and no other is started; the directory is locked until they have ended."""
    wait = "import sys, time; open(sys.argv[1] + '-on', 'w'); time.sleep(60)"
    todo = [script(tmp_path, name, wait) for name in ("a", "b", "never")]
    blocked = []

    def disturb():
        while not all((tmp_path / name / "0-on").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    engine = Scripts(tmp_path, 2)
    threading.Thread(target=disturb).start()
    results = []
    for result in engine.run(todo):
        results.append(result)
        with pytest.raises(UserError, match="another sweep"):
            list(Scripts(tmp_path, 1).run(todo))
        blocked.append(True)
    assert {(r.cell.name, r.status) for r in results} == {("a", "interrupted"), ("b", "interrupted")} and blocked
    assert not (tmp_path / "never").exists()


def test_workers_share_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    text = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    wait = f"other = {str(tmp_path / 'b' / '0')!r}; " + WAIT + DONE
    todo = [script(tmp_path, "a", text, wait), script(tmp_path, "b", text)]
    assert {r.status for r in Scripts(tmp_path, 2).run(todo)} == {"finished"}
    assert (tmp_path / "a" / "0").read_text() == "3,5" and (tmp_path / "b" / "0").read_text() == "4"
