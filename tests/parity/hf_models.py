"""Small models that transformers makes with random values, for tests/parity/test_import_hf.py: of each architecture, and of its
options that change what is computed or which tensors there are."""

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3}
HALF = {"dtype": "float16"}
PIECES = {"dtype": "bfloat16", "max_shard_size": "10KB"}
MLP = {"intermediate_size": 48}
TOKENS = {"pad_token_id": 0, "eos_token_id": 2}  # inside of the vocabulary
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
MODELS = {  # model_type, options beside SIZES, how it is written
    "mamba": ("mamba", {"state_size": 8}, {}),
    "mamba_untied": ("mamba", {"state_size": 5, "hidden_size": 20, "expand": 3, "tie_word_embeddings": False}, PIECES),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8}, {}),
    "mamba2_tied": (
        "mamba2",
        {"state_size": 6, "num_heads": 6, "head_dim": 8, "hidden_size": 24, "n_groups": 1, "tie_word_embeddings": True}
        | {"time_step_limit": [0.02, 0.05]},
        HALF,
    ),
    "rwkv": (
        "rwkv",
        {"hidden_size": 22, "intermediate_size": 30, "layer_norm_epsilon": 0.1, "rescale_every": 0},
        {},
    ),
    "rwkv_pieces": ("rwkv", {"rescale_every": 2}, PIECES),  # eps is small enough for it to be neutral
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 96,
            "attention_window_size": 6,
            "partial_rotary_factor": 0.25,
        },
        {},
    ),
    "recurrent_gemma_ragged": (  # the layers are no whole number of patterns
        "recurrent_gemma",
        {"num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 70, "lru_width": 46},
        PIECES,
    ),
    "llama": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 50},
        {},
    ),
    "llama_tied": (
        "llama",
        {"num_attention_heads": 4, "intermediate_size": 33, "tie_word_embeddings": True, "rope_theta": 500.0},
        PIECES,
    ),
    "llama3": (
        "llama",
        {
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {},
    ),
    "mistral": ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5} | MLP, {}),
    "mistral_full": ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": None} | MLP, {}),
    "ministral": (
        "ministral",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
        | MLP,
        {},
    ),
    "gemma": ("gemma", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12} | MLP, PIECES),
    "phi3": (
        "phi3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "partial_rotary_factor": 0.5,
            "pad_token_id": 0,
        }
        | MLP,
        {},
    ),
    "qwen2": (
        "qwen2",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        }
        | MLP,
        HALF,
    ),
    "qwen3": (
        "qwen3",
        {
            "rms_norm_eps": 1e-5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
        },
        HALF,
    ),
    "gemma2": (
        "gemma2",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20}
        | MLP,
        {},
    ),
    "gemma2_uncapped": (
        "gemma2",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | MLP,
        HALF,
    ),
    "gemma3": (
        "gemma3_text",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5}
        | {"num_hidden_layers": 4, "query_pre_attn_scalar": 20}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        }
        | MLP,
        {},
    ),
    "olmo2": ("olmo2", {"num_attention_heads": 4, "num_key_value_heads": 2} | TOKENS | MLP, {}),
    "olmo3": (
        "olmo3",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "num_hidden_layers": 4}
        | TOKENS
        | MLP,
        PIECES,
    ),
    "lfm2": (
        "lfm2",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "full_attn_idxs": [1, 3]}
        | {"intermediate_size": 50, "block_multiple_of": 16, "conv_bias": True},
        {},
    ),
    "qwen3_next": (
        "qwen3_next",
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
        | {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 24,
        }
        | {"mlp_only_layers": [1]}
        | MLP,
        {},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5}
        | {"num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 3}
        | MLP,
        {},
    ),
    "jamba": (
        "jamba",
        {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_state": 6}
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 5, "num_experts_per_tok": 2}
        | {"mamba_dt_rank": 3, "mamba_expand": 3}
        | MLP,
        {},
    ),
    "bamba": (
        "bamba",
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
        | {"mamba_n_heads": 6, "mamba_expand": 3, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 8}
        | {"mlp_bias": True}
        | MLP,
        {},
    ),
    "granite4": (
        "granitemoehybrid",
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "shared_intermediate_size": 24}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}
        | {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 8, "intermediate_size": 12}
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "position_embedding_type": "nope"}
        | GRANITE
        | TOKENS,
        {},
    ),
    "granite4_unshared": (
        "granitemoehybrid",
        {"num_attention_heads": 4, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        | {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_chunk_size": 8, "intermediate_size": 12}
        | {"num_local_experts": 3, "shared_intermediate_size": 0, "time_step_limit": [0.02, 0.05]}
        | TOKENS,
        {},
    ),
    "granite4_dense": (
        "granitemoehybrid",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "shared_intermediate_size": 20, "num_local_experts": 0}
        | {"layer_types": ["linear_attention", "full_attention", "full_attention"], "position_embedding_type": "rope"}
        | {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_chunk_size": 8, "tie_word_embeddings": True}
        | GRANITE
        | TOKENS,
        PIECES,
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "mamba_d_ssm": 40,
            "mamba_n_heads": 4,
            "mamba_d_state": 6,
        }
        | {"mamba_n_groups": 2, "mamba_chunk_size": 8, "lm_head_multiplier": 0.7, "embedding_multiplier": 1.3}
        | {"mlp_multipliers": [0.6, 1.4], "key_multiplier": 0.37, "attention_in_multiplier": 0.8}
        | {"attention_out_multiplier": 1.2, "ssm_multipliers": [0.5, 1.5, 0.7, 1.1, 0.3], "ssm_in_multiplier": 1.25}
        | {"ssm_out_multiplier": 0.9}
        | MLP,
        {},
    ),
    "falcon_h1_norm": (
        "falcon_h1",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "mamba_d_ssm": None,
            "mamba_n_heads": 4,
            "mamba_d_state": 6,
        }
        | {"num_hidden_layers": 2, "mamba_chunk_size": 8, "mamba_rms_norm": True, "mamba_n_groups": 2}
        | MLP,
        PIECES,
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": [
                "linear_attention",
                "moe",
                "linear_attention",
                "full_attention",
                "mlp",
                "full_attention",
            ]
        }
        | {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "mamba_num_heads": 6,
            "mamba_head_dim": 8,
        }
        | {"ssm_state_size": 6, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 6, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20, "routed_scaling_factor": 2.5}
        | {"n_group": 3, "topk_group": 2, "time_step_min": 0.05}
        | MLP,
        {},
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "linear_num_key_heads": 3}
        | {"linear_num_value_heads": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "rms_norm_eps": 1e-4}
        | TOKENS
        | MLP,
        {},
    ),
    "olmo_hybrid_nope": (
        "olmo_hybrid",
        {"num_attention_heads": 4, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
        | TOKENS
        | MLP,
        {},
    ),
    "kimi_linear": (
        "kimi_linear",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
        | {"q_lora_rank": 14, "linear_head_dim": 6, "linear_num_heads": 3, "num_local_experts": 6, "n_group": 3}
        | {"topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 2}
        | TOKENS
        | MLP,
        {},
    ),
    "minimax": (
        "minimax",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 5, "block_size": 8}
        | {"num_experts_per_tok": 3, "num_hidden_layers": 4}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
        | {f"{part}_alpha_factor": 1.7 for part in ("full_attn", "linear_attn", "mlp")}
        | {f"{part}_beta_factor": 0.6 for part in ("full_attn", "linear_attn", "mlp")}
        | MLP,
        {},
    ),
}
