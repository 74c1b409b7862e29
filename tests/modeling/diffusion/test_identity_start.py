from __future__ import annotations

from dataclasses import replace

import torch

from modeling.diffusion.attention import bidirectional
from modeling.diffusion.identity_start import start_as_identity
from modeling.diffusion.transformer import Transformer
from modeling.presets import PRESETS


def test_a_new_editor_predicts_that_nothing_changes() -> None:
    torch.manual_seed(0)
    transformer = Transformer(PRESETS["demo"].transformer).requires_grad_(False)
    noise, source = torch.randn(2, 3, 16, 8, 8), torch.randn(2, 3, 16, 8, 8)
    text = torch.randn(2, 24, 64)
    full = torch.full((2,), 1000.0)

    def clean() -> torch.Tensor:
        """The estimate of the edited video at full noise."""
        return noise - transformer(noise, source, full, text, bidirectional(3))

    def relative_error(found: torch.Tensor) -> float:
        return float((found - source).norm() / source.norm())

    before = relative_error(clean())
    assert start_as_identity(transformer)
    assert relative_error(clean()) < 0.35 < before  # 0.23 to 0.31 by seed
    velocity = transformer(noise, source, full, text, bidirectional(3)).flatten()
    parts = torch.stack([noise.flatten(), source.flatten()], dim=1)
    fitted = torch.linalg.lstsq(parts, velocity[:, None]).solution.flatten()
    torch.testing.assert_close(fitted, torch.tensor([1.0, -1.0]), atol=0.03, rtol=0)
    assert not torch.equal(
        transformer(noise, source, full, text, bidirectional(3)),
        transformer(noise, source, full, text.flip(0), bidirectional(3)),
    )


def test_a_network_without_room_is_left_as_it_is() -> None:
    narrow = Transformer(replace(PRESETS["demo"].transformer, dim=96))
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    assert not start_as_identity(narrow)
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())


def test_a_network_that_is_drawn_sees_the_noisy_latents_and_not_yet_the_source() -> None:
    drawn = Transformer(replace(PRESETS["demo"].transformer, latent_channels=4, source_channels=3))
    noisy, source = drawn.patch_embedding.weight.split([4, 3], dim=1)
    assert noisy.all()
    assert not source.any()
