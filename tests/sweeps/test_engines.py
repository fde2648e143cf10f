"""The driver that all engines share, and processes of this machine that run cells, with programs of a line each."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.lock import FILE, held, locked
from sweeps import driver, jobs
from sweeps.cells import Cell
from sweeps.driver import drive
from sweeps.engine import Engine, Resources, Seen
from sweeps.engines.commands import Commands
from sweeps.engines.local import Local
from sweeps.jobs import Submitted

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Script(Cell):
    """A cell whose work is a Python text, done when it has made the file `done`; it diverges if it makes `diverged`."""

    text: str = ""

    def todo(self):
        return () if (self.workdir / "done").exists() or self.diverged() else ("train",)

    def diverged(self):
        return "loss is nan" if (self.workdir / "diverged").exists() else None


# Stands for `sweep.py --cell`: it records the attempt, and does what the cell's text says.
CELL = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from sweeps import jobs
from common.lock import locked
cell = pathlib.Path(sys.argv[1])
text = (cell / "text.py").read_text()
if "EARLY" in text:
    sys.exit("error: no such module")
with locked(jobs.folder(cell), "process"), jobs.attempt(cell) as record:
    def end(status, error=None, code=1):
        record.update(status=status, error=error)
        sys.exit(code)
    def done():
        (cell / "done").touch()
        end("finished", code=0)
    def wait(path):
        while not (cell.parent / path).exists():
            time.sleep(0.01)
    exec(text)
"""
STOPPABLE = """
import signal
signal.signal(signal.SIGTERM, lambda *_: end("interrupted", code=75))
(cell / "on").touch()
time.sleep(60)
"""


class Scripts(Local):
    """Runs them."""

    name = "local"
    poll = 0.02

    def command(self, cell):
        return [sys.executable, "-c", CELL, str(cell)]


def script(folder, name, text):
    cell = Script({}, (), folder / name, {}, text=text)
    cell.save()
    (cell.workdir / "text.py").write_text(text)
    return cell


def test_local_processes(tmp_path):
    """Cells side by side; a failure stops nothing but its cell; what was stopped or lost is tried again, within a budget."""
    again = "done() if len(jobs.attempts(cell)) == 2 else {}"
    todo = [
        script(tmp_path, "a", "(cell / 'on').touch(); wait('b/on'); done()"),  # each of the two waits for the other
        script(tmp_path, "b", "(cell / 'on').touch(); wait('a/on'); done()"),
        script(tmp_path, "bad", "end('failed', 'it broke')"),
        script(tmp_path, "early", "EARLY"),
        script(tmp_path, "dead", "os.kill(os.getpid(), 9)"),
        script(tmp_path, "stopped", again.format("end('interrupted', code=75)")),
        script(tmp_path, "killed", again.format("os.kill(os.getpid(), 15)")),
        script(tmp_path, "always", "end('interrupted', code=75)"),
        script(tmp_path, "wild", "(cell / 'diverged').touch(); end('diverged')"),
    ]
    found = {r.cell.name: (r.status, r.error) for r in drive(Scripts(tmp_path, workers=2), todo, retries=1)}
    assert found == {
        "a": ("finished", None),
        "b": ("finished", None),
        "bad": ("failed", "it broke"),
        "early": ("failed", "it ended with 1 before it had begun: no such module"),
        "dead": ("failed", "killed by SIGKILL, perhaps for want of memory"),
        "stopped": ("finished", None),
        "killed": ("finished", None),
        "always": ("interrupted", None),
        "wild": ("diverged", "loss is nan"),
    }
    tries = {cell.name: len(jobs.attempts(cell.workdir)) for cell in todo}
    once = ("a", "b", "bad", "dead", "wild")
    assert tries == dict.fromkeys(once, 1) | {"early": 0, "stopped": 2, "killed": 2, "always": 2}
    assert jobs.attempts(tmp_path / "killed")[0].status == "lost"


def test_stopping(tmp_path):
    """The first signal goes on to the cells, and no other is started; the directory is locked until they have ended."""
    todo = [script(tmp_path, name, STOPPABLE) for name in ("a", "b", "never")]
    blocked = []

    def disturb():
        while not all((tmp_path / name / "on").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=disturb).start()
    results = []
    for result in drive(Scripts(tmp_path, workers=2), todo):
        results.append(result)
        with pytest.raises(UserError, match="another sweep"):
            list(drive(Scripts(tmp_path), todo))
        blocked.append(True)
    assert {(r.cell.name, r.status) for r in results} == {("a", "interrupted"), ("b", "interrupted")} and blocked
    assert not (tmp_path / "never" / "on").exists()


def test_what_a_killed_sweep_left_behind_is_adopted(tmp_path):
    cell = script(tmp_path, "a", "wait('go'); done()")
    process = subprocess.Popen(Scripts(tmp_path).command(cell.workdir))
    Submitted("local", str(process.pid)).write(cell.workdir)
    while not held(jobs.folder(cell.workdir)):
        time.sleep(0.01)
    threading.Timer(0.3, (tmp_path / "go").touch).start()
    (result,) = drive(Scripts(tmp_path), [cell])
    assert result.status == "finished" and len(jobs.attempts(cell.workdir)) == 1
    process.wait()


def test_a_process_of_another_machine_is_not_killed_here(tmp_path, monkeypatch, capsys):
    """Its number is that of somebody else's here."""
    cell, sent = script(tmp_path, "a", ""), []
    monkeypatch.setattr("os.kill", lambda *given: sent.append(given))
    with locked(jobs.folder(cell.workdir), "process"):
        (jobs.folder(cell.workdir) / FILE).write_text(json.dumps({"host": "elsewhere", "process": os.getpid()}))
        for stop in (Scripts(tmp_path).cancel, Scripts(tmp_path).kill):
            stop({"17": cell.workdir})
            assert not sent and "a is at work on elsewhere: stop it there" in capsys.readouterr().out


def test_workers_share_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    text = "(cell / 'seen').write_text(os.environ['CUDA_VISIBLE_DEVICES']); "
    todo = [script(tmp_path, "a", text + "wait('b/seen'); done()"), script(tmp_path, "b", text + "done()")]
    assert {r.status for r in drive(Scripts(tmp_path, workers=2), todo)} == {"finished"}
    assert (tmp_path / "a" / "seen").read_text() == "3,5" and (tmp_path / "b" / "seen").read_text() == "4"


class Cluster(Engine):
    """A cluster whose jobs outlive commands: a dict of states that the test moves on, kept in a file."""

    name = "cluster"
    poll = 0.0

    @property
    def file(self):
        return self.workdir / "cluster.json"

    def all(self):
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def submit(self, cells, retries):
        known = self.all()
        made = [f"{len(known) + i}" for i in range(len(cells))]
        self.file.write_text(json.dumps(known | dict.fromkeys(made, "queued")))
        return made

    def states(self, given):
        return {name: Seen(self.all()[name]) for name in given}

    def cancel(self, given):
        self.file.write_text(json.dumps(self.all() | dict.fromkeys(given, "cancelled")))

    def end(self, cell, status, error=None):
        """What happens on the cluster."""
        job = jobs.submitted(cell.workdir)
        if status != "lost":
            with jobs.attempt(cell.workdir) as record:
                record |= {"status": status, "error": error}
        if status == "finished":
            (cell.workdir / "done").touch()
        self.file.write_text(json.dumps(self.all() | {job.id: "ended"}))


def test_leaving_and_coming_back(tmp_path):
    """Jobs are submitted once; what has ended meanwhile is told once; what failed is run again by the command after that."""
    grid = [script(tmp_path, name, "") for name in ("good", "bad", "slow", "gone", "stopped")]
    good, bad, slow, gone, stopped = grid

    def command(retries=1):
        left = [cell for cell in grid if cell.todo()]
        return {r.cell.name: (r.status, r.error) for r in drive(Cluster(tmp_path), left, retries, detach=True)}

    def ids():
        return [jobs.submitted(cell.workdir).id for cell in grid]

    assert command() == {} and ids() == ["0", "1", "2", "3", "4"]
    assert command() == {} and ids() == ["0", "1", "2", "3", "4"], "they are adopted"
    assert driver.status(slow) == "queued (cluster 2)"
    cluster = Cluster(tmp_path)
    cluster.end(good, "finished")
    cluster.end(bad, "failed", "no such corpus")
    cluster.end(gone, "lost")
    cluster.end(stopped, "interrupted")
    assert command() == {"bad": ("failed", "no such corpus")} and ids() == ["0", "1", "2", "5", "6"]
    assert driver.status(good) == "finished" and driver.status(bad) == "failed: no such corpus"
    cluster.end(gone, "lost")
    cluster.end(stopped, "finished")
    assert command() == {"gone": ("interrupted", "the job was lost")}, "its budget is spent"
    assert ids() == ["0", "7", "2", "5", "6"], "and what has failed is tried anew"
    assert driver.cancel(cluster, grid) == 2
    assert command() == {"slow": ("interrupted", None), "bad": ("interrupted", None)}
    assert ids()[3] == "8" and jobs.submitted(gone.workdir).tries == 1


def test_what_is_at_work_elsewhere_is_left_alone(tmp_path):
    cell = script(tmp_path, "a", "done()")
    Submitted("cluster", "17").write(cell.workdir)
    with jobs.attempt(cell.workdir) as record:
        while not jobs.alive(cell.workdir):
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"is at work with --engine=cluster \(17\)"):
            list(drive(Scripts(tmp_path), [cell]))
        record |= {"status": "interrupted", "error": None}
    assert [outcome.status for outcome in drive(Scripts(tmp_path), [cell])] == ["finished"]


def test_processes_that_are_lost_together(tmp_path):
    """Of several hosts, an abort is that of JAX, which has lost another; what fails on another host has failed."""
    cell = script(tmp_path, "a", "")
    job = Submitted("cluster", "1")
    with jobs.attempt(cell.workdir):
        aborted = [json.loads(line) for line in (jobs.folder(cell.workdir) / "attempts.jsonl").read_text().splitlines()]
    (jobs.folder(cell.workdir) / "attempts.jsonl").write_text(json.dumps(aborted[0]) + "\n")
    jobs.write_exit_code(cell.workdir, 128 + signal.SIGABRT)
    outcome, again = driver.judged(cell, job, Seen("ended"))
    assert (outcome.status, outcome.error, again) == ("failed", "killed by SIGABRT", False)
    several = dataclasses.replace(cell, hosts=2)
    assert driver.judged(several, job, Seen("ended"))[1]
    jobs.write_error(cell.workdir, 1, "no such corpus")
    outcome, again = driver.judged(several, job, Seen("ended"))
    assert (outcome.status, outcome.error, again) == ("failed", "process 1: no such corpus", False)
    os.utime(jobs.folder(cell.workdir) / "error.json", (100, 100))
    assert driver.judged(several, job, Seen("ended"))[1], "that was of an earlier attempt"


def test_commands_are_written(tmp_path):
    """Of what has something left to do, to be run by whatever there is."""
    good, bad = (script(tmp_path, name, "") for name in ("it's good", "bad"))
    engine = Commands(tmp_path)
    assert list(drive(engine, [good, bad])) == []
    (line, _) = (tmp_path / "commands.txt").read_text().splitlines()
    program, cell = shlex.split(line)[-2:]
    assert program == str(ROOT / "sweep.py") and cell == f"--cell={good.workdir}"
    with jobs.attempt(good.workdir) as record:
        (good.workdir / "done").touch()
        record |= {"status": "finished", "error": None}
    with jobs.attempt(bad.workdir) as record:
        record |= {"status": "interrupted", "error": None}
    assert list(drive(engine, [bad])) == [] and len((tmp_path / "commands.txt").read_text().splitlines()) == 1


def test_attempts(tmp_path):
    """A line that a crash has cut is nothing; of an attempt that was killed the last sign of life counts."""
    cell = script(tmp_path, "a", "")
    with pytest.raises(KeyError), jobs.attempt(cell.workdir):
        raise KeyError
    record = jobs.folder(cell.workdir) / "attempts.jsonl"
    with record.open("a") as file:
        file.write(json.dumps({"began": 100.0, "host": "here"}) + '\n{"sta')
    os.utime(jobs.folder(cell.workdir) / "alive", (160, 160))
    first, second = jobs.attempts(cell.workdir)
    assert (first.status, first.error) == ("failed", "it ended without a word") and first.seconds < 60
    assert second.seconds == 60 and second.status is None
    assert driver.status(cell).startswith("no sign of life for ")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"hosts": 0}, "--hosts must be at least 1"),
        ({"minutes": 0}, "--minutes must be at least 1"),
        ({"accelerators": "a100"}, "NUMBER or KIND:NUMBER"),
        ({"accelerators": "a100:0"}, "NUMBER or KIND:NUMBER"),
        ({"accelerators": ":4"}, "NUMBER or KIND:NUMBER"),
    ],
)
def test_resources(given, message):
    with pytest.raises(UserError, match=message):
        Resources(**given)
    resources = Resources(accelerators="nvidia:a100:4")
    assert (resources.kind, resources.count) == ("nvidia:a100", "4") and Resources(accelerators="8").kind == ""
