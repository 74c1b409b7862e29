"""Clips of a batch know nothing of each other, whichever VAE it is, whole and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.config import VaeConfig
from modeling.vae.build import VAES, build_vae
from modeling.vae.streaming import VaeState

SMALL = {
    "tiny": VaeConfig(kind="tiny", widths=(8, 8, 8, 8)),
    "folded": VaeConfig(kind="folded", widths=(8, 12), depths=(1, 2, 2, 1)),
    "wan": VaeConfig(kind="wan", base_dim=4),
}
CLIPS = 3


def test_every_vae_is_asked() -> None:
    assert SMALL.keys() == VAES.keys()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_a_clip_is_the_same_beside_others(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    vae = build_vae(SMALL[kind]).double().requires_grad_(False).train(training)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = 2 * torch.rand(CLIPS, 10, 3, 16, 16, dtype=torch.float64) - 1

    def passed(clips: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and pixels, of two pushes, of which the first leaves frames over."""
        coding: VaeState | None = None
        decoding: VaeState | None = None
        latents, frames = [], []
        for piece in clips.split([6, 4], dim=1):
            made, coding = vae.encode(piece, coding)
            shown, decoding = vae.decode(made, decoding)
            latents.append(made)
            frames.append(shown)
        return torch.cat(latents, dim=1), torch.cat(frames, dim=1)

    together = passed(pixels)
    alone = [passed(clip) for clip in pixels.split(1)]
    assert together[0].shape[:2] == (CLIPS, 3)
    assert together[1].shape == (CLIPS, 9, 3, 16, 16)
    for found, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(each), atol=1e-9, rtol=1e-7)
        assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("kind", SMALL)
def test_a_state_keeps_no_more_than_it_needs(kind: str) -> None:
    """Neither the clip that it was pushed nor what a pass has made on the way."""
    vae = build_vae(SMALL[kind]).requires_grad_(False).eval()
    _, coding = vae.encode(torch.rand(1, 8, 3, 16, 16))
    assert coding.pending is not None
    assert coding.pending.shape[1] == 3
    _, decoding = vae.decode(torch.rand(1, 3, vae.config.latent_channels, 2, 2))
    for kept in (coding.pending, *coding.caches, *decoding.caches):
        assert kept.untyped_storage().nbytes() == kept.nbytes
