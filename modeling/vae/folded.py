"""A small video autoencoder that folds pixels into channels and works at a quarter of their size.

A latent's four frames are cut in cells of 4 x 4 pixels, and the 4 * 48 values of a cell are its
channels. All layers work there and at an eighth of the size, where a CPU's and a GPU's matrix units
are busy; none works at the size of the pixels. What crosses time is a quarter of the channels that
every block's convolution sees: they are those of the latent before (after the causal form of the
"temporal shift" of Lin et al. 2019), so remembering costs no arithmetic.

A stream's first frame is encoded as four copies of itself, and the first three decoded frames are
dropped; the latent before the first is the first.

Shapes inside: B batch, F latents; images are `[B*F, C, H, W]`, channels innermost in memory.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.config import VaeConfig
from modeling.vae.streaming import RememberingBlock, StreamingVae, StreamTape, run_images

FOLD = 4  # pixels of a cell's side, and frames of a latent
CELL = 3 * FOLD * FOLD * FOLD  # values of a cell: colours, frames, rows, columns
REMEMBERED = 4  # a block sees 1 / REMEMBERED of its channels as they were a latent ago


class ShiftBlock(RememberingBlock):
    """Residual block of a 3 x 3 and a 1 x 1 convolution that sees a part of the latent before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.remembered = channels // REMEMBERED
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)  # a new network begins as the linear one around its blocks
        nn.init.zeros_(cast(Tensor, self.out.bias))

    def forward(self, x: Tensor, tape: StreamTape, batch: int) -> Tensor:
        part, rest = x.split([self.remembered, x.shape[1] - self.remembered], dim=1)
        clips = part.unflatten(0, (batch, -1))  # [B, F, C/4, H, W]
        before = clips[:, 0] if tape.first else tape.read(clips[:, 0])
        tape.write(clips[:, -1])
        shifted = torch.cat([before[:, None], clips[:, :-1]], dim=1).flatten(0, 1)
        seen = torch.cat([shifted, rest], dim=1).contiguous(memory_format=torch.channels_last)
        return x + self.out(F.silu(self.mix(F.silu(seen))))


class FoldedVae(StreamingVae):
    """`config.widths` are the channels at a quarter and at an eighth of the size; `config.depths`
    the blocks of the encoder at a quarter and an eighth, then of the decoder at an eighth and a
    quarter.
    """

    passes_at_once = True

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        wide, deep = config.widths
        blocks = [
            [ShiftBlock(width) for _ in range(depth)]
            for width, depth in zip((wide, deep, deep, wide), config.depths, strict=True)
        ]
        self.encoder = nn.Sequential(
            nn.Conv2d(CELL, wide, 3, padding=1),
            *blocks[0],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * wide, deep, 1),
            *blocks[1],
            nn.Conv2d(deep, config.latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.latent_channels, deep, 3, padding=1),
            *blocks[2],
            nn.Conv2d(deep, 4 * wide, 1),
            nn.PixelShuffle(2),
            *blocks[3],
            nn.Conv2d(wide, CELL, 3, padding=1),
        )

    def _encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not caches:
            pixels = torch.cat([pixels[:, :1].expand(-1, FOLD - 1, -1, -1, -1), pixels], dim=1)
        cells = F.pixel_unshuffle(pixels.unflatten(1, (-1, FOLD)).flatten(2, 3), FOLD)
        return run_images(self.encoder, cells, caches)

    def _decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cells, written = run_images(self.decoder, raw, caches)
        frames = F.pixel_shuffle(cells, FOLD).unflatten(2, (FOLD, 3)).flatten(1, 2)
        return frames if caches else frames[:, FOLD - 1 :], written
