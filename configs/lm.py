"""Language modelling on the bytes of a text.

    python train.py --config=configs/lm.py --workdir=runs/first
    python train.py --config=configs/lm.py:mixer=mamba,size=small --workdir=runs/mamba --config.model.mixer.mamba.state=32

Keys of the argument:
  mixer: a mixer, or several joined by "+", a pattern that the depth repeats ("gla+gla+local_attention"); the size's
    depth is rounded up to whole patterns.
  size: "default", "small", "medium" or "large".
  corpus: what to train on, see `data/tasks/language_model.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from models.mixer import defaults, find

# width, depth (in blocks of a token mixer and a channel mixer), length, batch size, optimiser, learning rate, steps.
# "default" is for a few minutes on two CPU cores, where Muon learns more from as many bytes than AdamW.
SIZES = {
    "default": (128, 4, 256, 8, "muon", 1.5e-2, 1200),
    "small": (512, 8, 1024, 32, "adamw", 1.5e-3, 20_000),
    "medium": (1024, 24, 2048, 128, "adamw", 6e-4, 50_000),
    "large": (2048, 24, 4096, 256, "adamw", 3e-4, 100_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/lm.py:<arg>`.

    Raises:
      ValueError: for a key or a value that does not exist.
    """
    choice = {"mixer": "mamba+local_attention", "size": "default", "corpus": "auto"}
    for item in filter(None, arg.split(",")):
        key, _, value = item.partition("=")
        if key not in choice:
            raise ValueError(f"configs/lm.py takes {', '.join(choice)} (as in 'mixer=mamba,size=small'), not {item!r}")
        choice[key] = value
    if choice["size"] not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {choice['size']!r}")
    width, depth, length, batch_size, optimizer, learning_rate, steps = SIZES[choice["size"]]
    pattern = tuple(choice["mixer"].split("+"))
    if all(find(name).replaces_channel_mixer for name in pattern):
        depth *= 2  # two such blocks stand for one with a channel mixer

    depth = -(-depth // len(pattern)) * len(pattern)

    config = ConfigDict()
    config.seed = 0
    config.task = ConfigDict(
        {
            "name": "language_model",
            "corpus": choice["corpus"],
            "length": length,
            "packing": "windows",
            "data_dir": placeholder(str),  # of TFDS data sets
        }
    )
    config.model = ConfigDict(
        {
            "length": placeholder(int),  # for mixers that are built for one; left out, the task's
            "width": width,
            "depth": depth,
            "pattern": pattern,
            "mixer": {name: defaults(name) for name in dict.fromkeys(pattern)},
            "channel_mixer": "auto",
            "expansion": 4.0,
            "channel_size": placeholder(int),
            "channel_bias": False,
            "norm": "rmsnorm",
            "norm_eps": placeholder(float),
            "norm_position": "pre",
            "embedding_norm": False,
            "embedding_scale": 1.0,
            "position_embedding": "auto",
            "tie_embeddings": True,
            "logit_cap": 0.0,
            "dropout": 0.0,
            "remat": "none",
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": optimizer,
            "learning_rate": learning_rate,
            "schedule": "cosine",
            "warmup_steps": steps // 40,
            "decay_fraction": 0.2,
            "final_fraction": 0.02,
            "weight_decay": 0.1,
            "b1": 0.95 if optimizer == "muon" else 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip_norm": 1.0,
            "group_scale": {"default": 1.0, "ssm": 0.25},
        }
    )
    config.train = ConfigDict(
        {
            "steps": steps,
            "batch_size": batch_size,
            "accumulation": 1,
            "z_loss": 0.0,
            "compute_dtype": "float32" if choice["size"] == "default" else "bfloat16",
            "implementation": "auto",
            "log_every": max(1, steps // 24),
            "eval_every": max(1, steps // 2),
            "eval_batches": 0,  # 0: the whole validation split
            "checkpoint_every": max(1, steps // 4),
            "keep": 2,
            "profile_step": 0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})
    return config
