"""What an autoencoder loses: pixels [B, f, 3, H, W] in [-1, 1], latents [B, F, C, h, w].

All arithmetic is float32 and all results are scalars.
"""

from __future__ import annotations

from torch import Tensor


def reconstruction_loss(
    pixels: Tensor, target: Tensor, edge_weight: float, square_weight: float = 0.0
) -> Tensor:
    """L1 of pixels, plus `edge_weight` times the L1 of differences of neighbouring pixels, plus
    `square_weight` times the mean square error.

    The second term keeps edges sharp, which L1 alone trades for smoothness; the third weighs the
    large errors of fine texture, which natural pictures are full of.
    """
    error = pixels.float() - target.float()
    loss = error.abs().mean()
    if edge_weight:
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + edge_weight * edges
    if square_weight:
        loss = loss + square_weight * error.square().mean()
    return loss


def scale_penalty(latents: Tensor) -> Tensor:
    """Half the mean square of latents: the mean's part of the KL divergence from N(0, 1)."""
    return 0.5 * latents.float().square().mean()
