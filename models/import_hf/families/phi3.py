"""Phi 3 and 4: joint tensors of queries, keys and values, and of the channel mixer; parts of heads are rotated."""

from typing import Any

from models.config import ModelConfig
from models.import_hf import transformer
from models.import_hf.architecture import LINEAR, Architecture, Block, Options, Part, Tensors, outside


def _config(get: Options) -> ModelConfig:
    get.expect(hidden_act="silu", embd_pdrop=0.0, resid_pdrop=0.0)
    # Its class has a rule of its own ("longrope") and none of the others.
    rotary = dict.fromkeys(transformer.KINDS, get.rotary(partial=True, kinds=()))
    return transformer.decoder(get, kinds=transformer.sliding_if_given(get), rotary=rotary)


def _options(config: ModelConfig) -> dict[str, Any]:
    mixer = next(iter(config.mixer.values()))
    found = {key: value for key, value in transformer.options(config).items() if key != "head_dim"}
    # Its class puts padding at id 32000, which a smaller vocabulary does not have.
    found |= {"sliding_window": mixer.get("window"), "pad_token_id": None}
    return found | {"partial_rotary_factor": mixer["rotary_fraction"]}


def _tensors(config: ModelConfig) -> Tensors:
    yield from outside(config, "model.embed_tokens.weight", "model.norm.weight")
    for i in range(config.depth):
        block = Block(f"model.layers.{i}", i)
        yield from transformer.norms(block)
        parts = tuple(Part(f"mixer.w_{name}", "d h k -> (h k) d", (), i) for name in "qkv")
        yield f"{block.prefix}.self_attn.qkv_proj.weight", parts
        yield block("self_attn.o_proj.weight", "mixer.w_o", "h k d -> d (h k)")
        parts = tuple(Part("channel_mixer.w_in", "d f -> f d", (slice(None), j), i) for j in (0, 1))
        yield f"{block.prefix}.mlp.gate_up_proj.weight", parts
        yield block("mlp.down_proj.weight", "channel_mixer.w_out", LINEAR)


ARCHITECTURE = Architecture(
    "Phi3ForCausalLM",
    _config,
    _options,
    _tensors,
    frozenset({"attention", "local_attention"}),
    transformer.without(
        "mlp_bias",
        "attention_bias",
        "head_dim",
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        rms_norm_eps=1e-5,
        partial_rotary_factor=1.0,
        sliding_window=None,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    frozenset({"original_max_position_embeddings"}),
)
