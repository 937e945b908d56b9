"""What the tests of single blocks share: the first block of a decoder as calibration finds it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pq_ao import PrefixQuantConfig
from pq_ao.block_calibration import store_prefix
from pq_ao.block_sites import BlockSites
from pq_ao.families import family_of
from pq_ao.rotation import Rotation, begin_rotation
from pq_ao.streams import Stream


@torch.no_grad()
def first_block(model: PreTrainedModel, config: PrefixQuantConfig, ids: Tensor) -> tuple[BlockSites, Rotation]:
    """The first block, rotated, with its prefix, in float32: its sites, with the sequences `ids`, and its rotation."""
    family = family_of(model)
    rotator = begin_rotation(model, config, seed=0, block_dtype=torch.float32)
    body = Stream(model, family, ids)
    head = Stream(model, family, torch.tensor([[5, 0]]), first_position=-2)
    layer = model.get_submodule(family.layers)[0]
    rotator.replace(layer, 0)
    store_prefix(layer, family, head)
    return BlockSites(layer, family, body), rotator.rotation
