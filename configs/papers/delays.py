"""The adding problem over 1,000 steps, and copying over a delay (arXiv 1511.06464), at a size for minutes on two CPU cores.

    python train.py --config=configs/papers/delays.py:task=adding,mixer=lru --workdir=runs/adding
    python -m evaluation.expect --workdir=runs/adding

task: adding (T = 1000) or copying (10 tokens of 8 over a delay of 100).
mixer: lru, s4d or mamba.

Expected: the paper's unitary network learns to add over 750 steps and to copy over 1,000, where an LSTM stays at the error of
saying 1 (0.167, or 0.408 as a root) or past forgetting. Compared is the root mean squared error of adding with 0, tolerance
0.05 (an eighth of that of saying 1), and the accuracy of copying with 100 %, tolerance 1 point; all of our choosing, as the
paper has curves and no numbers.

Recipe, chosen here: two layers of width 32, 600 steps of 16 rows to add, 1,500 steps of 32 rows to copy.

What is not as published: the models; and the delay of copying, 1,000 there.

Hours in `expect`: measured on two cores that other work shared.
"""

from ml_collections import ConfigDict

from configs import common, published

MIXERS = ("lru", "s4d", "mamba")
# options of the task, learning rate, steps, batch size, metric, value, tolerance
RECIPES = {
    "adding": ({"length": 1000}, 3e-3, 600, 16, "rmse", 0.0, 0.05),
    "copying": ({"length": 120, "tokens": 10, "vocab_size": 10}, 3e-3, 1500, 32, "accuracy", 1.0, 0.01),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/delays.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/delays.py", task="adding", mixer="lru")
    mixer = common.choose("mixer", choice["mixer"], {name: name for name in MIXERS})
    options, rate, steps, batch_size, metric, value, tolerance = common.choose("task", choice["task"], RECIPES)
    config = published.small(common.task_section(choice["task"], **options), (mixer,), 32, 2, rate, steps, batch_size)
    config.expect = published.expect(
        value, tolerance, "arXiv 1511.06464, figures 1 and 2 (curves)", seeds=1, hours=0.2, metric=metric
    )
    return config
