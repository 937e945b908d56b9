"""Configs of tiny decoders of every supported family, each with what makes its family differ from Llama."""

from transformers import (
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

VOCAB_SIZE = 300

_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "granite": GraniteConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "seed_oss": SeedOssConfig,
    "smollm3": SmolLM3Config,
}
FAMILIES = tuple(_CONFIGS)

_SPECIAL = {
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.5,
    },
    "mistral": {"sliding_window": None},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def tiny_config(family: str = "llama", **overrides) -> PretrainedConfig:
    """Two layers in which four query heads share two KV heads; tokens 0, 1 and 2 are BOS, EOS and padding."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return _CONFIGS[family](**(settings | _SPECIAL.get(family, {}) | overrides))
