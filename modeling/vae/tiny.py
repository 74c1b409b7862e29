"""TAEHV, the tiny video autoencoder (madebyollin/taehv), with its public parameter names.

Plain 2-D convolutions on frames; the only thing that crosses time is each memory block's previous
input frame and the (un)pooling of frame pairs. The public network works on pixels in [0, 1] and on
groups of four frames. To keep the frame geometry of Wan's VAE, a stream's first frame is encoded
as a group of four copies of itself, and the first three decoded frames are dropped.

Public Wan weights (`taew2_1`) give latents that are already standardised: use mean 0 and std 1.

Shapes inside: B batch, T frames at the layer's rate; images are `[B*T, C, H, W]` with the channels
innermost in memory, which is faster on CPUs and GPUs, so no layer may fall back to another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.config import VaeConfig
from modeling.vae.streaming import RememberingBlock, StreamingVae, StreamTape, run_images


def _conv(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, stride=stride, bias=bias)


class SoftClamp(nn.Module):
    """Bends latents smoothly into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(RememberingBlock):
    """Residual block that sees each frame beside the frame before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )

    def forward(self, x: Tensor, tape: StreamTape, batch: int) -> Tensor:
        clips = x.split(x.shape[0] // batch)  # B times [T, C, H, W]
        last = torch.cat([clip[-1:] for clip in clips])
        memories = torch.zeros_like(last) if tape.first else tape.read(last)
        tape.write(last)
        shifted = [
            frames
            for memory, clip in zip(memories.split(1), clips, strict=True)
            for frames in (memory, clip[:-1])
            if len(frames)  # joined with nothing, channels would not stay innermost
        ]
        y = self.conv(torch.cat([x, torch.cat(shifted)], dim=1))
        return F.relu(y + x, inplace=True)


class TimePool(nn.Module):
    """Joins `stride` frames in one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x[i :: self.stride] for i in range(self.stride)], dim=1))


class TimeGrow(nn.Module):
    """Splits each frame in `stride` frames."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1).unflatten(-1, (self.stride, -1))  # [N, H, W, s, C]
        return y.permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


class UpsampleConv(nn.Conv2d):
    """Doubles height and width, then convolves."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2))


def _encoder(width: int, latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, width), nn.ReLU(inplace=True)]
    for stride in (2, 2, 1):
        layers += [TimePool(width, stride), _conv(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(3)]
    return nn.Sequential(*layers, _conv(width, latent_channels))


def _decoder(widths: tuple[int, ...], latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [SoftClamp(), _conv(latent_channels, widths[0])]
    layers.append(nn.ReLU(inplace=True))
    for width, next_width, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
        layers += [MemoryBlock(width) for _ in range(3)]
        # The public order is upsample, grow, convolve. Growing is pointwise, so it gives the same
        # before the upsampling for a quarter of the work; the identity keeps the public numbers.
        layers += [nn.Identity(), TimeGrow(width, stride), UpsampleConv(width, next_width)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), _conv(widths[-1], 3))


class TinyVae(StreamingVae):
    """TAEHV of the decoder widths `config.widths`; the encoder is as wide as the last of them."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        self.encoder = _encoder(config.widths[-1], config.latent_channels)
        self.decoder = _decoder(config.widths, config.latent_channels)

    def _encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not caches:
            pixels = torch.cat([pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels], dim=1)
        return run_images(self.encoder, (pixels + 1) / 2, caches)

    def _decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        pixels, written = run_images(self.decoder, raw, caches)
        if not caches:
            pixels = pixels[:, 3:]
        return 2 * pixels - 1, written
