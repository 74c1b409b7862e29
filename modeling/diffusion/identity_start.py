"""A new transformer that begins as the editor which changes nothing."""

from __future__ import annotations

import torch
from torch import nn

from modeling.diffusion.transformer import Block, Transformer

NOISY_SCALE = 1.5  # of the noisy values beside the source's, see `start_as_identity`
RESIDUAL_SCALE = 0.1  # of what blocks add at first
TEXT_GAIN = 1.5


@torch.no_grad()
def start_as_identity(transformer: Transformer) -> bool:
    """Let the prediction begin as noisy - source, the velocity at full noise if nothing is edited.

    The patch embedding carries the noisy and the source values of a token in dimensions of their
    own, the head subtracts them, and blocks add little. Training from scratch then learns the edit
    instead of how to copy noise and background, which takes a small model most of its steps. The
    head's norm divides by the token's own size; noise, which is as large in every token, is scaled
    up so that this size varies less.

    Prompts count from the start too: Wan's initialisation lets text through at a hundredth of its
    size, which suits a network that trains for weeks.

    Returns whether it did: a network without room for a token's values, or without source channels
    beside the noisy ones, is left as it is.
    """
    config = transformer.config
    channels, values = config.latent_channels, 4 * config.latent_channels  # 2 x 2 cells a token
    if config.source_channels != channels or config.dim < 2 * values:
        return False
    identity = torch.eye(values)
    embed = transformer.patch_embedding.weight.flatten(1).zero_()  # [dim, (channel, row, column)]
    embed[:values, :values] = NOISY_SCALE * identity
    embed[values : 2 * values, values:] = identity
    # The head's values are ordered (row, column, channel).
    order = identity.view(channels, 4, values).transpose(0, 1).flatten(0, 1)
    # Of noisy and source values of unit variance the norm leaves this size.
    size = ((NOISY_SCALE**2 + 1) * values / config.dim) ** 0.5
    head = transformer.head.head.weight.zero_()
    head[:, :values] = order * size / NOISY_SCALE
    head[:, values : 2 * values] = -order * size
    for block in transformer.blocks:
        assert isinstance(block, Block)
        for output in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            assert isinstance(output, nn.Linear)
            output.weight.mul_(RESIDUAL_SCALE)
    for layer in transformer.text_embedding:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=TEXT_GAIN * layer.in_features**-0.5)
    return True
