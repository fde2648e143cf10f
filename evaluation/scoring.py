"""Checkpoints in use: scoring splits and sampling."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.console import say
from common.errors import UserError, check_choice
from data import task as tasks
from evaluation import report
from evaluation.sampling import generate
from ops import dispatch
from training import loop
from training.checkpoints import Checkpoints
from training.config import Config, resolve
from training.run_directory import read_config
from training.state import Built, cast
from training.step import make_eval_step
from training.validation import per_word


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: its configuration, its functions, its parameters, and the run and step that they come from."""

    config: Config
    built: Built
    params: Any
    workdir: Path
    step: int


def load(workdir: str | Path, checkpoint: str = "best") -> Loaded:
    """Loads the model of a run onto this machine's devices, whatever it was trained on.

    Args:
      workdir: the run's directory.
      checkpoint: "best", "latest" or a step.

    Raises:
      UserError: if the directory holds no run.
      CheckpointError: if there is no such intact checkpoint.
    """
    workdir = Path(workdir)
    raw = read_config(workdir)
    config = resolve(raw | {"mesh": {"data": -1}})
    built = loop.build(config, for_training=False)
    which = int(checkpoint) if checkpoint.isdigit() else checkpoint
    restored = Checkpoints(workdir / "checkpoints").restore_params(built.abstract["params"], which)
    say(f"{workdir}: checkpoint of step {restored.step}")
    return Loaded(config, built, restored.state, workdir, restored.step)


def score(model: Loaded, split: str, lengths: list[int], batches: int = 0) -> list[tuple[int, dict[str, float]]]:
    """Scores a split at context lengths (by default the one of training) and prints the results.

    Those of valid and test are printed beside the floors: the one at the length of training, or else the last one.
    """
    config, trained = model.config, model.config.task.spec.length
    eval_step = make_eval_step(model.built, compute_dtype=config.train.compute_dtype)
    check_choice("split", split, config.task.splits)
    results = []
    for length in lengths or [trained]:
        task = config.task if length == trained else at_length(config, length)
        ways = model.built.mesh.size
        # The same number of tokens in a batch, whatever the length.
        rows = max(1, config.train.batch_size * trained // length // ways) * ways
        loader = loop.Batches(config, model.built, split, rows, task)
        with jax.set_mesh(model.built.mesh), dispatch.implementation(config.train.implementation):
            result = loop.evaluate_split(eval_step, model.params, loader, batches)
        result |= per_word(result, task.text_sizes(split))
        say(f"{split}, length {length}: {loop.describe(result, task.spec)}")
        results.append((length, result))
    if jax.process_index() == 0:
        if len(results) > 1:
            report.lengths(results, trained)
        if split != "train":
            report.floors(config.task, split, dict(results).get(trained, results[-1][1]))
    return results


def at_length(config: Config, length: int) -> tasks.Task:
    """The task of a run with rows of another length.

    Raises:
      UserError: if the task has one length only.
    """
    name = config.raw["task"]["name"]
    if "length" not in tasks.defaults(name):
        raise UserError(f"rows of task {name!r} have one length, {config.task.spec.length}; leave --lengths out")
    options = {key: value for key, value in config.raw["task"].items() if key != "name"} | {"length": length}
    options.setdefault("seed", config.seed)
    return tasks.create(name, **options)


def sample(model: Loaded, prompt: str, length: int, **options) -> str:
    """Generates text from a prompt, prints it with its speed, and keeps it in the run's `samples/`; see `sampling.generate`."""
    config, built = model.config, model.built
    params = cast(model.params, built.metadata, config.train.compute_dtype)
    with jax.set_mesh(built.mesh), dispatch.implementation(config.train.implementation):
        ids, speed = generate(
            lambda params, ids, carry: built.apply(params, ids, carry),
            lambda params, batch, capacity: built.merge(params).initial_carry(batch, capacity),
            params,
            np.asarray(config.task.encode(prompt))[None],
            length,
            **options,
        )
    text = prompt + config.task.decode(ids[0])
    unit = config.task.spec.unit
    say(f"{text}\n\n{speed['tokens_per_second']:,.0f} {unit}s/s (prefill {1e3 * speed['prefill_seconds']:.1f} ms)")
    if jax.process_index() == 0:
        folder = model.workdir / "samples"
        folder.mkdir(exist_ok=True)
        name = f"step{model.step}-seed{options.get('seed', 0)}.txt"
        (folder / name).write_text(text)
    return text
