"""Grids, what is left of them, reports; with an engine that only pretends, and one run from end to end."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

import sweep as entry
from common.command import STOPPED
from common.errors import UserError
from sweeps import cells, jobs, plots, rows, sweep
from sweeps.request import split_values
from tests.sweeps.pretender import ROOT, SMALL, Pretender, request
from training import command_line, config, setup


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
    assert mamba.config == config.resolve(command_line.parse(mamba.arguments)).raw, "its commands make its row"
    assert mamba.cost.carry_bytes == mamba.sized.achieved and mamba.sized.reached
    assert not gau.sized.reached and gau.sized.width == 8 and gau.error is None, "said so, not dropped"
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.thorough
def test_other_axes_have_their_own_reference(text, tmp_path):
    asked = request(text, tmp_path, {"mixer": "lru,mamba", "model.depth": "2,4"}, match="flops")
    small, large, *matched = cells.plan(asked)
    assert [cell.sized.budget for cell in matched] == [small.cost.flops_per_token, large.cost.flops_per_token]
    assert [cell.config["model"]["width"] for cell in matched] == [cell.sized.width for cell in matched]
    assert [cell.cost.flops_per_token for cell in matched] == [cell.sized.achieved for cell in matched]
    (alone,) = cells.plan(request(text, tmp_path, {"seed": "0"}, match="params", budget=20_000.0))
    assert alone.sized.budget == 20_000 and alone.sized.reached and alone.cost.parameters == alone.sized.achieved


def test_blocks_that_replace_the_channel_mixer(text, tmp_path):
    """Depth is the configuration's affair: twice the blocks where a mixer needs no MLP."""
    made = request(text, tmp_path, {"mixer": "attention,mamba"}, match="params")
    del made.settings["model.depth"]
    attention, mamba = cells.plan(made)
    assert mamba.config["model"]["depth"] == 2 * attention.config["model"]["depth"]


def test_a_comma_in_a_value(text, tmp_path):
    """It reaches the configuration, through the arguments that a cell is run by."""
    corpus = tmp_path / "a,b.txt"
    corpus.write_text(text.read_text())
    asked = request(text, tmp_path, {"seed": "0"})
    asked = dataclasses.replace(asked, axes={"task.corpus": split_values(f"'file:{corpus}',file:{text}")})
    found = cells.plan(asked)
    assert [cell.config["task"]["corpus"] for cell in found] == [f"file:{corpus}", f"file:{text}"]
    assert found[0].config == config.resolve(command_line.parse(found[0].arguments)).raw
    assert len({cell.workdir for cell in found}) == 2


@pytest.mark.parametrize(
    "axes, options, message",
    [
        ({"mixer": "mambo"}, {}, "mambo"),
        ({"mixr": "mamba"}, {}, "takes mixer, size, corpus"),
        ({"train.stpes": "3"}, {}, "train.stpes"),
        ({"seed": "x"}, {}, "seed"),
        ({"seed": "0"}, {"settings": {"model.mixer.gla.heads": "2"}}, "no cell has the mixer"),
        ({"seed": "0"}, {"score": ("task.lenght=24",)}, "no hyperparameter 'lenght'; did you mean 'length'"),
        ({"seed": "0"}, {"score": ("length=24",)}, "--score takes task.KEY=VALUE"),
    ],
)
def test_bad_requests(text, tmp_path, axes, options, message):
    with pytest.raises(UserError, match=message):
        cells.plan(request(text, tmp_path, axes, **options))


def test_a_sweep_and_its_report(text, tmp_path, capsys, monkeypatch, no_plots):
    """Failures are told and the rest goes on; what is finished is not run again; the report has everything."""
    monkeypatch.chdir(tmp_path)
    score = ("task.length=24,99",)
    asked = request(text, tmp_path, {"mixer": "mamba,gla,lru,fnet", "seed": "0,1,8,9"}, lengths=(32, 48), score=score)
    engine = Pretender(asked.workdir)
    assert sweep.run(asked, engine, ["--over", "x=(1,2),3"], retries=0) == STOPPED
    assert len(engine.ran) == 12, "fnet is not causal: its cells are not run"
    assert "12 of 16 cells are not finished (8 failed, 2 diverged, 2 still to be run)" in capsys.readouterr().out
    again = Pretender(asked.workdir)
    assert sweep.run(asked, again, ["--over", "x=(1,2),3"], retries=0) == STOPPED
    assert again.ran == [name for name in engine.ran if "lru" in name or "seed=9" in name]
    report = (asked.workdir / "report.md").read_text()
    assert f"cd {tmp_path}\n\npython {ROOT}/sweep.py --over 'x=(1,2),3'\n" in report
    gla = next(line for line in report.splitlines() if line.startswith("| `gla`"))
    half = scipy.stats.t.ppf(0.975, 1) * np.std([3.016, 3.116], ddof=1) / math.sqrt(2)
    assert gla.startswith(f"| `gla` | 3.0660 ± {half:.4f} | 3.0500 | 2 of 4 |") and "1,000 |" in gla
    order = [report.index(text) for text in ("`gla` | 3.0660", "*5-gram*", "`mamba` | 4.0660", "*uniform*")]
    assert order == sorted(order), "floors stand among the rows, best first"
    assert "| `gla` | 3.0660 ±" in report and "| 16 | 32 |\n" in report
    assert "ValueError: it broke (`mixer=lru,seed=0/log.txt`)" in report and "mixer 'fnet' is not causal" in report
    assert "`mixer=gla,seed=9`: not finished" in report
    diverged = report[report.index("## Diverged") : report.index("## Failures")]
    assert "`mixer=gla,seed=8`: bits_per_byte on the validation split is nan" in diverged
    assert f"python {ROOT}/eval.py --lengths=16,32 --workdir=runs/mixer=gla-$seed" in report, "at 48 there is no score"
    assert "for seed in 0 1 8 9; do" in report
    assert f"&&\n  python {ROOT}/eval.py --set task.length=24,99 --workdir=runs/mixer=gla-$seed\ndone" in report
    settings = report[report.index("### test bits per byte by settings of the task") : report.index("## Diverged")]
    assert f"|  | length=24 |\n| --- | ---: |\n| `gla` | 3.5500 ± {half:.4f} |" in settings, "at 99 there is no score"
    assert "| *best floor* | *3.5000* |" in settings and "### test accuracy, % by settings of the task" in settings
    assert (
        f"|  | scored=all |\n| --- | ---: |\n| `gla` | 30.50 ± {10 * half:.2f} |" in settings and "*20.00*" in settings
    )
    lines = list(csv.DictReader((asked.workdir / "results.csv").open()))
    assert [line["status"] for line in lines[:4]] == ["finished", "finished", "diverged", "unfinished"]
    assert float(lines[0]["test"]) == 4.016 and float(lines[0]["test_at_32"]) == 4.032 and lines[0]["step"] == "4"
    assert float(lines[0]["bits_per_byte with length=24"]) == 4.5 and float(lines[0]["accuracy with scored=all"]) == 0.4
    assert len(lines) == 16 and "test_at_48" not in lines[0] and "nan" in lines[2]["error"]
    assert lines[8]["error"] == "ValueError: it broke" and int(lines[8]["parameters"]) > 0
    other = dataclasses.replace(asked, lengths=(64,))
    assert cells.plan(other)[0].todo() == ("score",), "trained, to be scored at another length"
    other = dataclasses.replace(asked, score=("task.length=24",))
    assert cells.plan(other)[0].todo() == ("score",), "and under other settings"
    capsys.readouterr()
    assert sweep.status(asked.workdir) == STOPPED
    shown = " ".join(capsys.readouterr().out.split())
    assert "mixer=gla,seed=0 finished 4/4 3.0160 bits per byte 1 0.00" in shown
    assert "mixer=lru,seed=1 failed: ValueError: it broke 0/4 2 0.00" in shown
    assert "16 cells: 4 finished, 2 diverged, 2 interrupted, 4 failed, 4 cannot be run" in shown


def test_exit_status(text, tmp_path, no_plots):
    """1 where cells have failed or diverged, also when there is nothing left to be run; 0 when all are finished."""
    for name, axes, status in (("a", {"mixer": "gla", "seed": "0,8"}, 1), ("b", {"mixer": "gla", "seed": "0"}, 0)):
        asked = request(text, tmp_path / name, axes)
        assert [sweep.run(asked, Pretender(asked.workdir), []) for _ in range(2)] == [status, status]


def test_a_sweep_keeps_its_configuration_and_data(text, tmp_path, no_plots):
    """Other settings or data are refused before anything is changed, but for what changes no number."""
    asked = request(text, tmp_path, {"mixer": "gla", "seed": "0,9"})
    sweep.run(asked, Pretender(asked.workdir), [])
    (asked.workdir / "mixer=gla,seed=9" / "config.json").write_text(json.dumps(cells.plan(asked)[1].config))
    before = {path: path.read_bytes() for path in asked.workdir.rglob("*") if path.is_file()}

    def again(**settings):
        return dataclasses.replace(asked, settings=asked.settings | settings)

    refused = [
        {"train.steps": "6"},
        {"train.eval_every": "3"},
        {"train.implementation": "reference"},
        {"model.width": "8"},
    ]
    for settings in refused:
        ((key, value),) = settings.items()
        with pytest.raises(UserError, match=rf"seed=0 holds a run with.*{key}=.*now {value}.*1 more cells.*--workdir"):
            sweep.run(again(**settings), Pretender(asked.workdir), [])
    recorded = json.loads((asked.workdir / "mixer=gla,seed=0" / "environment.json").read_text())
    assert recorded[-1]["fingerprint"] == cells.plan(asked)[0].data
    corpus = text.with_name("other.txt")
    corpus.write_text(text.read_text().replace("fox", "dog"))
    with pytest.raises(UserError, match=r"seed=0 was run on other data.*--allow_other_data"):
        sweep.run(again(corpus=f"file:{corpus}"), Pretender(asked.workdir), [])
    assert before == {path: path.read_bytes() for path in asked.workdir.rglob("*") if path.is_file()}

    free = cells.plan(again(**{"train.log_every": "1", "train.keep": "5", "train.checkpoint_every": "3"}))
    cells.check_directories(free)
    assert not free[0].todo() and len(free[1].todo()) == 2
    knowingly = dataclasses.replace(again(corpus=f"file:{corpus}"), allow_other_data=True)
    finished, started = cells.plan(knowingly)
    cells.check_directories([finished, started])
    assert not finished.todo() and started.allow_other_data


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("job/cell.json", '{"values"', "no cell of a sweep"),
        ("job/cell.json", "[1]", "is none of this version"),
        ("job/cell.json", '{"engine": "local"}', "is none of this version"),
        ("job/job.json", '{"job": 3}', "is none of this version"),
        ("config.json", "[]", "is damaged: it has no section"),
        ("result.json", '{"accuracy": 1}', None),
        ("result.json", "[]", None),
        ("job/attempts.jsonl", '{"began": 1.0, "by": "me"}\n[1]\n{"sta', None),
    ],
)
def test_records_that_are_none(text, tmp_path, capsys, file, content, message):
    """What another program has written in a cell's directory is named, or is nothing."""
    (cell,) = cells.plan(request(text, tmp_path, {"mixer": "gla"}))
    cell.save()
    (cell.workdir / file).write_text(content)
    if message is None:
        assert sweep.status(cell.workdir.parent) == STOPPED and "0/4" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=message):
            sweep.status(cell.workdir.parent)


def test_updates_that_were_never_made(text, tmp_path):
    """A run whose last updates were left out has diverged, whatever its score."""
    (cell,) = cells.plan(request(text, tmp_path, {"mixer": "gla", "seed": "0"}))
    Pretender().finish(cell)
    assert cell.diverged() is None and cell.result() is not None
    with (cell.workdir / "metrics.jsonl").open("a") as record:
        record.write(json.dumps({"step": 4, "split": "train", "loss": 2.0, "skipped": 2}) + "\n")
    assert "none of the updates after step 2" in cell.diverged() and cell.result() is None and cell.todo() == ()


def test_a_fault_in_a_cell(text, tmp_path, monkeypatch, capsys):
    """What is no UserError prints its traceback, and fails its cells alone, with the place where it happened."""

    def cost(model, spec):
        if model.pattern == ("gla",):
            raise ValueError("size of label 'k' does not match")
        return real(model, spec)

    real = setup.cost
    monkeypatch.setattr(setup, "cost", cost)
    gla, other, mamba = cells.plan(request(text, tmp_path, {"mixer": "gla,mamba", "seed": "0,1"}))[:3]
    assert "ValueError: size of label 'k' does not match (tests/sweeps/test_sweep.py, line " in gla.error
    assert other.error == gla.error and mamba.error is None and mamba.cost.parameters > 0
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_seed_that_is_none(text, tmp_path):
    """The others are run, whichever comes first."""
    for seeds in ("-1,0", "0,-1"):
        errors = {
            c.values["seed"]: c.error for c in cells.plan(request(text, tmp_path, {"mixer": "gla", "seed": seeds}))
        }
        assert errors["0"] is None and "config.seed must be a whole number" in errors["-1"]


def test_another_sweep_in_the_same_directory(text, tmp_path, no_plots):
    """Its report would take the place of the first one's; a grid that shares a cell goes on with it."""
    asked = request(text, tmp_path, {"mixer": "gla", "seed": "0"}, match="active")
    assert sweep.run(asked, Pretender(asked.workdir), []) == 0
    before = (asked.workdir / "report.md").read_text()
    assert "the same number of parameters that a token uses: that of `mixer=gla`" in before
    with pytest.raises(UserError, match=r"holds the cells of another sweep, such as mixer=gla,seed=0"):
        sweep.run(request(text, tmp_path, {"mixer": "gla,mamba"}), Pretender(asked.workdir), [])
    assert (asked.workdir / "report.md").read_text() == before
    more = request(text, tmp_path, {"mixer": "gla", "seed": "0,1"}, match="active")
    assert sweep.run(more, Pretender(asked.workdir), []) == 0


def test_a_report_that_is_no_sweeps_stays(text, tmp_path):
    asked = request(text, tmp_path, {"mixer": "gla"})
    asked.workdir.mkdir()
    (asked.workdir / "results.csv").write_text("of something else")
    with pytest.raises(UserError, match=r"has results\.csv and no cells of a sweep"):
        sweep.run(asked, Pretender(asked.workdir), [])
    assert [path.read_text() for path in asked.workdir.iterdir()] == ["of something else"]


def test_plots(text, tmp_path, monkeypatch):
    asked = request(text, tmp_path, {"mixer": "mamba,gla", "seed": "0,1"}, lengths=(32,))
    grid = cells.plan(dataclasses.replace(asked, score=("task.length=24",)))
    for cell in grid:
        Pretender().finish(cell)
    groups = rows.sections(rows.rows(grid))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("learning.png", "quality-2.png", "learning_of_mine.png", "settings-old.png"):
        (asked.workdir / name).touch()
    assert plots.save(groups, asked.workdir) == "no plots: pip install matplotlib"
    there = sorted(path.name for path in asked.workdir.glob("*.png"))
    assert there == ["learning_of_mine.png", "settings-old.png"], "what is not ours stays"
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert plots.save(groups, asked.workdir) == "plots: quality.png, learning.png, lengths.png, settings.png"
    names = ("quality", "learning", "lengths", "settings")
    assert all((asked.workdir / f"{name}.png").stat().st_size > 10_000 for name in names)


def test_a_legend_of_many_rows_has_room():
    """It does not lie on the title: the figure is wider by its columns."""
    pytest.importorskip("matplotlib")
    widths = []
    for count in (2, 60):
        figure, (axis,) = plots.panels(1, 7.0)
        axis.plot([1, 2], label="a")
        plots.legend(figure, axis, [None] * count)
        widths.append(figure.get_figwidth())
    assert widths == [7.0, pytest.approx(9.4)]


def test_intervals():
    values = [1.0, 2.0, 4.0, 4.5]
    mean, half = rows.interval(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    assert rows.interval([3.0]) == (3.0, None)
    assert rows.interval([math.inf, 3.0])[1] is None


def test_from_end_to_end(text, tmp_path, monkeypatch):
    """The command trains, scores at the best checkpoint, reports, from any directory; and then finds that all is done."""
    monkeypatch.chdir(text.parent)
    settings = SMALL | {"train.eval_every": "2", "train.checkpoint_every": "2"}
    arguments = [
        "--config=configs/lm.py",
        "--over",
        "mixer=gla",
        "seed=5",
        f"--workdir={tmp_path / 'sweep'}",
        "--lengths=32",
        "--score",
        "task.length=24",
        "task.tokenizer=byte,bpe:260",
    ]
    arguments += ["--set", f"corpus=file:{text.name}", *(f"{key}={value}" for key, value in settings.items())]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MIXOLOGY_CACHE": str(tmp_path / "cache")}
    options = {"env": environment, "text": True, "capture_output": True}
    run = subprocess.run([sys.executable, str(ROOT / "sweep.py"), *arguments], **options)
    folder = tmp_path / "sweep" / "mixer=gla,seed=5"
    assert run.returncode == 0, run.stderr + ((folder / "log.txt").read_text() if folder.exists() else "")
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] in (2, 4) and set(result["test"]) == {"16", "32"} and result["floors"]["uniform"] == 8
    there, missing = result["grid"]
    assert (
        there["settings"] == {"length": 24, "tokenizer": "byte"}
        and there["floors"]["uniform"] == 8
        and 0 < there["score"] < 10
    )
    assert missing == {"settings": {"length": 24, "tokenizer": "bpe:260"}, "score": None}
    assert "`gla`" in (tmp_path / "sweep" / "report.md").read_text()
    (cell,) = cells.plan(entry.requested(entry.parser().parse_args(arguments)))
    assert cell.config == json.loads((folder / "config.json").read_text()) and cell.data == result["data"]
    assert cells.load(folder).config == cell.config and cells.here(tmp_path / "sweep") == [cells.load(folder)]
    (attempt,) = jobs.attempts(folder)
    assert (attempt.status, attempt.devices) == ("finished", 8) and attempt.seconds > 1
    assert cell.todo() == ()
