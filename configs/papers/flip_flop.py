"""Flip-flop language modelling (arXiv 2306.00946), at a size for minutes on two CPU cores: one model, three test sets.

    python train.py --config=configs/papers/flip_flop.py:mixer=mamba --workdir=runs/flip_flop
    python -m evaluation.expect --workdir=runs/flip_flop
    python eval.py --workdir=runs/flip_flop --set task.test=same,sparse,dense

mixer: attention, mamba or delta_product.

Expected, from the abstract: Transformers keep a long tail of sporadic errors outside the training distribution; recurrent models
(there a one-layer LSTM) read without any. So a recurrent mixer is expected to read 100 % right on the test set like the
training set, and on the sparse one (FFL(.98)) and the dense one (FFL(.1)); attention has no value: how many errors it makes
there varies from run to run. Tolerance: half a point, of our choosing.

Recipe, chosen here: two layers of width 32, FFL(.8), 1,500 steps of 32 rows.

What is not as published: rows of 64 tokens (512 there), two layers (six, and 19 million parameters there), no LSTM.

Hours in `expect`: measured on two cores that other work shared.
"""

from ml_collections import ConfigDict

from configs import common, published

MIXERS = {"attention": None, "mamba": 1.0, "delta_product": 1.0}  # and their accuracy


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/flip_flop.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/flip_flop.py", mixer="mamba")
    accuracy = common.choose("mixer", choice["mixer"], MIXERS)
    task = common.task_section("flip_flop", length=64)
    config = published.small(task, (choice["mixer"],), 32, 2, 3e-3, 1500, 32)
    config.expect = published.expect(
        accuracy,
        0.005,
        "arXiv 2306.00946: the abstract, and section 4 for a recurrent model (from secondary copies)",
        seeds=3,
        hours=0.05,
    )
    return config
