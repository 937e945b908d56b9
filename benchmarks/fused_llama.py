"""An even stronger bf16 baseline: q, k and v as one linear, gate and up as one, as inference engines have them.

transformers keeps them apart, and Inductor does not join them.

Shape suffixes: B batch, L tokens, H heads, D head dim.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def _joined(*linears: nn.Linear) -> nn.Linear:
    joined = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), False, device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    return joined


class FusedAttention(nn.Module):
    """Llama's attention with one linear for q, k and v; needs a cache."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        config = attention.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.attend = AttentionInterface()[config._attn_implementation]
        self.qkv_proj = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values, **kwargs
    ) -> tuple[Tensor, None]:
        """Same contract as transformers' module."""
        batch, length, _ = hidden_states.shape
        heads = self.qkv_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        keys, values = past_key_values.update(key, value, self.layer_idx)
        out_BLHD, _ = self.attend(self, query, keys, values, None, scaling=self.scaling)
        return self.o_proj(out_BLHD.reshape(batch, length, -1)), None


class FusedMLP(nn.Module):
    """Llama's MLP with one linear for gate and up."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = _joined(mlp.gate_proj, mlp.up_proj), mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] to [B, L, d]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def fuse_(model: PreTrainedModel) -> None:
    """Joins the projections of a Llama without biases, in place."""
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = FusedAttention(layer.self_attn), FusedMLP(layer.mlp)
