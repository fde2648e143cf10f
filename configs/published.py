"""What the files of `configs/papers/` share: tasks as they were published, the training of the S4 line, the expect section."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from data import task as tasks

# Of a row of the Long Range Arena, both texts of a pair counted.
POSITIONS = {
    "listops": 2048,
    "text": 4096,
    "retrieval": 2 * 4000,
    "image": 1024,
    "pathfinder": 32**2,
    "path_x": 128**2,
}


def task(name: str, **options) -> ConfigDict:
    """The task section: the task's paper size, then `options`."""
    return common.task_section(name, **{**tasks.find(name).paper_size, **options})


def lra_task(name: str) -> ConfigDict:
    """A task of the Long Range Arena in the form of state-spaces/s4, from which most results come; "path_x" is among them.

    The published numbers are of the released data: give its folder as config.task.data_dir. ListOps alone is drawn anew where
    none is given.
    """
    options = {
        "listops": {"length": 2048, "max_length": 2000},
        "text": {"length": 4096},
        "path_x": {"side": 128},
    }.get(name, {})
    return task("pathfinder" if name == "path_x" else name, protocol="s4", **options)


def s4_optimizer(
    learning_rate: float, steps: int, warmup_steps: int, weight_decay: float, ssm_scale: float
) -> ConfigDict:
    """AdamW as the S4 line has it: a cosine to 0, no clipping, and the state space at `ssm_scale` times the learning rate."""
    return common.optimizer(
        learning_rate,
        steps,
        warmup_steps=warmup_steps,
        final_fraction=0.0,
        weight_decay=weight_decay,
        b2=0.999,
        clip_norm=0.0,
        group_scale={"default": 1.0, "ssm": ssm_scale},
    )


def train(steps: int, batch_size: int, evaluations: int, **options) -> ConfigDict:
    """The train section. Each evaluation is saved, so that the best of them can be scored on the test split."""
    every = max(1, steps // evaluations)
    return common.train(
        steps, batch_size, log_every=min(100, every), eval_every=every, checkpoint_every=every, **options
    )


def hours(positions: int, rate: float = 6e5) -> float:
    """An estimate, not a measurement, of the hours of a run on one A100 or H100.

    Args:
      positions: that training goes through.
      rate: positions in a second. The default is between the 4e5 and 8.5e5 at which the authors' S4 of six layers of 256 or 512
        channels goes through the Long Range Arena on an A100 (state-spaces/s4, models/s4/experiments.md).
    """
    return float(f"{positions / rate / 3600:.2g}")


def lra_hours(name: str, steps: int, batch_size: int) -> float:
    """`hours` of a task of the Long Range Arena."""
    return hours(steps * batch_size * POSITIONS[name])


def small(
    task: ConfigDict,
    pattern: tuple[str, ...],
    width: int,
    depth: int,
    learning_rate: float,
    steps: int,
    batch_size: int,
) -> ConfigDict:
    """An experiment for minutes on two CPU cores, without its expect section: the model of `configs/recall.py`, two evaluations.

    `depth` is in blocks of a mixer and a channel mixer, see `common.blocks`.
    """
    return common.experiment(
        task,
        common.model(pattern, width, depth, pooling="last", embedding_scale=width**0.5),
        common.optimizer(learning_rate, steps, warmup_steps=steps // 10),
        train(steps, batch_size, 2),
    )


def expect(
    value: float | None,
    tolerance: float,
    source: str,
    *,
    seeds: int,
    hours: float,
    metric: str = "accuracy",
    length: int | None = None,
) -> ConfigDict:
    """The expect section, see `training.config.Expect`."""
    section = ConfigDict(
        {
            "metric": metric,
            "value": placeholder(float) if value is None else value,
            "tolerance": tolerance,
            "source": source,
            "seeds": seeds,
            "hours": hours,
        }
    )
    if length is not None:
        section.length = length
    return section
