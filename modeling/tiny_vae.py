"""TAEHV, the tiny video autoencoder (madebyollin/taehv), with its public parameter names.

Plain 2-D convolutions on frames; the only thing that crosses time is each memory block's previous
input frame and the (un)pooling of frame pairs. The public network works on pixels in [0, 1] and on
groups of four frames. To keep the frame geometry of Wan's VAE, a stream's first frame is encoded
as a group of four copies of itself, and the first three decoded frames are dropped.

Public Wan weights (`taew2_1`) give latents that are already standardised: use mean 0 and std 1.

Shapes inside: B batch, T frames at the layer's rate, images are `[B*T, C, H, W]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.presets import VaeConfig
from modeling.streaming_vae import StreamingVae, StreamTape

_FRAME_AXIS = 1  # [B, T, C, H, W]


def _conv(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, stride=stride, bias=bias)


class SoftClamp(nn.Module):
    """Bends latents smoothly into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
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

    def stream(self, x: Tensor, tape: StreamTape, batch: int) -> Tensor:
        frames = tape.extend(x.unflatten(0, (batch, -1)), 1)  # [B, 1 + T, C, H, W]
        before = frames[:, :-1].flatten(0, 1)
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x, inplace=True)


class TimePool(nn.Module):
    """Joins `stride` frames in one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class TimeGrow(nn.Module):
    """Splits each frame in `stride` frames."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


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
        layers += [nn.Upsample(scale_factor=2), TimeGrow(width, stride)]
        layers.append(_conv(width, next_width, bias=False))
    return nn.Sequential(*layers, nn.ReLU(inplace=True), _conv(widths[-1], 3))


class TinyVae(StreamingVae):
    """TAEHV of the decoder widths `config.widths`; the encoder is as wide as the last of them."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        if len(config.widths) != 4:
            raise ValueError(
                f"vae.widths {config.widths} must hold four decoder widths, latent side first, "
                "e.g. (256, 128, 64, 64)"
            )
        self.encoder = _encoder(config.widths[-1], config.latent_channels)
        self.decoder = _decoder(config.widths, config.latent_channels)

    def _encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not caches:
            pixels = torch.cat([pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels], dim=_FRAME_AXIS)
        return _run(self.encoder, (pixels + 1) / 2, caches)

    def _decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        pixels, written = _run(self.decoder, raw, caches)
        if not caches:
            pixels = pixels[:, 3:]
        return 2 * pixels - 1, written


def _run(
    network: nn.Sequential, frames: Tensor, caches: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One pass of `[B, T, C, H, W]` through an encoder (T a multiple of 4) or a decoder."""
    batch = frames.shape[0]
    tape = StreamTape(caches, _FRAME_AXIS)
    x = frames.flatten(0, 1)
    for layer in network:
        x = layer.stream(x, tape, batch) if isinstance(layer, MemoryBlock) else layer(x)
    return x.unflatten(0, (batch, -1)), tape.written
