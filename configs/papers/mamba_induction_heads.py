"""Mamba on induction heads (arXiv 2312.00752, section 4.1.2, table 11).

    python train.py --config=configs/papers/mamba_induction_heads.py --workdir=runs/mamba_induction
    python -m evaluation.expect --workdir=runs/mamba_induction
    python eval.py --workdir=runs/mamba_induction --lengths=64,256,1024,4096,16384,65536

size: paper, or small, for two CPU cores: trained at length 64, by 2,000 steps of 32 rows with a learning rate of 3e-3.

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

EPOCH = 8192
# length, steps, batch size, learning rate, evaluations
SIZES = {"paper": (256, 25 * EPOCH, 8, 1e-3, 25), "small": (64, 2000, 32, 3e-3, 4)}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/mamba_induction_heads.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/papers/mamba_induction_heads.py", size="paper")
    length, steps, batch_size, rate, evaluations = common.choose("size", choice["size"], SIZES)
    task = published.task("induction_heads", length=length)
    model = common.model(("mamba",), 64, 1)
    model.depth = 2
    config = common.experiment(
        task,
        model,
        common.optimizer(
            rate,
            steps,
            "adam",
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            b2=0.999,
            clip_norm=0.0,
        ),
        published.train(steps, batch_size, evaluations),
    )
    positions = batch_size * task.length
    config.expect = published.expect(
        1.0,
        0.01,
        "arXiv 2312.00752, table 11, Mamba at 2^8",
        seeds=1,
        hours=published.hours(steps * positions, rate=200 * positions),
    )
    return config
