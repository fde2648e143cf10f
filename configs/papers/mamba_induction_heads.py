"""Mamba on induction heads (arXiv 2312.00752, section 4.1.2, table 11).

    python train.py --config=configs/papers/mamba_induction_heads.py --workdir=runs/mamba_induction
    python -m evaluation.expect --workdir=runs/mamba_induction
    python eval.py --workdir=runs/mamba_induction --lengths=64,256,1024,4096,16384,65536

size: paper, or small, for two CPU cores: the same with a tenth of the steps, 20,480.

Expected: 100 % of the answers at the length of training, 256, and at all lengths up to 1,048,576 (table 11; rotary
attention has 100, 83.6, 31.3, 8.6, 5.5 % at 256, 512, 1,024, 4,096 and 16,384). Compared is the length of training; the
last command scores the others. Tolerance: 1 point, of our choosing.

Recipe: two Mamba layers of width 64 (74,000 parameters by the table, 67,520 here), vocabulary 16, 25 epochs of 8,192
steps of 8 rows, Adam without decay, learning rate 1e-3.

What is not known, and is chosen here: the schedule (constant), 0.9 and 0.999, no clipping; and the generator's details,
see `data/tasks/induction_heads.py`.

Hours in `expect`: an estimate for one A100 or H100, at 200 of these small steps in a second.

Initial values: the maps of the input start 1.73 times as large as the authors', the convolution's bias at 0.
"""

from ml_collections import ConfigDict

from configs import common, published

EPOCH, BATCH_SIZE = 8192, 8
SIZES = {"paper": (25 * EPOCH, 25), "small": (5 * EPOCH // 2, 5)}  # steps, evaluations


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/mamba_induction_heads.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/mamba_induction_heads.py", size="paper")
    steps, evaluations = common.choose("size", choice["size"], SIZES)
    task = published.task("induction_heads")
    model = common.model(("mamba",), 64, 1)
    model.depth = 2
    config = common.experiment(
        task,
        model,
        common.optimizer(
            1e-3,
            steps,
            "adam",
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            b2=0.999,
            clip_norm=0.0,
        ),
        published.train(steps, BATCH_SIZE, evaluations),
    )
    positions = BATCH_SIZE * task.length
    config.expect = published.expect(
        1.0,
        0.01,
        "arXiv 2312.00752, table 11, Mamba at 2^8",
        seeds=1,
        hours=published.hours(steps * positions, rate=200 * positions),
    )
    return config
