"""Language models whose layers are of several kinds, as they were published, and small editions of them.

    python train.py --config=configs/hybrids.py:name=jamba --workdir=runs/jamba
    python train.py --config=configs/hybrids.py:name=nemotron_h,size=paper --config.mesh.fsdp=256 --compile_for=v5e:16x16

Keys of the argument:
  name: samba (arXiv 2406.07522), griffin (2402.19427; the sizes are RecurrentGemma-2B's), jamba (2403.19887), falcon_h1
    (2507.22448) or nemotron_h (2504.03624).
  size: "tiny" (minutes on two cores), "small" (tens of millions of parameters), or "paper", of those that `PAPER` has: the
    released shapes, whose vocabulary is that of config.task.tokenizer.
  corpus: what to train on, see `data/tasks/language_model.py`.

The layers are those of the papers: which mixer is where, channel mixers, positions, norms and shares of the width. The training
is ours. What these models have and ours lack: Jamba's norms of dt, B and C in Mamba; Falcon-H1's scaling of single projections
(its factors before and behind each mixer are config.model.parallel.input_scale and output_scale); and dropout of any kind.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import common


class Hybrid(NamedTuple):
    """The layers of a model.

    Attributes:
      pattern, prefix, suffix: as of `models.pattern`.
      model: options of the model that are the same at every size.
      mixer: options by mixer that are the same at every size.
    """

    pattern: str
    prefix: str = ""
    suffix: str = ""
    model: dict[str, Any] = {}
    mixer: dict[str, dict[str, Any]] = {}


HYBRIDS = {
    "samba": Hybrid("mamba/swiglu+local_attention/swiglu", mixer={"local_attention": {"window": 2048}}),
    "griffin": Hybrid(
        "2*rglru+local_attention",
        suffix="2*rglru",
        model={"channel_mixer": "geglu", "channel_bias": True, "norm": "rmsnorm1p", "logit_cap": 30.0},
        mixer={
            "rglru": {"bias": True},
            "local_attention": {"kv_heads": 1, "window": 2048, "rotary_fraction": 0.5, "bias": True},
        },
    ),
    "jamba": Hybrid(
        "2*(mamba/swiglu+mamba/moe)+attention/swiglu+mamba/moe+mamba/swiglu+mamba/moe",
        model={"tie_embeddings": False, "moe": {"experts": 16, "top_k": 2, "balance": 0.002}},
        mixer={"attention": {"positions": "none"}},
    ),
    "falcon_h1": Hybrid("attention|mamba2/swiglu", model={"tie_embeddings": False}, mixer={"mamba2": {"state": 256}}),
    "nemotron_h": Hybrid(
        "4*mamba2/relu2+mamba2/none+attention/relu2",
        prefix="3*mamba2/relu2+mamba2/none+attention/relu2",
        suffix="5*mamba2/relu2",
        model={"tie_embeddings": False, "norm_eps": 1e-5},
        mixer={"attention": {"positions": "none"}, "mamba2": {"groups": 8}},
    ),
}

# name: width, repeats of the pattern, attention heads, key-value heads, further options of the model
PAPER = {
    "griffin": (2560, 8, 10, 1, {"channel_size": 7680}),
    "jamba": (4096, 4, 32, 8, {"channel_size": 14336, "moe": {"hidden": 14336}}),
    "nemotron_h": (4096, 3, 32, 8, {"channel_size": 21504}),
}
# width, blocks at least, length, batch size, optimiser, learning rate, steps
SIZES = {
    "tiny": (128, 1, 256, 8, "muon", 1.5e-2, 1200),
    "small": (512, 8, 1024, 32, "adamw", 1.5e-3, 20_000),
    "paper": (None, None, 4096, 256, "adamw", 3e-4, 100_000),
}
AROUND = ("pattern", "prefix", "suffix")
HEAD = 64  # channels of a head, in the smaller sizes


def get_config(arg: str = "") -> ConfigDict:
    """The configuration for `--config=configs/hybrids.py:<arg>`.

    Raises:
      UserError: for a key or a value that does not exist.
    """
    choice = common.parse(arg, "configs/hybrids.py", name="samba", size="tiny", corpus="auto")
    hybrid = common.choose("name", choice["name"], HYBRIDS)
    width, least, length, batch_size, optimizer, learning_rate, steps = common.choose("size", choice["size"], SIZES)
    tiny = choice["size"] == "tiny"
    items = {key: common.pattern(text) if text else () for key, text in hybrid._asdict().items() if key in AROUND}
    sizes = {}
    if choice["size"] == "paper":
        width, repeats, heads, kv_heads, sizes = common.choose("a name with size=paper", choice["name"], PAPER)
    else:
        repeats, heads = max(1, -(-least // len(items["pattern"]))), width // HEAD
        kv_heads = max(1, heads // 4)
    depth = len(items["prefix"]) + repeats * len(items["pattern"]) + len(items["suffix"])
    options = {"position_embedding": "none"} | hybrid.model | sizes
    moe = hybrid.model.get("moe", {}) | sizes.get("moe", {})
    model = common.model(width=width, depth=depth, **items, **{k: v for k, v in options.items() if k != "moe"})
    model.depth = depth
    model.moe.update(moe)
    if choice["name"] == "griffin":
        model.embedding_scale = width**0.5
    for name, section in model.mixer.items():
        if name in ("attention", "local_attention"):
            section.update(heads=heads, kv_heads=kv_heads)
        if name == "rglru":
            section.heads = heads
        section.update(hybrid.mixer.get(name, {}))
        if tiny and name == "mamba2":
            section.update(state=64, groups=1)
        if tiny and name == "local_attention":
            section.window = 128
    return common.experiment(
        common.task_section("language_model", corpus=choice["corpus"], length=length),
        model,
        common.optimizer(learning_rate, steps, optimizer),
        common.train(steps, batch_size, compute_dtype="float32" if tiny else "bfloat16"),
    )
