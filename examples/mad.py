"""MAD (arXiv 2403.17844): the settings of its six tasks as cells of a sweep, and its score of what the sweep has found.

    python sweep.py --config=configs/recall.py:task=mad --cells=examples/mad.py --workdir=runs/mad --over mixer=attention,mamba \\
        optimizer.learning_rate=1e-4,5e-4,1e-3 optimizer.weight_decay=0,0.1 \\
        --best_of=optimizer.learning_rate,optimizer.weight_decay
    python -m examples.mad runs/mad

The baseline of each task alone, for minutes on two CPU cores, needs no --cells (docs/results.md has the first, smaller yet):

    python sweep.py --config=configs/recall.py:task=mad --workdir=runs/mad_small --over mixer=attention,mamba \\
        task.kind=in_context_recall,fuzzy_in_context_recall,noisy_in_context_recall,selective_copying,compression,memorization

The settings are the baseline of each task and what athms/mad-lab (configs/tasks/) changes of it, one thing at a time; a task's
score is the mean of its settings' accuracies, each with the best learning rate and weight decay, and MAD's is the mean over the
tasks. Their models have two blocks of width 128, and train for 200 epochs of batches of 128: 20,000 steps of 12,800 rows.
"""

import csv
import pathlib
import statistics

from common import command
from common.errors import UserError

KEYS = ("kind", "vocab_size", "length", "train_examples", "noise", "tokens")
# A None is the kind's baseline. Compression's rows hold the tokens twice, and so are twice as long as theirs, less 2.
TRAIN = (6400, 3200, 1600, 800)
CHANGES = {
    "in_context_recall": {"vocab_size": (32, 64, 128), "length": (256, 512, 1024), "train_examples": TRAIN},
    "fuzzy_in_context_recall": {"vocab_size": (32, 64, 128), "length": (256, 512, 1024), "train_examples": TRAIN},
    "noisy_in_context_recall": {
        "vocab_size": (48, 80, 144),
        "length": (256, 512, 1024),
        "train_examples": TRAIN,
        "noise": (0.4, 0.6, 0.8),
    },
    "selective_copying": {
        "vocab_size": (32, 64, 128),
        "length": (512, 1024),
        "train_examples": TRAIN,
        "tokens": (32, 64, 96),
    },
    "compression": {"vocab_size": (32, 64, 128), "length": (126, 254, 510), "train_examples": TRAIN},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}


def cells() -> list[dict[str, object]]:
    """The settings, by the keys of the configuration."""
    found = []
    for kind, changes in CHANGES.items():
        settings = [{}, *({key: value} for key, values in changes.items() for value in values)]
        found += [{f"task.{key}": ({"kind": kind} | setting).get(key) for key in KEYS} for setting in settings]
    return found


def scores(lines: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """By mixer the score of each task that has any finished cell, and "MAD", their mean.

    Args:
      lines: of a sweep's results.csv. Where other axes have several values for a setting, such as learning rates, what is best on
        the validation split counts, the first of equals, in the mean over its seeds; nothing is chosen by the test split.
    """
    found: dict[tuple[str, str], dict[tuple, dict[tuple, list[tuple[float, float]]]]] = {}
    for line in lines:
        if line["status"] == "finished" and line.get("chosen") != "False":
            settings = found.setdefault((line["mixer"], line["task.kind"]), {})
            setting = tuple(line.get(f"task.{key}") for key in KEYS)  # what is no axis is the same in all
            axes = list(line)[: list(line).index("status")]  # which stand first
            tuned = tuple(line[key] for key in axes if key != "seed")
            seeds = settings.setdefault(setting, {}).setdefault(tuned, [])
            seeds.append((float(line["valid"]), float(line["test"])))
    scored: dict[str, dict[str, float]] = {}
    for (mixer, kind), settings in found.items():
        means = [[tuple(map(statistics.mean, zip(*seeds))) for seeds in own.values()] for own in settings.values()]
        best = [max(own, key=lambda scores: scores[0]) for own in means]
        scored.setdefault(mixer, {})[kind] = statistics.mean(test for _, test in best)
    return {mixer: {**kinds, "MAD": statistics.mean(kinds.values())} for mixer, kinds in scored.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """The scores as text, in percent: a line for each task and one for their mean, a column for each mixer."""
    kinds = [kind for kind in CHANGES if any(kind in own for own in found.values())]
    lines = [["", *found]]
    for kind in (*kinds, "MAD"):
        lines.append([kind, *(f"{100 * own[kind]:.1f}" if kind in own else "-" for own in found.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("workdir", metavar="SWEEP", type=pathlib.Path, help="directory of the sweep")
    path = parser.parse_args(arguments).workdir / "results.csv"
    if not path.is_file():
        raise UserError(f"there is no {path}: give the directory of a sweep that has been run")
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if missing := [key for key in ("mixer", "task.kind") if key not in (lines or [{}])[0]]:
        raise UserError(f"{path.parent} has no axis {' and none '.join(missing)}: it is no sweep of MAD's tasks")
    unfinished = sum(line["status"] != "finished" for line in lines)
    if unfinished:
        print(f"{unfinished} of {len(lines)} cells are not finished, and left out")
    found = scores(lines)
    print(table(found))
    for mixer, own in found.items():
        if len(own) <= len(CHANGES):
            print(f"MAD of {mixer} is the mean over {len(own) - 1} of its {len(CHANGES)} tasks")


if __name__ == "__main__":
    command.run(main)
