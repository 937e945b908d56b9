"""Where each decoder family of transformers keeps its parts, and which models are refused."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """Names of the parts of a decoder: the first group from the model, the second from a decoder layer.

    `query_norm` and `key_norm` are None where the family has no norm on the heads.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"

    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


FAMILIES: dict[str, DecoderFamily] = {
    "llama": DecoderFamily(),
    "mistral": DecoderFamily(),
    "qwen2": DecoderFamily(),
    "qwen3": DecoderFamily(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
}

# RoPE whose frequencies depend on the length of the context: a prefix computed once would not fit later contexts
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# names under which decoders keep a learned table of absolute positions
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


def family_of(model: PreTrainedModel) -> DecoderFamily:
    """The family of `model`, by `config.model_type`.

    Raises:
        ValueError: the family is not in the table, or the model uses learned absolute positions, sliding windows,
            length-dependent RoPE or a head_dim that is odd.
    """
    config = model.config
    tables = [
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in _POSITION_TABLES and isinstance(module, nn.Embedding)
    ]
    if tables:
        raise ValueError(
            f"model: {config.model_type!r} has learned absolute positions ({tables[0]}); a hidden prefix at negative "
            "positions needs rotary embeddings. Use a decoder with RoPE."
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: family {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}. To add one, "
            "describe where it keeps its parts as a DecoderFamily in pq_ao/families.py (see CONTRIBUTING.md)."
        )
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (window is not None and getattr(config, "use_sliding_window", True)):
        raise ValueError(
            f"model: sliding-window attention (sliding_window={window}) would let the prefix slide out of sight; "
            "only full attention is supported. Load the model with sliding_window=None if its contexts stay shorter."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"model: rope_type={rope!r} changes its frequencies with the length of the context, so a prefix computed "
            f"once would be wrong later; any other type works, except {_LENGTH_DEPENDENT_ROPE}."
        )
    if head_dim_of(config) % 2:
        raise ValueError(f"model: head_dim={head_dim_of(config)} is odd; packed INT4 keys need an even one.")
    return FAMILIES[config.model_type]


def head_dim_of(config) -> int:
    """Size of an attention head: `config.head_dim` where given, hidden_size / num_attention_heads otherwise."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def replace_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in place of the submodule called `name` (dotted)."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
