"""Long Range Arena and its stand-ins: classification of long sequences.

    python train.py --config=configs/lra.py:task=listops,mixer=s4d --workdir=runs/listops
    python train.py --config=configs/lra.py:task=image,mixer=s4d,size=paper --workdir=runs/image --config.task.protocol=s4

Keys of the argument:
  task: listops, text, retrieval, image, pathfinder; fashion_mnist_pixels, digits_pixels, mnist1d; or any other of
    `data/tasks/`.
  mixer: a mixer, or several joined by "+", a pattern that the depth repeats.
  size: "cpu" (minutes on two cores) or "paper" (the task's published size, in a model of the S4 line's size).
"""

from ml_collections import ConfigDict

from configs import common
from data import task as tasks

# width, depth, norm, batch size, learning rate, steps
SIZES = {
    "cpu": (64, 2, "rmsnorm", 32, 3e-3, 2000),
    "paper": (256, 6, "batchnorm", 32, 4e-3, 120_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/lra.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/lra.py", task="listops", mixer="s4d", size="cpu")
    width, depth, norm, batch_size, learning_rate, steps = common.choose("size", choice["size"], SIZES)
    paper = tasks.find(choice["task"]).paper_size if choice["size"] == "paper" else {}
    return common.experiment(
        common.task_section(choice["task"], **paper),
        common.model(common.pattern(choice["mixer"]), width, depth, norm=norm, embedding_scale=width**0.5),
        common.optimizer(learning_rate, steps, warmup_steps=steps // 10, weight_decay=0.05),
        common.train(steps, batch_size, eval_every=steps // 10, checkpoint_every=steps // 10),
    )
