"""Shows what HiPPO's memory keeps: reconstructs a signal, online, from N coefficients under each measure.

    python -m benchmarks.hippo                                  draws hippo.png, prints the errors, writes hippo.json
    python -m benchmarks.hippo --state=16 --image= --json=      prints only

The signal is band-limited noise. After each step the memory holds N numbers; at three moments they are turned back into a
signal. The error is the root mean square over the past that the measure is about (all of it for LegS, the window for the
others), relative to the signal's. What is left at large N is the discretisation's, under LegS mostly that of the first steps:
`--method=zoh` has none there, and takes longer.
"""

import json
from pathlib import Path

import numpy as np

from common import command
from common.errors import UserError
from ops import hippo

SIZES = (4, 8, 16, 32, 64)
TITLES = {
    "legs": "LegS: all the past, uniformly",
    "legt": "LegT: a sliding window, Legendre polynomials",
    "fourier": "Fourier: a sliding window, sines and cosines",
    "lagt": "LagT: a fading past, Laguerre functions",
}
COLORS = {"legs": "#c1442e", "legt": "#2b6ca3", "fourier": "#2f8f6b", "lagt": "#8a5aa8"}


def noise(length: int, cycles: int, seed: int) -> np.ndarray:
    """Noise of unit variance with frequencies up to `cycles` half periods in `length` steps."""
    random = np.random.default_rng(seed)
    spectrum = random.standard_normal(cycles) + 1j * random.standard_normal(cycles)
    time = (np.arange(length) + 0.5) / length
    signal = np.real(spectrum @ np.exp(1j * np.pi * np.outer(np.arange(1, cycles + 1), time)))
    return signal / signal.std()


def unit(measure: str, window: int) -> float:
    """Steps in the measure's unit of time: the window; for Laguerre functions, which reach many units back, a part of it."""
    return window / 20 if measure == "lagt" else window


def past(measure: str, now: int, window: int) -> np.ndarray:
    """The steps that a reconstruction at time `now` is about."""
    return np.arange(0 if measure == "legs" else max(0, now - window), now)


def error(measure: str, signal: np.ndarray, c: np.ndarray, now: int, window: int) -> float:
    """Relative error of the reconstruction from the coefficients `c` of time `now`."""
    steps = past(measure, now, window)
    found = hippo.reconstruct(measure, c, steps + 0.5, now, unit(measure, window))
    return float(np.sqrt(np.sum((found - signal[steps]) ** 2) / np.sum(signal[steps] ** 2)))


def table(signal: np.ndarray, sizes, moments, window: int, method: str = "bilinear") -> tuple[list[dict], dict]:
    """Errors of every measure and size at some moments (times > 0, in steps), and the coefficients at those moments."""
    rows, kept = [], {}
    for measure in TITLES:
        for size in sizes:
            c = hippo.memory(measure, signal, size, unit(measure, window), method)
            for now in moments:
                kept[measure, size, now] = c[now - 1]
                value = error(measure, signal, c[now - 1], now, window)
                rows.append({"measure": measure, "state": size, "time": now, "error": value})
    return rows, kept


def draw(path: Path, signal: np.ndarray, rows: list[dict], kept: dict, size: int, moments, window: int) -> None:
    """Draws the reconstructions with `size` coefficients, and the last moment's errors over the sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13, 11), constrained_layout=True)
    grid = figure.add_gridspec(5, len(moments), height_ratios=[1, 1, 1, 1, 1.25])
    errors = {(row["measure"], row["state"], row["time"]): row["error"] for row in rows}
    limit = 1.25 * np.abs(signal).max()
    for i, (measure, title) in enumerate(TITLES.items()):
        for j, now in enumerate(moments):
            axes = figure.add_subplot(grid[i, j])
            steps = past(measure, now, window)
            found = hippo.reconstruct(measure, kept[measure, size, now], steps + 0.5, now, unit(measure, window))
            axes.axvspan(steps[0], now, color=COLORS[measure], alpha=0.07, lw=0)
            axes.plot(signal, color="0.8", lw=1)
            axes.plot(signal[:now], color="0.45", lw=1)
            axes.plot(steps + 0.5, found, color=COLORS[measure], lw=1.7)
            axes.axvline(now, color="0.2", lw=0.8, ls=":")
            axes.set(xlim=(0, len(signal)), ylim=(-limit, limit), xticks=[0, *moments[:-1]], yticks=[])
            axes.spines["left"].set_visible(False)
            label = f"t = {now}, error {errors[measure, size, now]:.1%}"
            axes.text(0.995, 0.97, label, transform=axes.transAxes, ha="right", va="top", fontsize=8, color="0.25")
            if j == 0:
                axes.set_title(title, loc="left", color=COLORS[measure], fontweight="bold", fontsize=10)
            if i + 1 < len(TITLES):
                axes.set_xticklabels([])
    axes = figure.add_subplot(grid[4, :])
    sizes = sorted({row["state"] for row in rows})
    for measure, title in TITLES.items():
        values = [errors[measure, n, moments[-1]] for n in sizes]
        axes.plot(sizes, values, "o-", color=COLORS[measure], label=title.split(":")[0], lw=1.7, ms=4)
    axes.set(xscale="log", yscale="log", xlabel="N, number of coefficients", ylabel="relative error")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.grid(color="0.92")
    axes.legend(frameon=False, ncols=len(TITLES), loc="lower left")
    axes.set_title(f"Error at t = {moments[-1]}, over the shaded past", loc="left", fontweight="bold", fontsize=10)
    figure.suptitle(f"HiPPO: a signal (grey) reconstructed online from {size} coefficients", fontsize=13)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--state", type=int, default=32, help="number of coefficients in the picture")
    parser.add_argument("--length", type=int, default=1200, help="steps of the signal")
    parser.add_argument("--window", type=int, default=300, help="steps in the window of the measures that have one")
    parser.add_argument("--cycles", type=int, default=24, help="highest frequency, in half periods in the signal")
    parser.add_argument("--method", default="bilinear", choices=hippo.METHODS, help="discretisation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--image", type=command.new_file, default="hippo.png", help="file for the picture; empty for none"
    )
    parser.add_argument(
        "--json", type=command.new_file, default="hippo.json", help="file for the errors; empty for none"
    )
    options = parser.parse_args(arguments)
    signal = noise(options.length, options.cycles, options.seed)
    moments = [options.length // 3, 2 * options.length // 3, options.length]
    sizes = sorted({*SIZES, options.state})
    rows, kept = table(signal, sizes, moments, options.window, options.method)
    print("| measure | N | " + " | ".join(f"error at t = {now}" for now in moments) + " |\n|---" + "|---" * 4 + "|")
    for start in range(0, len(rows), len(moments)):
        group = rows[start : start + len(moments)]
        values = " | ".join(f"{row['error']:.3%}" for row in group)
        print(f"| {group[0]['measure']} | {group[0]['state']} | {values} |")
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), "rows": rows}, indent=2, default=str))
    if options.image:
        try:
            draw(options.image, signal, rows, kept, options.state, moments, options.window)
        except ModuleNotFoundError as missing:
            raise UserError(
                f"the picture needs {missing.name}: pip install matplotlib, or say --image= for the numbers alone"
            ) from None
        print(f"\n{options.image}")


if __name__ == "__main__":
    command.run(main)
