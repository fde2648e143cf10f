"""Axes that are tuned, and differences between rows."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from common.errors import UserError
from data.metrics import RMSE
from sweeps import axes, cells, ladder, plots, report, rows, sweep, tuning
from sweeps.comparison import Difference, clear, paired
from tests.sweeps.pretender import Pretender, request

RATES = ["0.001", "0.01", "0.1"]


class Tuned(Pretender):
    """gla is best at 0.01, mamba at the edge, 0.1; gla with 0.1 diverges; the test split would choose otherwise."""

    def submit(self, given, retries):
        return super().submit(given, retries)

    def score(self, cell):
        place = RATES.index(cell.values["optimizer.learning_rate"])
        seed = int(cell.values["seed"])
        if cell.values["mixer"] == "mamba":
            return 5 - place + seed / 10
        return math.nan if place == 2 else 3 + abs(place - 1) + seed / 10

    def finish(self, cell):
        if math.isnan(self.score(cell)):
            self.train(cell, math.nan)
        else:
            super().finish(cell)


def asked(text, folder, **options):
    made = request(text, folder, {"mixer": "gla,mamba", "optimizer.learning_rate": ",".join(RATES)})
    return dataclasses.replace(made, best_of=("optimizer.learning_rate",), **options)


def test_best_of(text, tmp_path, no_plots, capsys):
    """The value is chosen on validation for each mixer, with one seed; more seeds are run of what was chosen alone."""
    made = asked(text, tmp_path, seeds_of_best=3)
    engine = Tuned(made.workdir)
    arguments = ["--over", "mixer=gla,mamba", f"optimizer.learning_rate={','.join(RATES)}"]
    assert sweep.run(made, engine, arguments) == 1, "one cell has diverged"
    assert len(engine.ran) == 6 + 2 * 2
    assert {name for name in engine.ran[6:]} == {
        f"mixer={mixer},optimizer.learning_rate={rate},seed={seed}"
        for mixer, rate in (("gla", "0.01"), ("mamba", "0.1"))
        for seed in (1, 2)
    }
    assert "mixer=mamba: optimizer.learning_rate=0.1, at the edge of the grid" in capsys.readouterr().out
    report = (made.workdir / "report.md").read_text()
    half = scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert f"| `gla` | 0.01 | 3.1160 ± {half:.4f} | 3.1000 | 3 |" in report
    assert f"| `mamba` | **0.1** (edge of the grid) | 3.1160 ± {half:.4f} | 3.1000 | 3 |" in report
    assert "| `gla` | 4.0000 | **3.0000** | × |" in report and "| `mamba` | 5.0000 | 4.0000 | **3.0000** |" in report
    assert "python sweep.py --over mixer=gla,mamba optimizer.learning_rate=0.001,0.01,0.1,1,10" in report.replace(
        str(sweep.report.ROOT) + "/", ""
    )
    assert "The best optimizer.learning_rate is at the edge of the grid** for mamba." in report
    assert "`mixer=gla,optimizer.learning_rate=0.1,seed=0`: bits_per_byte on the validation split is nan" in report
    assert "--config.optimizer.learning_rate=0.01" in report and "learning_rate=0.001 --" not in report
    again = Tuned(made.workdir)
    assert sweep.run(made, again, arguments) == 1 and not again.ran
    lines = list(csv.DictReader((made.workdir / "results.csv").open()))
    assert len(lines) == 10 and {line["chosen"] for line in lines if line["seed"] == "2"} == {"True"}
    assert [line["chosen"] for line in lines[:3]] == ["False", "True", "False"]
    assert "device-hours in 10 attempts at 10 cells" in report


def test_what_tuning_refuses(text, tmp_path):
    for options, message in (
        ({"best_of": ("optimizer.lr",)}, "--best_of='optimizer.lr' is unknown"),
        ({"best_of": ("seed",)}, "a seed is not tuned"),
        ({"best_of": (), "seeds_of_best": 3}, "needs --best_of"),
        ({"seeds_of_best": 0}, "--seeds_of_best must be at least 1"),
        (
            {"seeds_of_best": 2, "axes": {"mixer": ["gla"], "seed": ["1"], "optimizer.learning_rate": RATES}},
            "own seeds",
        ),
        ({"reference": "lru"}, "--reference=lru is no row"),
        ({"reference": "optimizer.learning_rate=0.01"}, "what is tuned away tells no row from another"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(asked(text, tmp_path), **options)


def test_a_reference_of_which_nothing_is_finished(text, tmp_path, no_plots):
    """The seeds of the others are run all the same."""

    class Wild(Pretender):
        def finish(self, cell):
            self.train(cell, math.nan) if cell.values["mixer"] == "gla" else super().finish(cell)

    made = asked(text, tmp_path, seeds_of_best=2, reference="gla")
    engine = Wild(made.workdir)
    assert sweep.run(made, engine, []) == 1
    assert len(engine.ran) == 7 and engine.ran[-1].startswith("mixer=mamba") and engine.ran[-1].endswith("seed=1")
    lines = [line.split(" | ") for line in (made.workdir / "report.md").read_text().splitlines()]
    (gla,) = [line for line in lines if line[0] == "| `gla`" and "diverged" in line]
    assert gla[2] == "diverged" and "3 of 3" in gla, "it is in the table, worse than all"


def test_how_a_grid_goes_on(text, tmp_path):
    """By values that a cell could have, whichever way the axis was written."""
    for best, beyond in (("0", {}), ("0.1", {"model.dropout": ["0.2", "0.3"]})):
        made = request(text, tmp_path / best, {"mixer": "gla", "model.dropout": "0,0.1"})
        made = dataclasses.replace(made, best_of=("model.dropout",))
        engine, grid = Pretender(made.workdir), cells.plan(made)
        engine.score = lambda cell, best=best: 3.0 + (cell.values["model.dropout"] != best)
        for cell in grid:
            engine.finish(cell)
        (choice,) = tuning.choose(made, rows.rows(grid))
        assert choice.edges == beyond
    made = request(text, tmp_path / "budget", {"mixer": "gla", "model.dropout": "0,0.1"})
    of_four_steps = 3 * cells.plan(made)[0].cost.flops_per_token * 4 * 8 * 16
    del made.settings["train.steps"]
    made = ladder.climb(dataclasses.replace(made, best_of=("model.dropout",)), (of_four_steps,))
    engine, grid = Pretender(made.workdir), cells.plan(made)
    engine.score = lambda cell: 3.0 + (cell.values["model.dropout"] == "0")
    for cell in grid:
        engine.finish(cell)
    choices = tuning.choose(made, rows.rows(grid))
    assert choices[0].edges == {"model.dropout": ["0.2", "0.3"]}, "of budgets, too"
    told = report._tuning(made, choices, ["--over", "model.dropout=0,0.1", "--budgets=1"])
    assert "model.dropout=0,0.1,0.2,0.3 --budgets=1" in told[-1]
    for written in (["--over", "model.dropout=0,0.1"], ["--over=model.dropout=0,0.1"]):
        assert report._with_values(written, "model.dropout", ["0", "0.1", "0.2"])[-1] == f"{written[-1]},0.2"


def test_listed_cells_are_a_grid(text, tmp_path):
    """With the axes that are given beside them; and ranges may be drawn in their place."""
    made = asked(text, tmp_path, points=[{"optimizer.beta1": "0.8"}, {"optimizer.beta1": "0.9"}])
    assert len(made.combinations()) == 12
    assert made.combinations()[6] == {"optimizer.beta1": "0.9", "mixer": "gla", "optimizer.learning_rate": "0.001"}
    _, points = axes.expand({"optimizer.learning_rate": "log:1e-4..1e-2"}, draw=3)
    drawn = dataclasses.replace(made, points=points, axes={"mixer": ["gla"]})
    assert drawn.first_mixer == "gla" and len(drawn.combinations()) == 3


def test_differences(text, tmp_path, no_plots):
    """Paired over seeds: what all rows of a seed have in common is no noise."""

    class Noisy(Pretender):
        noise = {"0": 0.5, "1": -0.7, "2": 0.1}
        own = {("gla", "0"): 0.01, ("gla", "1"): 0.0, ("gla", "2"): -0.01}

        def score(self, cell):
            mixer, seed = cell.values["mixer"], cell.values["seed"]
            return 3 + self.noise[seed] + self.own.get((mixer, seed), 0) + (mixer == "gla")

    made = dataclasses.replace(request(text, tmp_path, {"mixer": "mamba,gla", "seed": "0,1,2"}), reference="mamba")
    assert sweep.run(made, Noisy(made.workdir), []) == 0
    report = (made.workdir / "report.md").read_text()
    differences = np.array([1.01, 1.0, 0.99])
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(differences)
    gla = next(line for line in report.splitlines() if line.startswith("| `gla`"))
    assert f"| +1.0000 ± {half:.4f} worse |" in gla and "| difference to mamba |" in report
    assert "in attempts that failed" not in report


def test_a_reference_for_each_row(text, tmp_path, no_plots):
    """It is named as it was asked for, not called the best; what all cells are set to may be part of its name."""

    class Noisy(Pretender):
        def score(self, cell):
            return super().score(cell) + (cell.values["model.depth"] == "4")

    made = request(text, tmp_path, {"mixer": "mamba,gla", "model.depth": "2,4", "seed": "0,1"})
    made = dataclasses.replace(made, reference="mixer=mamba,model.width=16")
    assert sweep.run(made, Noisy(made.workdir), []) == 0
    table = (made.workdir / "report.md").read_text()
    assert "| difference to mixer=mamba,model.width=16 |" in table and "to the best" not in table
    assert table.count("| −1.0000 ± 0.0000 better |") == 2


def test_what_was_chosen_stays_although_another_seed_of_it_diverges(text, tmp_path):
    """Seed 0 alone chooses, also where there is nothing to choose from."""
    made = asked(text, tmp_path, seeds_of_best=2)
    made = dataclasses.replace(made, axes={"mixer": ["gla"], "optimizer.learning_rate": ["0.01"]})
    grid = cells.plan(made)
    Pretender().finish(grid[0])
    grid += cells.plan(tuning.more_seeds(made, tuning.choose(made, rows.rows(grid))))
    Pretender().train(grid[1], math.nan)
    (choice,) = tuning.choose(made, rows.rows(grid))
    assert choice.chosen is not None and choice.scores == [3.0]


def test_what_has_diverged_is_in_the_table(text, tmp_path, no_plots):
    """Worse than all, with how many of its cells."""

    class Wild(Pretender):
        def score(self, cell):
            return math.nan if cell.values["mixer"] == "mamba" or cell.values["seed"] == "1" else 3.0

        def finish(self, cell):
            self.train(cell, math.nan) if math.isnan(self.score(cell)) else super().finish(cell)

    made = request(text, tmp_path, {"mixer": "mamba,gla", "seed": "0,1"})
    assert sweep.run(made, Wild(made.workdir), []) == 1
    lines = (made.workdir / "report.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    column = table[0].index("diverged")
    by_name = {line[0]: line for line in table}
    assert by_name["`gla`"][column] == "1 of 2" and by_name["`mamba`"][column] == "2 of 2"
    assert table[-1][:2] == ["`mamba`", "diverged"]


def test_plots(text, tmp_path):
    """Validation against the axis; and floors in every panel that shows the metric of the split."""
    pytest.importorskip("matplotlib")
    made = asked(text, tmp_path)
    made = dataclasses.replace(made, axes={**made.axes, "seed": ["0"]})
    grid = cells.plan(made)
    for cell in grid:
        Tuned(made.workdir).finish(cell)
    choices = tuning.choose(made, rows.rows(grid))
    (group,) = rows.sections([choice.chosen for choice in choices])
    figure = plots.tuning(choices, made.best_of)
    (axis,) = figure.axes
    assert axis.get_xscale() == "log" and [line.get_label() for line in axis.lines[:4:2]] == ["gla", "mamba"]
    gla, ring = axis.lines[:2]
    assert list(gla.get_xdata()) == [0.001, 0.01] and (ring.get_xdata(), ring.get_ydata()) == ([0.01], [3.0])
    assert [line.get_label() for line in plots.learning(group, made.best_of).axes[1].lines[:2]] == ["gla", "mamba"]
    for figure in (plots.quality(group, made.best_of), plots.learning(group, made.best_of)):
        shown = [axis for axis in figure.axes if "training" not in axis.get_ylabel()]
        assert all(
            "5-gram" in str([text.get_text() for text in axis.texts]) + axis.get_title("right") for axis in shown
        )
    assert "tuning.png" in plots.save([group], tmp_path, choices, made.best_of)


def test_paired_tests():
    ours, others = {"0": 1.0, "1": 2.0, "2": 4.0, "9": 7.0}, {"0": 1.5, "1": 1.0, "2": 2.0, "8": 1.0}
    found = paired(ours, others)
    expected = scipy.stats.ttest_rel([1.0, 2.0, 4.0], [1.5, 1.0, 2.0])
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.p == pytest.approx(expected.pvalue)
    assert paired({"0": 1.0}, {"0": 3.0}).half is None and paired({"0": 1.0}, {"1": 3.0}) is None
    assert paired({"0": 1.0, "1": 2.0}, {"0": 0.0, "1": 1.0}).p == 0


def test_tiny_scores_keep_their_digits():
    """An interval and a difference are written as the score is that they are of."""
    assert report.shown((3.21e-5, 1.2e-6), RMSE) == "3.21e-05 ± 1.2e-06"
    assert report.difference(Difference(-2e-6, 1e-6, 0.01, "better"), RMSE, 3.21e-5) == "−2e-06 ± 1e-06 better"
    assert report.shown((3.0, 1e-5), RMSE) == "3.0000 ± 0.0000"


def test_holm():
    """The smallest of k is held against a k-th of the level, the next one against the (k-1)-th, until one fails."""
    assert clear([0.01, 0.04, None, 0.03]) == [True, False, False, False]
    assert clear([0.01, 0.04, None, 0.02]) == [True, True, False, True]
    assert clear([0.04]) == [True] and clear([0.04, 0.9]) == [False, False] and clear([]) == []
