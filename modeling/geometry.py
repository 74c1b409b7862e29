"""How pixels, latents and tokens lie to each other.

A stream's first latent holds one frame and every other four, so n latents are 4 n - 3 frames.
"""

from __future__ import annotations

TEMPORAL_STRIDE = 4  # frames a latent, but a stream's first
SPATIAL_STRIDE = 8  # pixels a latent cell, both ways
PATCH = 2  # latent cells a token, both ways
TOKEN_PIXELS = SPATIAL_STRIDE * PATCH
HEAD_FRAMES = TEMPORAL_STRIDE - 1  # frames that a stream's first latent lacks


def frames_of(latents: int) -> int:
    """Frames of a clip of so many latents."""
    return TEMPORAL_STRIDE * latents - HEAD_FRAMES


def latents_of(frames: int) -> int:
    """Latents that so many frames of a clip complete."""
    return (frames + HEAD_FRAMES) // TEMPORAL_STRIDE


def padded_latent_size(height: int, width: int) -> tuple[int, int]:
    """Latent size of frames of `height` x `width` pixels, padded to whole tokens."""
    return PATCH * -(-height // TOKEN_PIXELS), PATCH * -(-width // TOKEN_PIXELS)
