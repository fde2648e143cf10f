"""Recall, state tracking and algorithms: small tasks that tell mixers apart.

    python train.py --config=configs/recall.py:task=mqar,mixer=mamba --workdir=runs/mqar
    python eval.py --workdir=runs/mqar --lengths=64,128,256

Keys of the argument:
  task: any task of `data/tasks/` that is generated (mqar, induction_heads, word_problem, max_gap, ...).
  mixer: a mixer, or several joined by "+", a pattern that the depth repeats.
  size: "cpu" (minutes on two cores) or "paper" (the task's published size).
"""

from ml_collections import ConfigDict

from configs import common
from data import task as tasks

# width, depth, batch size, learning rate, steps
SIZES = {
    "cpu": (64, 2, 64, 3e-3, 2000),
    "paper": (128, 2, 256, 1e-3, 100_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/recall.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/recall.py", task="mqar", mixer="mamba", size="cpu")
    width, depth, batch_size, learning_rate, steps = common.choose("size", choice["size"], SIZES)
    pattern = common.pattern(choice["mixer"])
    # The mean over a row knows sums without any memory: where rows are scored, what counts is the last token's state.
    paper = tasks.find(choice["task"]).paper_size if choice["size"] == "paper" else {}
    return common.experiment(
        common.task_section(choice["task"], **paper),
        # Tokens as large as what the first block writes beside them: attention finds them much sooner.
        common.model(pattern, width, depth, pooling="last", embedding_scale=width**0.5),
        common.optimizer(learning_rate, steps, warmup_steps=steps // 10),
        common.train(steps, batch_size, eval_every=steps // 10, checkpoint_every=steps // 10),
    )
