"""Regression of real numbers from long sequences, with any of the losses of `models.heads`.

    python train.py --config=configs/regression.py:task=gaze,mixer=gla,loss=rle --workdir=runs/gaze
    python train.py --config=configs/regression.py:loss=squared --workdir=runs/noisy --config.task.label_noise=heavy-tailed

Keys of the argument:
  task: gaze, keypoints, adding, or any other of `data/tasks/` whose targets are real numbers.
  mixer: a mixer, or several joined by "+", a pattern that the depth repeats.
  loss: squared, absolute, laplace, or rle and rle_authors (of an even number of targets).
  size: "cpu" (minutes on two cores) or "paper" (the task's larger size).
"""

from ml_collections import ConfigDict

from configs import common
from data import task as tasks

# width, depth, batch size, learning rate, steps
SIZES = {
    "cpu": (32, 2, 32, 3e-3, 1500),
    "paper": (128, 4, 64, 1e-3, 50_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/regression.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/regression.py", task="gaze", mixer="gla", loss="rle", size="cpu")
    width, depth, batch_size, learning_rate, steps = common.choose("size", choice["size"], SIZES)
    paper = tasks.find(choice["task"]).paper_size if choice["size"] == "paper" else {}
    pattern = common.pattern(choice["mixer"])
    return common.experiment(
        common.task_section(choice["task"], **paper),
        # Where a pixel lies is what is asked: the mean over positions needs to know the absolute one.
        common.model(pattern, width, depth, loss=choice["loss"], position_embedding="sinusoidal"),
        common.optimizer(learning_rate, steps, warmup_steps=steps // 10, weight_decay=0.01),
        common.train(steps, batch_size, eval_every=max(1, steps // 4)),
    )
