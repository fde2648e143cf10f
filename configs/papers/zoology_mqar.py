"""Multi-query associative recall, figure 2 of Zoology (arXiv 2312.04927).

    python train.py --config=configs/papers/zoology_mqar.py:mixer=attention,length=256,width=64,rate=2.2e-3 --workdir=runs/mqar
    python -m evaluation.expect --workdir=runs/mqar

Keys of the argument:
  mixer: attention, hyena, rwkv4, h3 or mamba.
  length: 64, 128, 256 or 512, with 4, 8, 16 or 64 pairs of a key and a value.
  width: 64, 128, 256 or 512.
  rate: 1e-4, 4.6e-4, 2.2e-3 or 1e-2. The figure shows, for each mixer, length and width, the best of these four learning rates:
    train all four.

Expected: the figure gives no numbers in print. Attention finds all values at every length from width 64 on, as far as the
figure shows: 100 %, with a tolerance of 1 point of our choosing, since training there stops once 99 % are right. Of the
others it shows that the width they need grows with the length and the number of pairs; they have no value here, and the
command that compares says so.

Recipe: HazyResearch/zoology, zoology/experiments/iclr24_zoology_figure2/configs.py: two layers of attention or four of
the others, no MLPs, LayerNorm, tied embeddings; AdamW, decay 0.1, a cosine without warm-up, 64 epochs of 100,000 rows,
batch size 512, 256 from length 256 and 128 from 512 (which stands there as a comment).

What is not as published:
  - training rows are new in every epoch; there the same 100,000 come 64 times. Training does not stop early, the best
    evaluation is what is scored;
  - attention knows positions by sinusoids with a learned scale; there by a learned table. Dropout of 0.1 on the
    embeddings and the attention weights is left out;
  - the cosine falls with each step; there with each epoch;
  - BaseConv, and Based behind a BaseConv, are not here; RWKV is version 4's time mixing.

Hours in `expect`: an estimate for one A100 or H100, at 2 million positions in a second.
"""

from ml_collections import ConfigDict

from configs import common, published

MIXERS = {"attention": 2, "hyena": 4, "rwkv4": 4, "h3": 4, "mamba": 4}  # and their layers
# length, pairs, batch size
LENGTHS = {"64": (64, 4, 512), "128": (128, 8, 512), "256": (256, 16, 256), "512": (512, 64, 128)}
WIDTHS = {str(width): width for width in (64, 128, 256, 512)}
RATES = {"1e-4": 1e-4, "4.6e-4": 10 ** (-10 / 3), "2.2e-3": 10 ** (-8 / 3), "1e-2": 1e-2}
ROWS, EPOCHS = 100_000, 64


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/papers/zoology_mqar.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(
        arg, "configs/papers/zoology_mqar.py", mixer="attention", length="256", width="64", rate="2.2e-3"
    )
    mixer = choice["mixer"]
    layers = common.choose("mixer", mixer, MIXERS)
    length, pairs, batch_size = common.choose("length", choice["length"], LENGTHS)
    steps = EPOCHS * -(-ROWS // batch_size)
    model = common.model(
        (mixer,),
        common.choose("width", choice["width"], WIDTHS),
        layers,
        channel_mixer="none",
        norm="layernorm",
        norm_eps=1e-5,
        tie_embeddings=True,
        position_embedding="sinusoidal" if mixer == "attention" else "auto",
    )
    model.depth = layers
    if mixer == "attention":
        model.mixer.attention.update({"heads": 1, "positions": "none"})
    if mixer == "h3":
        model.mixer.h3.update({"state": length, "head_size": 2})
    config = common.experiment(
        published.task("mqar", length=length, num_kv_pairs=pairs),
        model,
        published.s4_optimizer(common.choose("rate", choice["rate"], RATES), steps, 0, 0.1, 1.0),
        published.train(steps, batch_size, EPOCHS),
    )
    known = (
        "all right, read off the plot"
        if mixer == "attention"
        else "no number in print, see configs/papers/zoology_mqar.py"
    )
    config.expect = published.expect(
        1.0 if mixer == "attention" else None,
        0.01,
        f"arXiv 2312.04927, figure 2, {mixer} at the best of four learning rates ({known})",
        seeds=1,
        hours=published.hours(steps * batch_size * length, rate=2e6),
    )
    return config
