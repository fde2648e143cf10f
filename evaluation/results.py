"""Where scores of a checkpoint are kept: in which folder, and under a name that nothing else has."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.loading import LoadedRun
from training.run_directory import locate


def folder(run: LoadedRun, output: str | Path | None) -> Path | None:
    """The folder that --output names, by default the run's `evaluations/`; None for a checkpoint that is no run's."""
    if output is not None:
        return locate(output, "--output")
    return None if run.config.task is None else run.workdir / "evaluations"


def stem(run: LoadedRun, what: str, tasks: Sequence[str], asked: Any) -> str:
    """The name of a file of scores, without its end: of another checkpoint, of other data or of other questions have another.

    Args:
      run: the checkpoint.
      what: the split, or the program, that is scored.
      tasks: their names.
      asked: all else that the scores are of, as JSON holds it.
    """
    whole = json.dumps([str(run.workdir), run.origin, list(tasks), asked])
    names = "_".join(tasks)[:40].replace("/", "-")
    return f"step{run.step}-{what}-{names}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
