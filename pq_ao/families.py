"""Where each decoder family of transformers keeps its parts, and which models are refused."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """Names of the parts of a decoder: the first group from the model, the second from a decoder layer.

    `qkv` and `gate_up` name one linear where the family keeps it fused, and otherwise its parts in the order of the
    name. `query_norm` and `key_norm` are None where the family has no norm on the heads.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"

    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


FAMILIES: dict[str, DecoderFamily] = {
    "granite": DecoderFamily(),
    "llama": DecoderFamily(),
    "mistral": DecoderFamily(),
    "phi3": DecoderFamily(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    "qwen2": DecoderFamily(),
    "qwen3": DecoderFamily(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    "seed_oss": DecoderFamily(),
    "smollm3": DecoderFamily(),
}

# RoPE whose frequencies depend on the length of the context: a prefix computed once would not fit later contexts
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# names under which decoders keep a learned table of absolute positions
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


def family_of(model: PreTrainedModel) -> DecoderFamily:
    """The family of `model`, by `config.model_type`.

    Raises:
        ValueError: the family is not in the table, or the model uses learned absolute positions, sliding windows,
            length-dependent RoPE, RoPE on a part of each head or a head_dim that is odd.
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
    parameters = getattr(config, "rope_parameters", None) or {}
    rope = parameters.get("rope_type", "default")
    if rope in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"model: rope_type={rope!r} changes its frequencies with the length of the context, so a prefix computed "
            f"once would be wrong later; any other type works, except {_LENGTH_DEPENDENT_ROPE}."
        )
    rotary_part = parameters.get("partial_rotary_factor") or 1.0
    if rotary_part != 1:
        raise ValueError(
            f"model: partial_rotary_factor={rotary_part} turns a part of each head only; RoPE over whole heads "
            "(partial_rotary_factor=1.0) is supported."
        )
    if head_dim_of(config) % 2:
        raise ValueError(f"model: head_dim={head_dim_of(config)} is odd; packed INT4 keys need an even one.")
    return FAMILIES[config.model_type]


def head_dim_of(config) -> int:
    """Size of an attention head: `config.head_dim` where given, hidden_size / num_attention_heads otherwise."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def scaling_of(config) -> float:
    """Factor on the products of queries and keys: Granite's `attention_multiplier`, 1 / sqrt(head_dim) elsewhere."""
    return getattr(config, "attention_multiplier", None) or head_dim_of(config) ** -0.5


def turns_heads(config, layer_idx: int) -> bool:
    """Whether a layer has RoPE: SmolLM3 leaves it out in those that its `no_rope_layers` marks by 0."""
    with_rope = getattr(config, "no_rope_layers", None)
    return with_rope is None or bool(with_rope[layer_idx])


class Multipliers(NamedTuple):
    """Factors of Granite: on embeddings, on what a block adds to the residual stream, and on logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    @classmethod
    def of(cls, config) -> "Multipliers":
        """Those of a model; ones where its family has none."""
        return cls(
            getattr(config, "embedding_multiplier", 1.0),
            getattr(config, "residual_multiplier", 1.0),
            1 / getattr(config, "logits_scaling", 1.0),
        )


def forget_multipliers(module: nn.Module, config) -> None:
    """Ones in place of the `Multipliers` of a model or of a decoder layer, and in its config."""
    for owner in (config, *module.modules()):
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            if hasattr(owner, name):
                setattr(owner, name, 1.0)


def replace_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in place of the submodule called `name` (dotted)."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
