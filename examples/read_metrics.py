"""Reads `metrics.jsonl`, the record of a run, with nothing but Python's own library, and shows a curve.

    python -m examples.read_metrics --workdir=runs/first
    python -m examples.read_metrics --workdir=runs/first --split=valid --metric=bits_per_byte

Each line is one JSON object: {"step": 50, "split": "train", "loss": 2.5, ...}. JSON has no NaN and no infinity: they are the
strings "NaN", "Infinity" and "-Infinity", which `float` understands. A killed process may have left half a line at the end.
`--plot=curve.png` draws with matplotlib, if it is installed.
"""

import argparse
import json
from pathlib import Path

WIDTH = 40  # characters of the longest bar


def read(workdir: Path, split: str, metric: str) -> dict[int, float]:
    """The values of a metric by step."""
    values = {}
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut by a kill
        if line["split"] == split and metric in line:
            values[line["step"]] = float(line[metric])
    return values


def main(workdir: Path, split: str, metric: str, plot: Path | None) -> None:
    if not (workdir / "metrics.jsonl").is_file():
        raise SystemExit(f"error: {workdir} holds no run: it has no metrics.jsonl")
    values = read(workdir, split, metric)
    if not values:
        raise SystemExit(f"error: {workdir} has no {metric} of {split}")
    largest = max((abs(value) for value in values.values() if abs(value) < float("inf")), default=0.0)
    for step, value in values.items():
        bar = round(WIDTH * abs(value) / largest) if abs(value) < float("inf") and largest else 0
        print(f"{step:>8}  {value:10.4f}  {'#' * bar}")
    if plot is not None:
        import matplotlib

        matplotlib.use("Agg")  # files only: no window is needed
        from matplotlib import pyplot

        pyplot.plot(list(values), list(values.values()))
        pyplot.xlabel("step")
        pyplot.ylabel(f"{metric} ({split})")
        pyplot.savefig(plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--metric", default="loss")
    parser.add_argument("--plot", type=Path)
    main(**vars(parser.parse_args()))
