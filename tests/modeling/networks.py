"""Networks of random weights."""

from __future__ import annotations

import torch

from modeling.config import TransformerConfig
from modeling.diffusion.transformer import Transformer


def random_transformer(config: TransformerConfig, std: float, seed: int = 0) -> Transformer:
    """The same for the same arguments; no weight is zero, as a new head's are."""
    torch.manual_seed(seed)
    network = Transformer(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return network
