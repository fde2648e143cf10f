"""Language modelling on the bytes of a text.

    python train.py --config=configs/lm.py --workdir=runs/first
    python train.py --config=configs/lm.py:mixer=mamba,size=small --workdir=runs/mamba --config.model.mixer.mamba.state=32

Keys of the argument:
  mixer: a mixer, or several joined by "+", a pattern that the depth repeats ("gla+gla+local_attention"); the size's
    depth is rounded up to whole patterns.
  size: "default", "small", "medium", "large", "130m" or "1.3b".
  corpus: what to train on, see `data/tasks/language_model.py`.
  ngrams: the longest n-gram that has an embedding of its own beside the token's, see `models/ngram_embedding.py`; 1 for none.
    They learn much of what is near from few bytes, whatever the mixer: leave them out where mixers are compared. Their tables
    go by Adagrad (`optimizer.tables`).
"""

from ml_collections import ConfigDict

from configs import common

# width, depth (in blocks of a token mixer and a channel mixer), length, batch size, optimiser, learning rate, steps.
# "default" is for a few minutes on two CPU cores, where Muon learns more from as many bytes than AdamW.
SIZES = {
    "default": (128, 4, 256, 8, "muon", 1.5e-2, 1200),
    "small": (512, 8, 1024, 32, "adamw", 1.5e-3, 20_000),
    "medium": (1024, 24, 2048, 128, "adamw", 6e-4, 50_000),
    "large": (2048, 24, 4096, 256, "adamw", 3e-4, 100_000),
    # The smallest and the largest of the scaling laws of arXiv 2312.00752 (appendix E.2), half a million tokens a step.
    "130m": (768, 12, 2048, 256, "adamw", 6e-4, 4800),
    "1.3b": (2048, 24, 2048, 256, "adamw", 2e-4, 50_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/lm.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(
        arg, "configs/lm.py", mixer="mamba+local_attention", size="default", corpus="auto", ngrams="1"
    )
    size = common.choose("size", choice["size"], SIZES)
    width, depth, length, batch_size, optimizer, learning_rate, steps = size
    task = common.task_section("language_model", corpus=choice["corpus"], length=length)
    # Of the larger sizes, gates and norms of all layers would be most of what a device holds.
    remat = "none" if choice["size"] == "default" else "elementwise"
    longest = common.choose("ngrams", choice["ngrams"], {str(n): n for n in range(1, 9)})
    return common.experiment(
        task,
        common.model(common.pattern(choice["mixer"]), width, depth, remat=remat, ngrams=tuple(range(2, longest + 1))),
        common.optimizer(learning_rate, steps, optimizer, tables="adagrad" if longest > 1 else "same"),
        common.train(steps, batch_size, compute_dtype="float32" if choice["size"] == "default" else "bfloat16"),
    )
