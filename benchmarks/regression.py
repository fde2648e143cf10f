"""What the regression losses are worth under clean and under heavy-tailed training labels.

    python -m benchmarks.regression
    python -m benchmarks.regression --noises=heavy-tailed --losses=laplace,rle,rle_authors
    python -m benchmarks.regression --mixer=attention --steps=3000 --seeds=3 --json=regression.json

Trains a small model on the task `gaze` with each loss of `models.heads` and each label noise, all else being equal, and prints
the mean angular error after the last step on the valid split, in degrees, beside the task's floors. The labels of that split
are clean and nothing is chosen by them.
"""

import argparse
import json
import statistics
import sys
import tempfile

from absl import flags

from common import command


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--noises", default="", help="of the training labels, joined by commas; all by default")
    parser.add_argument("--losses", default="", help="joined by commas; all by default")
    parser.add_argument("--json", type=command.new_file, help="where to write the errors of all runs")
    options = parser.parse_args(arguments)
    flags.FLAGS(sys.argv[:1])  # the input pipeline reads absl's flags

    from common.errors import check_choice, check_range
    from data import label_noise, task
    from models.heads import LOSSES

    check_range("--seeds", options.seeds, 1)
    noises = options.noises.split(",") if options.noises else label_noise.NOISES
    losses = options.losses.split(",") if options.losses else LOSSES
    for what, values, known in (("--noises", noises, label_noise.NOISES), ("--losses", losses, LOSSES)):
        for value in values:
            check_choice(what, value, known)
    errors = {
        (noise, loss): [train(options, noise, loss, seed) for seed in range(options.seeds)]
        for noise in noises
        for loss in losses
    }
    print(
        f"\nmean angular error in degrees, {options.mixer}, {options.steps} steps, {options.seeds} seed(s): mean (spread)"
    )
    print(f"{'training labels':<20}" + "".join(f"{loss:>18}" for loss in losses))
    for noise in noises:
        cells = (errors[noise, loss] for loss in losses)
        shown = (f"{statistics.mean(cell):.2f} ({max(cell) - min(cell):.2f})" for cell in cells)
        print(f"{noise:<20}" + "".join(f"{text:>18}" for text in shown))
    for noise in noises:
        floors = task.create("gaze", label_noise=noise).floors("valid")
        print(f"{noise}: " + ", ".join(f"{name} {value:.2f}" for name, value in floors.items()))
    if options.json:
        runs = [{"label_noise": noise, "loss": loss, "errors": cell} for (noise, loss), cell in errors.items()]
        options.json.write_text(json.dumps({"mixer": options.mixer, "steps": options.steps, "runs": runs}, indent=2))


def train(options: argparse.Namespace, noise: str, loss: str, seed: int) -> float:
    """The error of one run, in degrees."""
    from configs import regression
    from training import config, loop

    chosen = regression.get_config(f"task=gaze,mixer={options.mixer},loss={loss}")
    chosen.seed = seed
    chosen.task.label_noise = noise
    chosen.optimizer.warmup_steps = options.steps // 10
    chosen.train.update({"steps": options.steps, "eval_every": 0, "checkpoint_every": 0})
    chosen.train.log_every = max(1, options.steps // 4)
    with tempfile.TemporaryDirectory() as folder:
        return loop.train(config.resolve(chosen), folder).result["angular_error"]


if __name__ == "__main__":
    command.run(main)
