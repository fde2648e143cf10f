"""Trains a sequence model.

    python train.py --config=configs/lm.py --workdir=runs/first
    python train.py --config=configs/lm.py:mixer=mamba --workdir=runs/mamba --config.train.steps=2000

Any key of the configuration is a flag; `--workdir` of an earlier run of the same configuration goes on with it.
"""

from absl import flags
from ml_collections import config_flags

from common import command

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", "configs/lm.py", "what to train", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: configuration, metrics, checkpoints")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "call jax.distributed.initialize() (pods, several hosts)")


def main(_):
    command.start(_DISTRIBUTED.value)
    from evaluation import report
    from training import config, loop

    resolved = config.resolve(_CONFIG.value)
    result = loop.train(resolved, _WORKDIR.value)
    if result:
        report.floors(resolved.task, "valid", result)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command.run(main)
