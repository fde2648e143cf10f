"""Word problems by depth (The Illusion of State, arXiv 2404.08819; DeltaProduct, 2502.10297), for minutes on two CPU cores.

    python train.py --config=configs/papers/word_problems.py:group=S3,mixer=delta_product,depth=1 --workdir=runs/word_problem
    python -m evaluation.expect --workdir=runs/word_problem
    python sweep.py --config=configs/papers/word_problems.py --over group=S3,A5 mixer=mamba,delta_product depth=1,2 \\
        --workdir=runs/word_problems

group: Z5, S3 or A5: commutative; solvable, not commutative; not solvable.
mixer: attention, mamba, delta_product, or slstm.
depth: layers.

Expected: the first paper shows that the layers of a Transformer, S4 or Mamba that a group like A5 needs grow with the length, and
that a recurrent network needs one. The second, that one layer of DeltaProduct with two reflections a token can do it for S3
and for A5. So delta_product has 100 % at depth 1; the others have no value. Tolerance: 2 points, of our choosing.

Recipe, chosen here: width 64, a token and 8 elements, 2,000 steps of 64 rows at 1e-2 without weight decay (which keeps beta from
2), each position scored in training and the last in the test. With it one layer of delta_product learns the sign of S3 within 250
steps (33 %), and the rest between 1,000 and 1,250; with 12 elements it had not when the cosine of 1,500 steps ended.

What is not as published: lengths up to 25 (first) or 128 (second) there, and a sequence counts as right as a whole; a finite
training set, larger models, and many more rows.

Hours in `expect`: of CPU time, measured for delta_product at depth 1.
"""

from ml_collections import ConfigDict

from configs import common, published

MIXERS = {"attention": None, "mamba": None, "slstm": None, "delta_product": 1.0}  # and their accuracy at depth 1
GROUPS = ("Z5", "S3", "A5")
DEPTHS = {str(depth): depth for depth in (1, 2, 4)}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/word_problems.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/word_problems.py", group="S3", mixer="delta_product", depth="1")
    accuracy = common.choose("mixer", choice["mixer"], MIXERS)
    depth = common.choose("depth", choice["depth"], DEPTHS)
    task = common.task_section(
        "word_problem", group=common.choose("group", choice["group"], {g: g for g in GROUPS}), length=9, bos=True
    )
    config = published.small(task, (choice["mixer"],), 64, depth, 1e-2, 2000, 64)
    config.optimizer.update({"weight_decay": 0.0, "warmup_steps": 100})
    config.expect = published.expect(
        accuracy,
        0.02,
        "arXiv 2404.08819, and 2502.10297 for delta_product (from memory: one layer of two reflections does S3 and A5)",
        seeds=1,
        hours=0.04,
    )
    return config
