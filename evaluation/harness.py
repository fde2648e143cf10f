"""Scores a checkpoint on tasks of lm-evaluation-harness, its own and yours.

    python -m evaluation.harness --workdir=runs/lm --tasks=lambada_openai,arc_easy
    python -m evaluation.harness --hf=mamba-130m-hf --tasks=mine --include_path=my_tasks --limit=100

pip install -r requirements-harness.txt. The data of its own tasks comes from the Hugging Face Hub; a task of yours, a YAML file
in the folder that --include_path names, may read a local file (dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}).

A context that is too long loses its beginning, and a text longer than --max_length is scored in disjoint windows, the last one
moved back to full context, which is what the library does with models of transformers. Where nothing stands before what is
scored, --prefix does: models of ours have no token for the beginning of a text.
"""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import command
from common.console import say
from common.errors import UserError, check_range
from common.files import absolute, write_atomically
from evaluation import results
from evaluation.answers import Answers
from evaluation.loading import LoadedRun, load, load_hf

RESAMPLES = 1000  # for standard errors that have no formula


def installed() -> Any:
    """The library.

    Raises:
      UserError: if it is not installed.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a fork of a process that runs JAX may wait for ever
    try:
        import lm_eval.api.instance
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise UserError("this needs lm-evaluation-harness: pip install -r requirements-harness.txt") from None
    return lm_eval


def as_lm() -> type[Answers]:
    """`Answers` as the library takes it: a subclass of its LM, too."""
    return type("Checkpoint", (Answers, installed().api.model.LM), {})


def evaluate(
    run: LoadedRun,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What the library makes of a checkpoint.

    Args:
      run: the checkpoint.
      tasks: names.
      include_path: a folder of tasks of one's own; the library's are then looked into only where a name is not there.
      num_fewshot: examples before each question; None for what the task says.
      limit: the first so many questions of each task; None for all.
      **settings: of `Answers`.

    Returns:
      the library's "results" and what belongs to them.

    Raises:
      UserError: without the library, for an unknown task, and as `Answers` does.
    """
    lm_eval = installed()
    model = as_lm()(run, **settings)
    folder = None if include_path is None else absolute(include_path)
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--include_path={include_path} is no folder")
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=folder is None)
    if folder is not None and not set(tasks) <= set(manager.all_tasks):
        manager = lm_eval.tasks.TaskManager(include_path=folder)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks: there is no {', '.join(unknown)} in the library" + (f" or {folder}" if folder else "")
        )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )
    kept = {key: found[key] for key in ("results", "groups", "n-shot", "versions", "n-samples") if key in found}
    print(lm_eval.utils.make_table(found))
    asked = {"tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit, "max_length": model.max_length}
    asked |= {"prefix": model.decode(model.prefix), "include_path": folder}
    return {"checkpoint": str(run.workdir), **run.origin, "lm_eval": version("lm_eval"), **asked, **kept}


def write(run: LoadedRun, record: Mapping[str, Any], output: str | Path | None) -> None:
    """Writes what `evaluate` found into a folder; without one into the run's `evaluations/`, and for --hf nowhere."""
    folder = results.folder(run, output)
    if folder is None:
        return
    asked = {key: record[key] for key in ("include_path", "num_fewshot", "limit", "max_length", "prefix")}
    path = folder / f"{results.stem(run, 'harness', record['tasks'], asked)}.json"
    try:
        write_atomically(path, json.dumps(record, indent=1, default=str))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; give another folder as --output"
        ) from None
    say(f"kept as {path}")


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__, prog="python -m evaluation.harness")
    parser.add_argument("--workdir", metavar="DIR", help="the run's directory")
    parser.add_argument("--hf", metavar="DIR", help="a checkpoint in Hugging Face's format, in place of a run")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    parser.add_argument("--allow_other_data", action="store_true", help="go on where the run's data is not here")
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="tasks of the library, or of --include_path")
    parser.add_argument("--include_path", metavar="DIR", help="a folder of tasks of your own (YAML)")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--max_length", type=int, metavar="N", help="tokens that are read at once")
    parser.add_argument("--prefix", metavar="TEXT", help="stands before a text without context (default: a line's end)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="rows that are computed together (16)")
    parser.add_argument(
        "--output", metavar="DIR", help="where a JSON file is written; by default the run's evaluations/"
    )
    options = parser.parse_args(arguments)
    if (options.workdir is None) == (options.hf is None):
        raise UserError("give --workdir=DIR, a run, or --hf=DIR, a checkpoint in Hugging Face's format")
    if options.limit is not None:
        check_range("--limit", options.limit, 1)
    installed()
    command.start()
    if options.hf is not None:
        run = load_hf(options.hf)
    else:
        run = load(options.workdir, options.checkpoint, options.allow_other_data)
    names = ("include_path", "num_fewshot", "limit", "max_length", "prefix", "batch_size")
    record = evaluate(run, options.tasks.split(","), **{name: getattr(options, name) for name in names})
    write(run, record, options.output)


if __name__ == "__main__":
    command.run(main)
