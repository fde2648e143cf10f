"""Grids, what is left of them, reports; with an engine that only pretends, local processes, and one run from end to end."""

import csv
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import scipy.stats

import sweep as command
from sweeps import cells, plots, report, sweep
from sweeps.cells import Cell, Request
from sweeps.engines.local import LocalLauncher, Result

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {"task.length": "16", "model.width": "16", "model.depth": "2", "train.steps": "4", "train.batch_size": "8"}
SMALL["optimizer.warmup_steps"] = "1"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = "the quick brown fox jumps over the lazy dog".split()
    path.write_text(" ".join(words[i] for i in np.random.default_rng(0).integers(0, len(words), 600)))
    return path


def request(text, folder, axes, **options):
    settings = {"corpus": f"file:{text}", **SMALL, **options.pop("settings", {})}
    axes = {key: values.split(",") for key, values in axes.items()}
    settings = {key: value for key, value in settings.items() if key not in axes or key == "train.steps"}
    return Request(str(ROOT / "configs/lm.py"), axes, folder / "sweep", settings, **options)


class Pretender:
    """Writes what a run leaves. Scores are 3 + seed / 10, 1 higher for mamba; lru fails, seed 9 is interrupted."""

    def __init__(self):
        self.ran = []

    def run(self, todo):
        for cell in todo:
            self.ran.append(cell.name)
            if cell.values["mixer"] == "lru":
                yield Result(cell, "failed", "ValueError: it broke")
            elif cell.values["seed"] == "9":
                yield Result(cell, "interrupted")
            else:
                yield self.finish(cell)

    def finish(self, cell):
        (cell.workdir / "checkpoints" / str(cell.steps)).mkdir(parents=True)
        (cell.workdir / "config.json").write_text(json.dumps(cell.config))
        value = 3 + int(cell.values["seed"]) / 10 + (cell.values["mixer"] == "mamba")
        lines = [{"step": 2, "split": "train", "loss": 2.0, "tokens_per_second": 1000.0}]
        lines += [{"step": step, "split": "valid", "bits_per_byte": value + 1 / step} for step in (2, 4)]
        (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = {"task": "text", "metric": "bits_per_byte", "higher_is_better": False}
        result |= {"floors": {"uniform": 8.0, "5-gram": 3.5}, "length": 16, "steps": 4, "step": 4}
        scores = {str(n): None if n > 40 else value + n / 1000 for n in {16, *cell.lengths}}
        (cell.workdir / "result.json").write_text(json.dumps(result | {"valid": value, "test": scores}))
        return Result(cell, "finished", seconds=1.0)


def test_a_grid(text, tmp_path):
    """Keys go where they belong, hyperparameters of a mixer to the cells that have it, widths to the budget."""
    settings = {"model.mixer.mamba.state": "4"}
    grid = cells.plan(
        request(text, tmp_path, {"mixer": "attention,mamba,gau", "seed": "0,1"}, match="state", settings=settings)
    )
    assert [cell.name for cell in grid[:3]] == [
        "mixer=attention,seed=0",
        "mixer=attention,seed=1",
        "mixer=mamba,seed=0",
    ]
    reference, mamba, gau = grid[0], grid[3], grid[4]
    assert reference.arguments[0] == f"--config={ROOT}/configs/lm.py:corpus=file:{text},mixer=attention"
    assert "--config.seed=0" in reference.arguments and "--config.model.mixer.mamba.state=4" in mamba.arguments
    assert not any("mamba" in argument for argument in reference.arguments)
    assert reference.sized.achieved == reference.cost.carry_bytes == reference.sized.budget
    assert mamba.config["model"]["width"] == mamba.sized.width != 16
    assert mamba.config["seed"] == 1 and mamba.config["model"]["mixer"]["mamba"]["state"] == 4
    assert mamba.cost.carry_bytes == mamba.sized.achieved and mamba.sized.reached
    assert not gau.sized.reached and gau.sized.width == 8 and gau.error is None, "said so, not dropped"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_other_axes_have_their_own_reference(text, tmp_path):
    asked = request(text, tmp_path, {"mixer": "lru,mamba", "model.depth": "2,4"}, match="flops")
    small, large, *matched = cells.plan(asked)
    assert [cell.sized.budget for cell in matched] == [small.cost.flops_per_token, large.cost.flops_per_token]
    assert [cell.config["model"]["width"] for cell in matched] == [cell.sized.width for cell in matched]
    (alone,) = cells.plan(request(text, tmp_path, {"seed": "0"}, match="params", budget=20_000.0))
    assert alone.sized.budget == 20_000 and alone.sized.reached


def test_blocks_that_replace_the_channel_mixer(text, tmp_path):
    """Depth is the configuration's affair: twice the blocks where a mixer needs no MLP."""
    made = request(text, tmp_path, {"mixer": "attention,mamba"}, match="params")
    del made.settings["model.depth"]
    attention, mamba = cells.plan(made)
    assert mamba.config["model"]["depth"] == 2 * attention.config["model"]["depth"]


@pytest.mark.parametrize(
    "axes, options, message",
    [
        ({"mixer": "mambo"}, {}, "no mixer 'mambo'"),
        ({"mixr": "mamba"}, {}, "takes mixer, size, corpus"),
        ({"train.stpes": "3"}, {}, "train.stpes"),
        ({"seed": "x"}, {}, "seed"),
        ({"seed": "0,0"}, {}, "different"),
        ({"seed": "0", "train.steps": "3"}, {}, "both an axis and set"),
        ({"seed": "0"}, {"settings": {"model.mixer.gla.heads": "2"}}, "no cell has the mixer"),
        ({"seed": "0"}, {"match": "params"}, "axis of mixers"),
        ({"mixer": "gla"}, {"budget": 5.0}, "needs a measure"),
        ({"mixer": "gla"}, {"match": "size"}, "must be one of params, flops, state"),
        ({}, {}, "needs an axis"),
    ],
)
def test_bad_requests(text, tmp_path, axes, options, message):
    with pytest.raises(ValueError, match=message):
        cells.plan(request(text, tmp_path, axes, **options))


def test_a_sweep_and_its_report(text, tmp_path, capsys):
    """Failures are told and the rest goes on; what is finished is not run again; the report has everything."""
    asked = request(text, tmp_path, {"mixer": "mamba,gla,lru,fnet", "seed": "0,1,9"}, lengths=(32, 48))
    engine = Pretender()
    assert not sweep.run(asked, engine, "python sweep.py")
    assert len(engine.ran) == 9, "fnet is not causal: its cells are not run"
    again = Pretender()
    assert not sweep.run(asked, again, "python sweep.py --again")
    assert again.ran == [name for name in engine.ran if "lru" in name or "seed=9" in name]
    report = (asked.workdir / "report.md").read_text()
    gla = next(line for line in report.splitlines() if line.startswith("| `gla`"))
    half = scipy.stats.t.ppf(0.975, 1) * np.std([3.016, 3.116], ddof=1) / math.sqrt(2)
    assert gla.startswith(f"| `gla` | 3.0660 ± {half:.4f} | 3.0500 | 2 of 3 |") and "1,000 |" in gla
    order = [report.index(text) for text in ("`gla` | 3.0660", "*5-gram*", "`mamba` | 4.0660", "*uniform*")]
    assert order == sorted(order), "floors stand among the rows, best first"
    assert "| `gla` | 3.0660 ±" in report and "| 16 | 32 |\n" in report
    assert "ValueError: it broke (`mixer=lru,seed=0/log.txt`)" in report and "mixer 'fnet' is not causal" in report
    assert "`mixer=gla,seed=9`: not finished" in report
    assert (
        "for seed in 0 1 9; do" in report
        and "python eval.py --lengths=16,32,48 --workdir=runs/mixer=gla-$seed" in report
    )
    lines = list(csv.DictReader((asked.workdir / "results.csv").open()))
    assert len(lines) == 12 and [line["status"] for line in lines[:3]] == ["finished", "finished", "unfinished"]
    assert (
        float(lines[0]["test"]) == 4.016
        and float(lines[0]["test_at_32"]) == 4.032
        and "test_at_48" not in lines[0]
        and lines[0]["step"] == "4"
    )
    assert lines[6]["error"] == "ValueError: it broke" and int(lines[6]["parameters"]) > 0
    assert "8 of 12 cells are not finished (6 failed)" in capsys.readouterr().out
    longer = dataclasses.replace(asked, settings={**asked.settings, "train.steps": "6"})
    assert all(len(cell.todo()) == 2 for cell in cells.plan(longer) if not cell.error)
    other = dataclasses.replace(asked, lengths=(64,))
    (score,) = cells.plan(other)[0].todo()
    assert score[-1] == "--lengths=64" and "--score=" in score[-2], "trained, to be scored at another length"


def test_plots(text, tmp_path, monkeypatch):
    asked = request(text, tmp_path, {"mixer": "mamba,gla", "seed": "0,1"}, lengths=(32,))
    grid = cells.plan(asked)
    for cell in grid:
        Pretender().finish(cell)
    groups = report.sections(report.rows(grid))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.save(groups, asked.workdir) == "no plots: pip install matplotlib"
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert plots.save(groups, asked.workdir) == "plots: quality.png, learning.png, lengths.png"
    assert all((asked.workdir / f"{name}.png").stat().st_size > 10_000 for name in ("quality", "learning", "lengths"))


def test_intervals():
    values = [1.0, 2.0, 4.0, 4.5]
    mean, half = report.interval(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    assert report.interval([3.0]) == (3.0, None)
    assert report.interval([math.inf, 3.0])[1] is None


@dataclasses.dataclass(frozen=True)
class Script(Cell):
    """A cell whose commands are Python texts, each done when it has made its file."""

    texts: tuple[str, ...] = ()

    def todo(self):
        todo = enumerate(self.texts)
        return [
            [sys.executable, "-c", t, str(self.workdir / f"{i}")]
            for i, t in todo
            if not (self.workdir / f"{i}").exists()
        ]


DONE = "import sys; open(sys.argv[1], 'w')"
WAIT = "import os, time; [time.sleep(.01) for _ in iter(lambda: os.path.exists(other), True)]; "


def script(folder, name, *texts):
    return Script({}, (), folder / name, {}, texts=texts)


def test_local_processes(tmp_path):
    """Commands in order, cells side by side; a failure is its last error, and stops nothing but its cell."""
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
    ]
    found = {r.cell.name: (r.status, r.error) for r in LocalLauncher(2, tmp_path / ".lock").run(todo)}
    assert found == {
        "a": ("finished", None),
        "b": ("finished", None),
        "bad": ("failed", "ValueError: it broke"),
        "said": ("failed", "no such thing"),
        "dead": ("failed", "killed by SIGKILL, perhaps for want of memory"),
        "idle": ("interrupted", None),
    }
    assert "about to" in (tmp_path / "bad" / "log.txt").read_text()


def test_stopping(tmp_path):
    """The first signal goes on to the cells, and no other is started; the directory is locked until they have ended."""
    wait = "import sys, time; open(sys.argv[1] + '-on', 'w'); time.sleep(60)"
    todo = [script(tmp_path, name, wait) for name in ("a", "b", "never")]
    blocked = []

    def disturb():
        while not all((tmp_path / name / "0-on").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    engine = LocalLauncher(2, tmp_path / ".lock")
    threading.Thread(target=disturb).start()
    results = []
    for result in engine.run(todo):
        results.append(result)
        with pytest.raises(ValueError, match="another sweep"):
            list(LocalLauncher(1, tmp_path / ".lock").run(todo))
        blocked.append(True)
    assert {(r.cell.name, r.status) for r in results} == {("a", "interrupted"), ("b", "interrupted")} and blocked
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="at least one worker"):
        LocalLauncher(0, tmp_path / ".lock")


def test_workers_share_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    text = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    wait = f"other = {str(tmp_path / 'b' / '0')!r}; " + WAIT + DONE
    todo = [script(tmp_path, "a", text, wait), script(tmp_path, "b", text)]
    assert {r.status for r in LocalLauncher(2, tmp_path / ".lock").run(todo)} == {"finished"}
    assert (tmp_path / "a" / "0").read_text() == "3,5" and (tmp_path / "b" / "0").read_text() == "4"


def test_from_end_to_end(text, tmp_path):
    """The command trains, scores at the best checkpoint, reports; and then finds that all is done."""
    arguments = [
        "sweep.py",
        "--config=configs/lm.py",
        "--over",
        "mixer=gla",
        "seed=5",
        f"--workdir={tmp_path / 'sweep'}",
    ]
    arguments += ["--lengths=32", "--set", f"corpus=file:{text}", *(f"{key}={value}" for key, value in SMALL.items())]
    arguments += ["train.eval_every=2", "train.checkpoint_every=2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MIXOLOGY_CACHE": str(tmp_path / "cache")}
    options = {"cwd": ROOT, "env": environment, "text": True, "capture_output": True}
    run = subprocess.run([sys.executable, *arguments], **options)
    folder = tmp_path / "sweep" / "mixer=gla,seed=5"
    assert run.returncode == 0, run.stderr + ((folder / "log.txt").read_text() if folder.exists() else "")
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] in (2, 4) and set(result["test"]) == {"16", "32"} and result["floors"]["uniform"] == 8
    assert "`gla`" in (tmp_path / "sweep" / "report.md").read_text()
    asked = command.request(command.parse(arguments[1:]))
    (cell,) = cells.plan(dataclasses.replace(asked, config=str(ROOT / "configs/lm.py")))
    assert cell.config == json.loads((folder / "config.json").read_text()) and cell.todo() == []
    with pytest.raises(ValueError, match=r"train\.stpes"):
        command.main([*arguments[1:], "train.stpes=3"])
