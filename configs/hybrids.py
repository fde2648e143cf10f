"""Language models whose layers are of several kinds, as they were published, and small editions of them.

    python train.py --config=configs/hybrids.py:name=jamba --workdir=runs/jamba
    python train.py --config=configs/hybrids.py:name=nemotron_h,size=paper --config.mesh.fsdp=256 --compile_for=v5e:16x16

Keys of the argument:
  name: samba (arXiv 2406.07522), griffin (2402.19427; the sizes are RecurrentGemma-2B's), jamba (2403.19887), falcon_h1
    (2507.22448), nemotron_h (2504.03624), qwen3_next (Qwen3-Next-80B-A3B), kimi_linear (2510.26692; 48B-A3B), lfm2 (2511.23404;
    1.2B), gemma3 (2503.19786; 1B), gpt_oss (2508.10925; 20B), olmo_hybrid (7B), minimax01 (2501.08313; 456B-A46B), granite4h
    (Granite-4.0-H-Tiny) or bamba (Bamba-9B).
  size: "tiny" (minutes on two cores), "small" (tens of millions of parameters), or "paper", of those that `PAPER` has: the
    released shapes, whose vocabulary is that of config.task.tokenizer.
  corpus: what to train on, see `data/tasks/language_model.py`.

The layers are those of the papers: which mixer is where, channel mixers, positions, norms and shares of the width. The training
is ours. What a model has and ours lacks is said beside it in `HYBRIDS`; none has dropout. In the smaller sizes, heads have 64
channels, one of keys and values serves four of queries, and a mixture is of 8 experts, 2 of them for each token, unless the
model says otherwise. Zamba2 is not here; docs/mixers.md says why.
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


class Paper(NamedTuple):
    """The released sizes of a model.

    Attributes:
      width: of the residual stream.
      repeats: of the pattern.
      heads: of attention and of the other mixers that have heads, but Mamba-2, which has one for every 64 channels.
      kv_heads: of attention.
      model: further options of the model.
      mixer: further options by mixer.
    """

    width: int
    repeats: int
    heads: int
    kv_heads: int
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
        model={"tie_embeddings": False, "moe": {"experts": 16, "top_k": 2, "renormalize": False, "balance": 0.002}},
        mixer={"mamba": {"norm": "rms"}, "attention": {"positions": "nope"}},
    ),
    # Without the factors of the releases, which were tuned for each size: config.model.parallel.input_scale and output_scale,
    # config.model.mixer.mamba2.scales, config.model.channel_scales, embedding_scale and logit_scale.
    "falcon_h1": Hybrid(
        "attention|mamba2/swiglu",
        model={"tie_embeddings": False, "norm_eps": 1e-5},
        mixer={"mamba2": {"state": 256, "output_norm": "none"}},
    ),
    "nemotron_h": Hybrid(
        "4*mamba2/relu2+mamba2/none+attention/relu2",
        prefix="3*mamba2/relu2+mamba2/none+attention/relu2",
        suffix="5*mamba2/relu2",
        model={"tie_embeddings": False, "norm_eps": 1e-5},
        mixer={"attention": {"positions": "nope"}, "mamba2": {"groups": 8}},
    ),
    # Without the layer that predicts the token after the next (MTP).
    "qwen3_next": Hybrid(
        "3*gated_delta_net/moe+attention/moe",
        model={"norm": "rmsnorm1p", "tie_embeddings": False, "moe": {"shared": 1, "shared_gate": True}},
        mixer={
            "gated_delta_net": {"expand_key": 1.0, "expand_value": 2.0},
            "attention": {
                "output_gate": "full",
                "qk_norm": True,
                "qk_norm_offset": 1.0,
                "rotary_fraction": 0.25,
                "rotary_base": 1e7,
            },
        },
    ),
    # The first layer has no experts.
    "kimi_linear": Hybrid(
        "2*kimi_delta_attention/moe+mla/moe+kimi_delta_attention/moe",
        prefix="kimi_delta_attention/swiglu",
        suffix="kimi_delta_attention/moe+mla/moe",
        model={
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "moe": {"router": "sigmoid", "scale": 2.446, "shared": 1},
        },
        mixer={"mla": {"positions": "nope"}, "kimi_delta_attention": {"eps": 1e-5}},
    ),
    "lfm2": Hybrid(
        "2*gated_short_conv+attention",
        suffix="3*(gated_short_conv+attention)+gated_short_conv",
        model={"norm_eps": 1e-5},
        mixer={"attention": {"qk_norm": True, "qk_norm_eps": 1e-5, "rotary_base": 1e6}},
    ),
    "gemma3": Hybrid(
        "5*local_attention+attention",
        suffix="2*local_attention",
        model={"channel_mixer": "geglu", "norm": "rmsnorm1p", "norm_position": "sandwich"},
        mixer={
            "local_attention": {"window": 512, "qk_norm": True, "qk_norm_offset": 1.0},
            "attention": {"rotary_base": 1e6, "qk_norm": True, "qk_norm_offset": 1.0},
        },
    ),
    # The released size has the frequencies of the extended context.
    "gpt_oss": Hybrid(
        "local_attention/moe+attention/moe",
        model={
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "moe": {"router": "softmax_topk", "activation": "clamped_swiglu", "bias": True},
        },
        mixer={
            "local_attention": {"window": 128, "sinks": True, "qkv_bias": True, "bias": True, "rotary_base": 150_000.0},
            "attention": {"sinks": True, "qkv_bias": True, "bias": True, "rotary_base": 150_000.0},
        },
    ),
    # Positions are those that transformers' class has by default; the release's were not read.
    "olmo_hybrid": Hybrid(
        "3*gated_delta_net+attention/output",
        model={"tie_embeddings": False},
        mixer={
            "gated_delta_net": {"negative_eigenvalues": True, "eps": 1e-5},
            "attention": {"kv_heads": None, "qk_norm": True, "qk_norm_span": "all"},
        },
    ),
    # The residual stream has the factor (2 depth)^(1/4) of DeepNorm (arXiv 2203.00555).
    "minimax01": Hybrid(
        "7*lightning_attention/moe+attention/moe",
        model={"norm_position": "input", "norm_eps": 1e-5, "tie_embeddings": False},
        mixer={
            "lightning_attention": {"counted": "all"},
            "attention": {"rotary_fraction": 0.5, "rotary_base": 1e7},
        },
    ),
    "granite4h": Hybrid(
        "5*mamba2/moe+attention/moe+4*mamba2/moe",
        model={
            "norm_eps": 1e-5,
            "embedding_scale": 12.0,
            "branch_scale": 0.22,
            "logit_scale": 1 / 6,
            "moe": {"shared": 2},
        },
        mixer={"attention": {"positions": "nope", "scale": 1 / 128}},
    ),
    "bamba": Hybrid(
        "8*mamba2/swiglu+attention/swiglu",
        prefix="mamba2/swiglu",
        suffix="4*mamba2/swiglu",
        model={"norm_eps": 1e-5, "tie_embeddings": False},
        mixer={"attention": {"rotary_fraction": 0.5}},
    ),
}

# Not read from a released configuration, and so to be checked before a checkpoint is loaded: which layers of kimi_linear, lfm2
# and bamba have attention; the depth of gpt_oss; lfm2's sizes; the states of bamba and granite4h, granite4h's Mamba-2 heads and
# its factors of embeddings, branches and logits.
YARN = {"rotary_scaling": "yarn:factor=32,original_length=4096,truncate=0"}
PAPER = {
    "griffin": Paper(2560, 8, 10, 1, {"channel_size": 7680}),
    "jamba": Paper(4096, 4, 32, 8, {"channel_size": 14336, "moe": {"hidden": 14336}}),
    "nemotron_h": Paper(4096, 3, 32, 8, {"channel_size": 21504}),
    "qwen3_next": Paper(
        *(2048, 12, 16, 2),
        {"moe": {"experts": 512, "top_k": 10, "hidden": 512}},
        {"attention": {"head_channels": 256}},
    ),
    "kimi_linear": Paper(
        *(2304, 6, 32, 32),
        {"channel_size": 9216, "moe": {"experts": 256, "top_k": 8, "hidden": 1024}},
        {
            "kimi_delta_attention": {"expand": 32 * 128 / 2304},
            "mla": {"kv_rank": 512, "nope_channels": 128, "rotary_channels": 64, "value_channels": 128},
        },
    ),
    "lfm2": Paper(2048, 3, 32, 8, {"channel_size": 8192}),
    "gemma3": Paper(
        *(1152, 4, 4, 1),
        {"channel_size": 6912},
        {"local_attention": {"head_channels": 256}, "attention": {"head_channels": 256}},
    ),
    "gpt_oss": Paper(
        *(2880, 12, 64, 8),
        {"moe": {"experts": 32, "top_k": 4, "hidden": 2880}},
        {"local_attention": {"head_channels": 64, **YARN}, "attention": {"head_channels": 64, **YARN}},
    ),
    "olmo_hybrid": Paper(3840, 8, 30, 30, {"channel_size": 11008}),
    "minimax01": Paper(
        *(6144, 10, 64, 8),
        {"moe": {"experts": 32, "hidden": 9216}},
        {"lightning_attention": {"head_channels": 128}, "attention": {"head_channels": 128}},
    ),
    "granite4h": Paper(1536, 4, 12, 4, {"moe": {"experts": 64, "top_k": 6, "hidden": 512}}),
    "bamba": Paper(4096, 3, 32, 8, {"channel_size": 14336}),
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
    sizes, released = {}, {}
    if choice["size"] == "paper":
        width, repeats, heads, kv_heads, sizes, released = common.choose(
            "a name with size=paper", choice["name"], PAPER
        )
    else:
        repeats, heads = max(1, -(-least // len(items["pattern"]))), width // HEAD
        kv_heads = max(1, heads // 4)
    depth = len(items["prefix"]) + repeats * len(items["pattern"]) + len(items["suffix"])
    options = {"position_embedding": "none"} | hybrid.model | sizes
    moe = hybrid.model.get("moe", {}) | sizes.get("moe", {})
    model = common.model(width=width, depth=depth, **items, **{k: v for k, v in options.items() if k != "moe"})
    model.depth = depth
    model.remat = "none" if tiny else "elementwise"  # as of configs/lm.py
    model.moe.update(moe)
    if choice["name"] in ("griffin", "gemma3"):
        model.embedding_scale = width**0.5
    if choice["name"] == "minimax01":
        model.residual_scale = (2 * depth) ** 0.25
    for name, section in model.mixer.items():
        if section.get("heads") is not None:  # None is derived from the width
            section.heads = heads
        if "kv_heads" in section:
            section.kv_heads = kv_heads
        if choice["name"] == "qwen3_next" and name == "gated_delta_net":
            section.value_heads = 2 * heads
        section.update(hybrid.mixer.get(name, {}) | released.get(name, {}))
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
