"""Mamba on selective copying (arXiv 2312.00752, section 4.1.1, table 1 and appendix E.1).

    python train.py --config=configs/papers/mamba_selective_copying.py --workdir=runs/mamba_copying
    python -m evaluation.expect --workdir=runs/mamba_copying

Expected: 99.8 % of the 16 answers (table 1; for comparison S4 18.3, H3 57.0, Hyena 30.1, and 97.0 for a selective S6 in
S4's block). Tolerance: 1 point, of our choosing.

Recipe: two Mamba layers of width 64, 400,000 steps of 64 rows of 4,096 positions, vocabulary 16, a constant learning rate
of 1e-4.

What is not known, and is chosen here: the optimiser's other settings (Adam, 0.9 and 0.999, no decay, no clipping), the
norm (RMS, as in the authors' code), the state's size (16, the mixer's default), and the form of the questions, see
`data/tasks/selective_copying.py`.

Hours in `expect`: an estimate for one A100 or H100, at 3 million positions in a second.

Initial values: the maps of the input start 1.73 times as large as the authors', the convolution's bias at 0.
"""

from ml_collections import ConfigDict

from common.errors import UserError
from configs import common, published

STEPS, BATCH_SIZE = 400_000, 64


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/mamba_selective_copying.py`.

    Raises:
      UserError: for an argument; there is none.
    """
    if arg:
        raise UserError(f"configs/papers/mamba_selective_copying.py takes no argument, got {arg!r}")
    task = published.task("selective_copying")
    model = common.model(("mamba",), 64, 1)
    model.depth = 2
    config = common.experiment(
        task,
        model,
        common.optimizer(
            1e-4,
            STEPS,
            "adam",
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            b2=0.999,
            clip_norm=0.0,
        ),
        published.train(STEPS, BATCH_SIZE, 40),
    )
    config.expect = published.expect(
        0.998,
        0.01,
        "arXiv 2312.00752, table 1, S6 in the Mamba block",
        seeds=1,
        hours=published.hours(STEPS * BATCH_SIZE * task.length, rate=3e6),
    )
    return config
