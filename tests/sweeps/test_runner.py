"""One cell where it is: how it ends, and what is recorded of it."""

import dataclasses
import math

import numpy as np
import pytest

import sweep as entry
from common import hosts
from common.command import STOPPED
from sweeps import cells, jobs, runner
from sweeps.request import Request
from training import loop

SETTINGS = {
    "mixer": "min_gru",
    "task.length": "16",
    "model.width": "16",
    "model.depth": "1",
    "train.steps": "4",
    "train.batch_size": "8",
    "train.log_every": "1",
    "train.eval_batches": "2",
    "optimizer.warmup_steps": "1",
}


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell")
    corpus = folder / "text.txt"
    corpus.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)))
    settings = {"corpus": f"file:{corpus}", **SETTINGS}
    (made,) = cells.plan(Request("configs/lm.py", {"seed": ["0"]}, folder / "sweep", settings))
    made.save()
    return made


def test_how_a_cell_ends(cell, monkeypatch, capsys):
    """A bug keeps its traceback, and its place is recorded; a lost run is stopped; what was stopped goes on to the end."""

    def broken(*_, **__):
        raise ValueError("shapes do not fit")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", broken)
        assert runner.run(cell) == 1
    assert "Traceback" in capsys.readouterr().err
    failed = jobs.attempts(cell.workdir)[-1]
    assert failed.status == "failed" and "shapes do not fit (tests/sweeps/test_runner.py, line" in failed.error
    with monkeypatch.context() as patch:
        patch.setattr(runner.Watch, "judge", lambda self, step, *_: "it is lost" if step == 2 else None)
        assert runner.run(cell) == 1
    assert jobs.attempts(cell.workdir)[-1].status == "diverged" and cell.diverged() == "it is lost"
    assert cell.todo() == () and (cell.workdir / "checkpoints" / "2").is_dir()
    with jobs.attempt(cell.workdir) as record:  # somebody thinks better of it
        record |= {"status": "interrupted", "error": None}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda *_, **__: loop.Ended({}, False))
        assert runner.run(cell) == STOPPED
    assert cell.todo() == ("train", "score")
    assert runner.run(cell) == 0 and cell.result()["step"] == 4
    assert [attempt.status for attempt in jobs.attempts(cell.workdir)][-1] == "finished"


@pytest.mark.parametrize("by, ended", [(KeyboardInterrupt(), [(STOPPED, "stopped")]), (None, [])])
def test_who_stops_alone_ends_the_others(cell, monkeypatch, by, ended):
    """Those would wait for it; where all have agreed on a step there is nobody to end."""

    def train(*_, **__):
        if by is not None:
            raise by
        return loop.Ended({}, False)

    found = []
    monkeypatch.setattr(cells.Cell, "todo", lambda self: ("train",))
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(hosts, "joined", lambda: True)
    monkeypatch.setattr(hosts, "end", lambda status, text, consequence: found.append((status, text)))
    assert runner.run(cell) == STOPPED and found == ended
    assert jobs.attempts(cell.workdir)[-1].status == "interrupted"


def test_cells_one_after_the_other(cell, monkeypatch):
    """All are run, also behind one that fails; a stop ends it; cells of several hosts are refused before anything is run."""
    given, ends, ran = [f"{cell.workdir}"] * 3, [1, 0, 0], []
    monkeypatch.setattr(runner, "run", lambda one: (ran.append(one.workdir), ends[len(ran) - 1])[1])
    assert entry.main(["--cell", *given]) == 1 and ran == [cell.workdir] * 3
    ran.clear()
    ends[1] = STOPPED
    assert entry.main(["--cell", *given]) == STOPPED and len(ran) == 2
    ran.clear()
    monkeypatch.setattr(cells, "load", lambda _: dataclasses.replace(cell, hosts=2))
    with pytest.raises(ValueError, match="one cell of several hosts at a time"):
        entry.main(["--cell", *given])
    assert not ran


def test_a_cell_travels(cell, tmp_path):
    """It is what its directory says, wherever that is mounted."""
    found = cells.load(cell.workdir)
    planned = dataclasses.replace(cell, cost=None)
    assert dataclasses.replace(found, values=dict(found.values)) == planned
    (cell.workdir / "job" / "cell.json").rename(cell.workdir / "job" / "kept.json")
    with pytest.raises(ValueError, match="is no cell of a sweep"):
        cells.load(cell.workdir)
    (cell.workdir / "job" / "kept.json").rename(cell.workdir / "job" / "cell.json")


def judged(losses, skipped=None, warmup=10, every=10, uniform=1.39):
    """The step at which a run with these losses, looked at every so many steps, is stopped, and why."""
    watch = runner.Watch()
    for i, loss in enumerate(losses):
        step = (i + 1) * every
        if (why := watch.judge(step, warmup, loss, skipped[i] if skipped else 0, uniform)) is not None:
            return step, why
    return None


def test_what_is_lost():
    assert judged([1.5] * 50) is None, "a little worse than a guess"
    assert judged([9.0, 1.3, 9.0, 1.3, 9.0]) is None, "warm-up, and single spikes"
    step, why = judged([1.3, 1.2, 2.2, 2.3])
    assert step == 40 and why == "the loss at step 40 is 2.3, a uniform guess has 1.39"
    assert judged([1e9] * 20, uniform=math.inf) is None, "of numbers there is no guess"
    assert judged([math.nan] * 20) is None, "a loss that is not a number is an update that is left out, and counted"
    assert judged([1.0] * 40, [min(i, 5) for i in range(40)]) is None, "five of a hundred"
    step, why = judged([1.0] * 40, [0] * 20 + [3 * i for i in range(1, 21)])
    assert step == 220 and why == "6% of the updates of steps 121 to 220 were not finite"
