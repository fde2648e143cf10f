"""Parity by DeltaNet, with and without negative eigenvalues (arXiv 2411.12537), at a size for minutes on two CPU cores.

    python train.py --config=configs/papers/negative_eigenvalues.py:eigenvalues=negative --workdir=runs/parity
    python -m evaluation.expect --workdir=runs/parity
    python eval.py --workdir=runs/parity --lengths=40,64,128,256

eigenvalues: negative (beta in (0, 2)) or positive (beta in (0, 1)).

Expected, from the abstract and its theorem: a linear recurrence whose transitions have positive eigenvalues only cannot compute
parity, and DeltaNet with negative ones can. Compared is the accuracy at 256, six times the length of training: 100 %, and
chance, 50 %. The paper's table has scaled accuracies of 1.000 and 0.017 up to length 256 (from memory, UNVERIFIED).
Tolerance, of our choosing: 5 points.

Recipe, chosen here: one layer of width 32, 800 steps of 32 rows of 40 bits, each position scored in training, no weight decay
(which keeps beta from 2).

What is not as published: training at lengths from 3 to 40, with the end of the row scored alone, models of two layers or more,
and the best of three seeds and several learning rates (all from memory, UNVERIFIED). What is not known: the width.

Hours in `expect`: measured on two cores that other work shared.
"""

from ml_collections import ConfigDict

from configs import common, published

# negative eigenvalues, accuracy
EIGENVALUES = {"negative": (True, 1.0), "positive": (False, 0.5)}
LENGTH, TESTED = 40, 256


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/negative_eigenvalues.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/negative_eigenvalues.py", eigenvalues="negative")
    negative, accuracy = common.choose("eigenvalues", choice["eigenvalues"], EIGENVALUES)
    task = common.task_section("word_problem", group="parity", length=LENGTH)
    config = published.small(task, ("delta_net",), 32, 1, 1e-2, 800, 32)
    config.optimizer.weight_decay = 0.0
    config.model.mixer.delta_net.negative_eigenvalues = negative
    config.expect = published.expect(
        accuracy,
        0.05,
        "arXiv 2411.12537: the abstract says that parity is solved with negative eigenvalues, and not without",
        seeds=3,
        hours=0.05,
        length=TESTED,
    )
    return config
