"""Fits against the curves that the points are made of."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import sweep as program
from common.errors import UserError
from data.metrics import ACCURACY, bits_per
from models.accounting import Summary
from models.config import ModelConfig
from sweeps import cells, fits, ladder, sizing
from sweeps.cells import Cell
from sweeps.request import Request
from sweeps.rows import Row
from tests.sweeps.pretender import ROOT, SMALL, request

TRUE = fits.Surface(alpha=0.34, beta=0.28, E=1.69, A=406.4, B=410.7)  # arXiv 2203.15556, as printed
BUDGETS = 10.0 ** np.arange(17, 22)
K = 0.28 / (0.34 + 0.28)


def runs(window, count=15):
    """C, N, D of sizes around the best one of each budget, which follows from dL = 0 where C = 6 N D."""
    best = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (BUDGETS / 6) ** K
    size = best[:, None] * np.geomspace(1 / window, window, count)
    compute = np.broadcast_to(BUDGETS[:, None], size.shape)
    return compute.ravel(), size.ravel(), (compute / (6 * size)).ravel()


@pytest.mark.parametrize("window", [2, 32])
def test_the_surface_is_found_again(window):
    _, size, tokens = runs(window)
    found = fits.surface(size, tokens, TRUE(size, tokens))
    np.testing.assert_allclose((found.alpha, found.beta, found.E, found.exponent), (0.34, 0.28, 1.69, K), rtol=1e-3)
    np.testing.assert_allclose((found.A, found.B), (406.4, 410.7), rtol=2e-2)


def test_the_exponent_of_budgets_is_found_again():
    """Windows around the best size make the same error at every budget; the sizes themselves are some per cent off."""
    compute, size, tokens = runs(8)
    found = fits.iso_flop(compute, size, TRUE(size, tokens))
    assert found.exponent == pytest.approx(K, abs=2e-4)
    best = np.sqrt(size.reshape(5, -1)[:, 0] * size.reshape(5, -1)[:, -1])
    np.testing.assert_allclose(found.sizes, best, rtol=0.06)


def test_noise_and_its_interval():
    """1 % noise on 7 sizes of each budget: the interval has the truth, and is not as wide as to say nothing."""
    compute, size, tokens = runs(8, 7)
    loss = TRUE(size, tokens) * np.exp(0.01 * np.random.default_rng(1).standard_normal(size.shape))
    low, high = fits.interval(fits.iso_flop, (compute, size, loss), lambda fit: fit.exponent, draws=50)
    assert low < K < high and high - low < 0.1


def test_the_best_learning_rate():
    rates = 2.0 ** np.arange(-10, -3)
    loss = lambda rates: 2.2 + 0.05 * (np.log2(rates) + 6.8) ** 2
    assert np.log2(fits.best_rate(rates, loss(rates))) == pytest.approx(-6.8)
    assert np.log2(fits.best_rate(rates[::-1], loss(rates[::-1]))) == pytest.approx(-6.8)


@pytest.mark.parametrize(
    "fit,message",
    [
        (lambda: fits.best_rate([1e-3, 1e-2, 1e-1], [1.0, 2.0, 3.0]), "the best is at the edge"),
        (lambda: fits.best_rate([1e-3, 1e-2], [1.0, 2.0]), "2 values"),
        (lambda: fits.iso_flop([1, 1, 1, 2, 2, 2], [1, 2, 3] * 2, [2, 1, 2] * 2), "2 budgets"),
        (
            lambda: fits.iso_flop([1, 1, 1, 2, 2, 2, 4, 4, 4], [1, 2, 3] * 3, [2, 1, 2] * 2 + [3, 2, 1]),
            "at 4 FLOPs: .* edge",
        ),
        (lambda: fits.surface([1, 2, 3, 1, 2, 3], [1, 1, 1, 2, 2, 2], np.ones(6)), "3 sizes, 2 numbers of tokens"),
    ],
)
def test_what_is_refused(fit, message):
    with pytest.raises(fits.Refused, match=message):
        fit()


def test_rates_are_compared_by_the_seeds_that_all_have():
    """The best one has been run with more, which say nothing of the others."""

    def row(rate, by_seed, metric=None):
        values = {"optimizer.learning_rate": f"{rate:g}"}
        results = [(metric or bits_per("byte")).describe() | {"valid": valid} for valid in by_seed.values()]
        return Row(values, [], results, list(by_seed), [], None, None)

    rates = [2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5]
    rows = [row(rate, {"0": (np.log2(rate) + 6.8) ** 2}) for rate in rates]
    rows[1].results.append(rows[1].first | {"valid": 100.0})
    rows[1].seeds.append("1")
    assert "- `all`: 0.00897, 2^-6.80" in fits.report(("lr",), rows, rows)
    rising = [row(rate, {"0": 0.9 - 0.1 * (np.log2(rate) + 6.8) ** 2}, ACCURACY) for rate in rates]
    assert "- `all`: 0.00897, 2^-6.80" in fits.report(("lr",), rising, rising), "the best accuracy is the highest"
    rows[0] = row(rates[0], {"2": 1.0})
    assert "- `all`: no fit: no seed has been run with all of them" in fits.report(("lr",), rows, rows)


def test_the_report():
    """Of runs on the surface, by row: what is kept apart, what is found again, what is refused."""
    rows = []
    for mixer, width, size, flops in (
        ("gla", "16", 7e3, 1e4),
        ("gla", "24", 1.3e4, 2e4),
        ("gla", "32", 2e4, 3e4),
        ("s4", "16", 7e3, 1e4),
    ):
        for steps in (200, 800, 3200):
            values = {
                "mixer": mixer,
                "model.width": width,
                "train.steps": f"{steps}",
                "optimizer.learning_rate": "0.001",
            }
            cell = Cell(values, (), Path("unused"), {"train": {"steps": steps, "batch_size": 8}})
            result = {
                **bits_per("byte").describe(),
                "length": 16,
                "test": {"16": TRUE(size, steps * 8 * 16)},
                "valid": 1.0,
            }
            rows.append(
                Row(values, [cell], [result], [None], [], Summary("model", int(size), int(size), flops, None), None)
            )
    scaling, rates = (
        "\n".join(fits.report(("scaling",), rows, rows, ("optimizer.learning_rate",))),
        "\n".join(fits.report(("lr",), rows, rows)),
    )
    kept, found, alone = re.search("### `gla`\n(.*)\n(.*)\n### `s4`\n(.*)", scaling).groups()
    numbers = re.search(
        r"L = (.*) \+ .* N\^-([\d.]+) .* D\^-([\d.]+); .* no run is further from it than ([\d.e-]+) %", kept
    )
    np.testing.assert_allclose([float(n) for n in numbers.groups()[:3]], (1.69, 0.34, 0.28), rtol=1e-3)
    assert found.startswith("- iso-FLOP: no fit: at 7.68e+08 FLOPs: 1 values")  # each run has a budget of its own
    assert alone == "- loss surface: no fit: 1 sizes, 3 numbers of tokens, 3 runs; a surface takes 3, 3 and 6"
    assert "- `gla, model.width=16, train.steps=200`: no fit: 1 values, a parabola takes 3" in rates


def test_a_ladder(text, tmp_path):
    """Each width is scaled from the first, its heads grow, and its steps take the budget."""
    settings = {key: value for key, value in SMALL.items() if key not in ("model.width", "train.steps", "model.depth")}
    axes, settings = ladder.rungs(
        (16, 24),
        {"mixer": ["attention"], "seed": ["0", "1"]},
        settings | {"corpus": f"file:{text}", "model.depth": "1"},
    )
    made = Request(str(ROOT / "configs/lm.py"), axes, tmp_path / "sweep", settings, base_width=16)
    planned = cells.plan(ladder.climb(made, (3e9,)))
    assert [cell.config["model"]["width"] for cell in planned] == [16, 16, 24, 24]
    for cell in planned:
        assert not cell.error
        assert 3 * cell.cost.flops_per_token * cell.steps * 8 * 16 == pytest.approx(3e9, rel=0.01)
        model = cell.config["model"]
        assert model["base_width"] == 16 and model["mixer"]["attention"]["heads"] == model["width"] // 4


def test_budgets_of_sized_models_and_of_listed_seeds(text, tmp_path):
    """Steps are those of the model at the width that the match gives it, and each cell keeps the seed that it is listed with."""
    made = request(text, tmp_path, {"mixer": "attention,mamba"}, match="state")
    made.settings["model.mixer.mamba.state"] = "4"
    del made.settings["train.steps"]
    listed = [{"mixer": mixer, "seed": seed} for mixer in ("attention", "mamba") for seed in ("3", "4")]
    planned = cells.plan(ladder.climb(dataclasses.replace(made, axes={}, points=listed), (3e9,)))
    assert [(cell.values["mixer"], cell.config["seed"]) for cell in planned] == [
        ("attention", 3),
        ("attention", 4),
        ("mamba", 3),
        ("mamba", 4),
    ]
    assert planned[2].sized.width != 16
    for cell in planned:
        assert 3 * cell.cost.flops_per_token * cell.steps * 8 * 16 == pytest.approx(3e9, rel=0.01)


def test_all_heads_of_a_ladder_grow():
    """So that as many share one as at the base, which the scaling finds again; a single one stays single."""
    given = {"heads": 4, "kv_heads": 2}
    model = {"width": 64, "mixer": {"attention": given, "lact": {"heads": 4, "memory_heads": 1}}}
    grown = sizing.heads(model, 16)
    assert grown == {
        "model.mixer.attention.heads": 16,
        "model.mixer.attention.kv_heads": 8,
        "model.mixer.lact.heads": 16,
    }
    own = {key.rpartition(".")[2]: count for key, count in grown.items() if ".attention." in key}
    config = ModelConfig(
        pattern=("attention",), width=64, base_width=16, vocab_size=8, targets=8, length=16, mixer={"attention": own}
    )
    assert {key: config.base.mixer["attention"][key] for key in given} == given
    with pytest.raises(
        UserError, match=r"kv_heads=3 of mixer 'attention' at width 16 is no whole number of heads at width 24"
    ):
        sizing.heads({"width": 24, "mixer": {"attention": {"heads": 6, "kv_heads": 3}}}, 16)


@pytest.mark.parametrize(
    "options,message",
    [
        (["--ladder=16,32", "--set", "model.width=16"], "model.width is what --ladder or --budgets decides"),
        (["--ladder=16,32", "--over", "mixer=gla,mamba", "--match=params"], "choose one"),
        (["--budgets=1e9,1e8", "--over", "seed=0"], "ascending"),
        (["--budgets=1e9", "--over", "train.steps=1,2"], "train.steps is what"),
        (["--budgets=2", "--over", "seed=0"], r"2 operations are 0\.0 steps"),
        (["--fit=lrs", "--over", "seed=0"], "did you mean 'lr'"),
    ],
)
def test_ladders_that_are_refused(text, tmp_path, options, message):
    line = [f"--config={ROOT}/configs/lm.py:corpus=file:{text}", f"--workdir={tmp_path}", *options]
    with pytest.raises(UserError, match=message):
        program.requested(program.parser().parse_args(line))
