"""A decoder with an outlier token of our own making."""

import torch
from transformers import PreTrainedModel

OUTLIER = 70  # id of the token


@torch.no_grad()
def plant_outlier(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the first layer of a tiny llama answer one token, wherever it stands, with a huge activation."""
    layer, table = model.model.layers[0], model.model.embed_tokens.weight
    layer.self_attn.o_proj.weight.zero_()
    table[:, 0] = 0  # one channel that only this token has
    table[OUTLIER] = 0
    table[OUTLIER, 0] = 10
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight[0] = 0
        linear.weight[0, 0] = 10
    return model
