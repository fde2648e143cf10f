"""Runs of several processes: their numbers, how they end, and how they go on in another number."""

import json
import pathlib
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from tests import processes, texts
from training import command_line, loop
from training.checkpoints import Checkpoints
from training.config import resolve


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return texts.words(tmp_path_factory.mktemp("corpus") / "text.txt")


def flags(text, **more):
    options = {
        "task.corpus": f"file:{text}",
        "task.length": 16,
        "model.width": 8,
        "model.depth": 1,
        "optimizer.warmup_steps": 2,
        "train.steps": 16,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.checkpoint_every": 4,
        "train.eval_batches": 1,
    }
    return ["--config=configs/lm.py:mixer=gla", *(f"--config.{key}={value}" for key, value in (options | more).items())]


def train(text, workdir, count=2, meanwhile=lambda processes: None, environments=None, program=(), **more):
    begin = list(program) or ["train.py"]
    command = [*begin, "--distributed", *flags(text, **more), f"--workdir={workdir}"]
    return processes.run([command] * count, environments, meanwhile)


def alone(text, workdir, **more):
    """The same in this process, which has eight devices."""
    return loop.train(resolve(command_line.parse(flags(text, **more))), workdir)


def losses(workdir) -> dict[int, float]:
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def after(step, workdir, number, which):
    """Sends a signal to one of the processes when a step has been recorded."""

    def send(started: list[subprocess.Popen]) -> None:
        record = pathlib.Path(workdir, "metrics.jsonl")
        while all(process.poll() is None for process in started):
            if record.exists() and len(record.read_text().splitlines()) >= step:
                started[which].send_signal(number)
                return
            time.sleep(0.02)

    return send


def close(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(
        list(found.values()), [expected[step] for step in found], rtol=1e-3
    )  # batches differ by 1e-2


@pytest.mark.hosts
def test_terminated_and_resumed_elsewhere(text, tmp_path):
    """Two processes train as one does; SIGTERM to one saves the run of both; and one process of eight devices goes on with it."""
    layout = {"mesh.fsdp": 2, "mesh.data": 1}
    ends = train(text, tmp_path / "run", meanwhile=after(3, tmp_path / "run", signal.SIGTERM, 1), **layout)
    assert [end.status for end in ends] == [75, 75], ends
    stopped = Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1]
    assert 3 <= stopped < 16 and f"stopped at step {stopped}" in ends[0].out
    assert "step" not in ends[1].out  # process 0 alone reports
    elsewhere = {"mesh.fsdp": 1, "mesh.data": 8}
    assert alone(text, tmp_path / "run", **elsewhere).finished
    alone(text, tmp_path / "whole", **elsewhere)
    close(losses(tmp_path / "run"), losses(tmp_path / "whole"))


@pytest.mark.hosts
def test_killed_and_resumed(text, tmp_path):
    """kill -9 of either process ends the other, in one sentence. The run goes on bit for bit in its layout, on four closely."""
    train(text, tmp_path / "whole")
    for which in (1, 0):
        ends = train(text, tmp_path / "run", meanwhile=after(11 - 6 * which, tmp_path / "run", signal.SIGKILL, which))
        assert [end.status for end in ends] == [[-9, 75], [75, -9]][which], ends
        assert f"process {which} on {socket.gethostname()} has gone without a word" in ends[1 - which].err
        assert "Traceback" not in ends[1 - which].err
    assert [end.status for end in train(text, tmp_path / "run")] == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    train(text, tmp_path / "more", meanwhile=after(5, tmp_path / "more", signal.SIGTERM, 0))
    four = train(text, tmp_path / "more", count=4, **{"mesh.data": 2, "mesh.fsdp": 2})
    assert [end.status for end in four] == [0] * 4, four
    close(losses(tmp_path / "more"), losses(tmp_path / "whole"))


@pytest.mark.hosts
def test_an_exception_on_one_host(text, tmp_path):
    """The traceback of that host is the first thing that both print, and both end: though its next row never comes."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\n"
        "import train\n"
        "from common import command\n"
        "from data.tasks import language_model\n"
        "row = language_model.LanguageModel.row\n"
        "def broken(self, split, index, epoch, seed):\n"
        "    broken.rows += 1\n"
        "    if os.environ['JAX_PROCESS_ID'] == '1' and broken.rows == 100:\n"
        "        raise OSError('the disk of this host is broken')\n"
        "    if os.environ['JAX_PROCESS_ID'] == '1' and broken.rows > 100:\n"
        "        time.sleep(3600)\n"
        "    return row(self, split, index, epoch, seed)\n"
        "broken.rows = 0\n"
        "language_model.LanguageModel.row = broken\n"
        "command.run(train.main)\n"
    )
    ends = train(text, tmp_path / "run", program=[program])
    assert [end.status for end in ends] == [1, 1], ends
    assert all("OSError: the disk of this host is broken" in end.err for end in ends)
    assert ends[1].err.lstrip().startswith("Traceback") and "process 1 on" in ends[0].err


@pytest.mark.hosts
def test_what_is_refused(text, tmp_path):
    """Other data on one host; a disk of its own; a run that others are at work on. One message each, and nothing is begun."""
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
        (home / "text.txt").write_text(text.read_text())
    environments = [{"HOME": str(home), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")} for home in homes]
    ends = train("~/text.txt", "~/run", environments=environments)
    assert [end.status for end in ends] == [1, 1] and "on a disk that all hosts see" in ends[0].err, ends
    (homes[1] / "text.txt").write_text(text.read_text()[:-20])
    ends = train("~/text.txt", tmp_path / "run", environments=environments)
    assert [end.status for end in ends] == [1, 1] and "  data (fingerprint): " in ends[0].err, ends
    assert not (tmp_path / "run").exists()

    seen = []

    def second(started):
        after(3, tmp_path / "run", 0, 0)(started)
        seen.extend(train(text, tmp_path / "run"))
        started[0].send_signal(signal.SIGTERM)

    ends = train(text, tmp_path / "run", meanwhile=second, **{"train.steps": 100_000})
    assert [end.status for end in ends] == [75, 75], ends
    assert [end.status for end in seen] == [1, 1] and "is at work in" in seen[0].err, seen


@pytest.mark.hosts
def test_scores(text, tmp_path):
    """Several processes score a run as one does; the floors are found, and all is printed, by one."""
    from evaluation import loading, scoring

    alone(text, tmp_path / "run", **{"mesh.data": 8})
    command = ["eval.py", "--distributed", f"--workdir={tmp_path / 'run'}", "--split=valid"]
    ends = processes.run([command] * 2)
    assert [end.status for end in ends] == [0, 0], ends
    ((_, found),) = scoring.score(loading.load(tmp_path / "run"), "valid")
    assert f"{found['bits_per_byte']:.4f} bits per byte" in ends[0].out and "5-gram" in ends[0].out
    assert "bits" not in ends[1].out


@pytest.mark.hosts
def test_terminated_between_steps(text, tmp_path):
    """SIGTERM to a process that makes no steps, but scores: both end at once. So they do when all steps are done."""
    program, begun = tmp_path / "program.py", tmp_path / "begun"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "import jax\n"
        "from common import command, hosts\n"
        "from training.stopping import GracefulStop\n"
        "def main(arguments):\n"
        "    command.start(True)\n"
        "    with GracefulStop() as stop:\n"
        "        assert not stop.requested(1)\n"
        "    if arguments:\n"
        "        hosts.leave()\n"
        f"    pathlib.Path({str(begun)!r} + str(jax.process_index())).touch()\n"
        "    time.sleep(3600)\n"
        "command.run(main)\n"
    )

    def terminate(which):
        def send(started):
            marks = [pathlib.Path(f"{begun}{i}") for i in range(2)]
            while not all(mark.exists() for mark in marks) and all(one.poll() is None for one in started):
                time.sleep(0.02)
            for mark in marks:
                mark.unlink(missing_ok=True)
            for i in which:
                started[i].send_signal(signal.SIGTERM)

        return send

    for arguments, which in ([], [1]), (["left"], [0, 1]):
        ends = processes.run([[program, *arguments]] * 2, meanwhile=terminate(which))
        assert [end.status for end in ends] == [75, 75] and all("stopped" in end.err for end in ends), ends
        assert "Traceback" not in ends[0].err + ends[1].err, ends
