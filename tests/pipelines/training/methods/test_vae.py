from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modeling.presets import PRESETS
from modeling.vae.tiny import TinyVae
from pipelines.training.methods.vae import Autoencoder


@pytest.mark.parametrize("train_encoder", [True, False])
def test_the_encoder_learns_only_if_it_is_told_to(train_encoder: bool) -> None:
    torch.manual_seed(0)
    vae = TinyVae(replace(PRESETS["demo"].vae, widths=(16, 12, 8, 8)))
    network = Autoencoder(vae, train_encoder=train_encoder)
    decoded, _ = network(torch.rand(1, 5, 3, 16, 16), torch.zeros(1, 2, 16, 2, 2))
    decoded.square().mean().backward()
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())
    assert all((p.grad is not None) == train_encoder for p in vae.encoder.parameters())
