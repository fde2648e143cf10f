"""An engine that only pretends to train, and sweeps for it."""

import json
import math
import pathlib

from data.metrics import ACCURACY, bits_per
from sweeps import cells, jobs
from sweeps.engine import Engine, Seen
from sweeps.request import Request

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {"task.length": "16", "model.width": "16", "model.depth": "2", "train.steps": "4", "train.batch_size": "8"}
SMALL["optimizer.warmup_steps"] = "1"


def request(text, folder, axes, **options):
    settings = {"corpus": f"file:{text}", **SMALL, **options.pop("settings", {})}
    axes = {key: values.split(",") for key, values in axes.items()}
    settings = {key: value for key, value in settings.items() if key not in axes or key == "train.steps"}
    return Request(str(ROOT / "configs/lm.py"), axes, folder / "sweep", settings, **options)


class Pretender(Engine):
    """Writes what a run leaves. Scores are 3 + seed / 10, 1 higher for mamba; lru fails, seed 8 diverges, 9 is interrupted."""

    name = "pretender"
    poll = 0.0

    def __init__(self, workdir=pathlib.Path("unused")):
        super().__init__(workdir)
        self.ran = []

    def submit(self, given, retries):
        for folder in given:
            cell = cells.load(folder)
            self.ran.append(cell.name)
            with jobs.attempt(folder) as record:
                if cell.values.get("mixer") == "lru":
                    record |= {"status": "failed", "error": "ValueError: it broke"}
                elif cell.values.get("seed") == "9":
                    record |= {"status": "interrupted", "error": None}
                elif cell.values.get("seed") == "8":
                    self.train(cell, math.nan)
                    record |= {"status": "diverged", "error": cell.diverged()}
                else:
                    self.finish(cell)
                    record |= {"status": "finished", "error": None, "devices": 4}
        return [folder.name for folder in given]

    def states(self, given):
        return dict.fromkeys(given, Seen("ended"))

    def cancel(self, given):
        raise AssertionError("nobody stops it")

    def score(self, cell):
        """Of a cell, on validation and test."""
        return 3 + int(cell.values.get("seed", 0)) / 10 + (cell.values.get("mixer") == "mamba")

    def train(self, cell, value):
        (cell.workdir / "checkpoints" / str(cell.steps)).mkdir(parents=True)
        (cell.workdir / "config.json").write_text(json.dumps(cell.config))
        (cell.workdir / "environment.json").write_text(json.dumps([ENVIRONMENT | {"fingerprint": cell.data}]))
        lines = [{"step": 2, "split": "train", "loss": 2.0, "tokens_per_second": 1000.0, "skipped": 0}]
        for step in (2, 4):
            score = "NaN" if math.isnan(value) else value + 1 / step
            lines.append({"step": step, "split": "valid", "bits_per_byte": score})
        (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def finish(self, cell):
        value = self.score(cell)
        self.train(cell, value)
        result = {"task": "text", **bits_per("byte").describe(), "data": cell.data}
        result |= {"floors": {"uniform": 8.0, "5-gram": 3.5}, "length": 16, "steps": 4, "step": 4}
        scores = {str(n): None if n > 40 else value + n / 1000 for n in {16, *cell.lengths}}
        grid = [
            {
                "settings": {"length": 24},
                **bits_per("byte").describe(),
                "score": value + 0.5,
                "floors": {"5-gram": 3.5},
            },
            {"settings": {"length": 99}, "score": None},
            {"settings": {"scored": "all"}, **ACCURACY.describe(), "score": value / 10, "floors": {"a": 0.1, "b": 0.2}},
        ]
        result |= {"asked": list(cell.score), "grid": grid if cell.score else []}
        (cell.workdir / "result.json").write_text(json.dumps(result | {"valid": value, "test": scores}))


ENVIRONMENT = {"git": None, "devices": {"count": 1, "kind": "abacus"}, "packages": {"jax": "1"}}
