"""MNIST-1D (arXiv 2011.14439).

    python train.py --config=configs/papers/mnist1d.py:mixer=s4d --workdir=runs/mnist1d
    python -m evaluation.expect --workdir=runs/mnist1d
    python sweep.py --config=configs/papers/mnist1d.py --over mixer=s4d,hyena seed=0,1,2 --workdir=runs/mnist1d_seeds

mixer: s4d or hyena.

Expected, accuracy on the test split (the table of the authors' README): logistic regression 32, an MLP 68, a convolutional
network 94, a GRU 91 %; with the positions shuffled 32, 68, 56, 57 %. None of these models is here. Long convolutions, which share
the convolutional network's prior, are compared with its 94 %. Tolerance: 4 points, of our choosing.

Recipe, chosen here: two layers of width 64, mean pooling, 1,500 steps of 32 rows, AdamW with weight decay 0.05.

What is not as published: the model; 3,500 rows are trained on, and 500 choose the checkpoint (there 4,000 are trained on).

Hours in `expect`: measured on two cores that other work shared.
"""

from ml_collections import ConfigDict

from configs import common, published

MIXERS = ("s4d", "hyena")


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/mnist1d.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/mnist1d.py", mixer="s4d")
    mixer = common.choose("mixer", choice["mixer"], {name: name for name in MIXERS})
    config = published.small(common.task_section("mnist1d"), (mixer,), 64, 2, 3e-3, 1500, 32)
    config.model.pooling = "mean"
    config.optimizer.weight_decay = 0.05
    config.train.update({"eval_every": 250, "checkpoint_every": 250})
    config.expect = published.expect(
        0.94, 0.04, "arXiv 2011.14439, the convolutional network in the authors' README", seeds=3, hours=0.05
    )
    return config
