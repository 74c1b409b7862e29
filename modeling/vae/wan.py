"""The causal video VAE of Wan2.1 with the parameter names of the public checkpoint.

The arithmetic is that of `wan/modules/vae.py` (Wan-Video/Wan2.1), which runs a clip as one frame
and then groups of four through caches it keeps inside itself. Here the caches come from and go to
the caller. A stream's first frame skips the temporal resampling.

Shapes inside: B batch, C channels, T frames at the layer's rate, H W size at the layer's scale.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.config import VaeConfig
from modeling.vae.streaming import StreamingVae, StreamTape

_MULTIPLIERS = (1, 2, 4, 4)
_RES_BLOCKS = 2


def _causal_conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    """Sees the current frame and the two before it, which `_with_past` puts in front."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))


class ChannelNorm(nn.Module):
    """Each position's channel vector scaled to length sqrt(C) times gamma; at least in float32."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.normalize(wide, dim=1).to(x.dtype)
        return normed * self.gamma.shape[0] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # Places 1, 4 and 5 are the activations and the dropout of the public layout.
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels, 3),
                "2": _causal_conv(in_channels, out_channels),
                "3": ChannelNorm(out_channels, 3),
                "6": _causal_conv(out_channels, out_channels),
            }
        )
        self.shortcut = (
            nn.Conv3d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, tape: StreamTape) -> Tensor:
        norm1, conv1, norm2, conv2 = self.residual.values()
        y = conv1(_with_past(F.silu(norm1(x)), 2, tape))
        y = conv2(_with_past(F.silu(norm2(y)), 2, tape))
        return y + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention among the positions of one frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tape: StreamTape) -> Tensor:
        frames = _fold(x)  # [B*T, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [B*T, H*W, 3*C]
        # Channels innermost, as the fused attention kernels want them; free if they are already.
        q, k, v = qkv.contiguous().unsqueeze(1).chunk(3, dim=-1)  # [B*T, 1 head, H*W, C]
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.squeeze(1).transpose(1, 2).reshape(frames.shape))
        return x + _unfold(y, x.shape[0])


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` the frame rate; the first frame stays alone."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.temporal = temporal
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, tape: StreamTape) -> Tensor:
        return self.resample_time(_unfold(self.resample(_fold(x)), x.shape[0]), tape)

    def resample_time(self, x: Tensor, tape: StreamTape) -> Tensor:
        if not self.temporal:
            return x
        if not tape.first:
            return self.time_conv(_with_past(x, 1, tape))
        tape.write(x)
        return x


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `temporal` doubles the frame rate.

    The stream's first frame is not doubled, and the frames after it do not see it: the temporal
    convolution starts from zeros at the second latent, as in the public code.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
        )
        self.temporal = temporal
        if temporal:
            self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, tape: StreamTape) -> Tensor:
        if self.temporal and tape.first:
            tape.write(x.new_zeros(x.shape[0], x.shape[1], 2, *x.shape[3:]))
        elif self.temporal:
            x = self._double_rate(_with_past(x, 2, tape))
        return _unfold(self.resample(_fold(x)), x.shape[0])

    def _double_rate(self, x: Tensor) -> Tensor:
        pairs = self.time_conv(x).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
        return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # [B, C, 2*T, H, W]


def _with_past(x: Tensor, frames: int, tape: StreamTape) -> Tensor:
    """`x` behind the `frames` frames that came before it; zeros at the stream's start."""
    x = F.pad(x, (0, 0, 0, 0, frames, 0)) if tape.first else torch.cat([tape.read(x), x], dim=2)
    tape.write(x[:, :, -frames:])
    return x


def _fold(x: Tensor) -> Tensor:
    """`[B, C, T, H, W]` to images `[B*T, C, H, W]`; no copy if channels are innermost."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold(images: Tensor, batch: int) -> Tensor:
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels),
            FrameAttention(channels),
            ResidualBlock(channels, channels),
        ]
    )


def _head(channels: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(channels, 3), "2": _causal_conv(channels, out_channels)})


class Encoder(nn.Module):
    """Pixels `[B, 3, 4, H, W]`, or 1 frame at first, to moments `[B, 2 * latent, 1, H/8, W/8]`."""

    def __init__(self, base_dim: int, latent_channels: int) -> None:
        super().__init__()
        dims = [base_dim * multiplier for multiplier in (1, *_MULTIPLIERS)]
        self.conv1 = _causal_conv(3, dims[0])
        layers: list[nn.Module] = []
        for level, (channels, out_channels) in enumerate(pairwise(dims)):
            layers.append(ResidualBlock(channels, out_channels))
            layers.extend(ResidualBlock(out_channels, out_channels) for _ in range(_RES_BLOCKS - 1))
            if level < len(_MULTIPLIERS) - 1:
                layers.append(Downsample(out_channels, temporal=level > 0))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], 2 * latent_channels)

    def forward(self, x: Tensor, tape: StreamTape) -> Tensor:
        x = self.conv1(_with_past(x, 2, tape))
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, tape)
        norm, conv = self.head.values()
        return conv(_with_past(F.silu(norm(x)), 2, tape))


class Decoder(nn.Module):
    """Latents `[B, latent, k, h, w]` to pixels `[B, 3, 4 k, 8 h, 8 w]`, at first 1 to 1."""

    def __init__(self, base_dim: int, latent_channels: int) -> None:
        super().__init__()
        dims = [base_dim * multiplier for multiplier in (_MULTIPLIERS[-1], *_MULTIPLIERS[::-1])]
        self.conv1 = _causal_conv(latent_channels, dims[0])
        self.middle = _middle(dims[0])
        layers: list[nn.Module] = []
        for level, (channels, out_channels) in enumerate(pairwise(dims)):
            # Upsample halves the channels, so every level after it starts from half.
            layers.append(ResidualBlock(channels // 2 if level else channels, out_channels))
            layers.extend(ResidualBlock(out_channels, out_channels) for _ in range(_RES_BLOCKS))
            if level < len(_MULTIPLIERS) - 1:
                layers.append(Upsample(out_channels, temporal=level < 2))
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(dims[-1], 3)

    def forward(self, x: Tensor, tape: StreamTape) -> Tensor:
        x = self.conv1(_with_past(x, 2, tape))
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, tape)
        norm, conv = self.head.values()
        return conv(_with_past(F.silu(norm(x)), 2, tape))


class WanVae(StreamingVae):
    """Wan2.1's VAE; `config.base_dim` is its width (96 in the public checkpoint).

    Activations take the memory format of the weights: converted to channels-last, they run so.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        latent = config.latent_channels
        self.encoder = Encoder(config.base_dim, latent)
        self.conv1 = nn.Conv3d(2 * latent, 2 * latent, 1)
        self.conv2 = nn.Conv3d(latent, latent, 1)
        self.decoder = Decoder(config.base_dim, latent)

    def _encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        tape = StreamTape(caches)
        moments = self.conv1(self.encoder(pixels.transpose(1, 2), tape))
        mean = moments[:, : self.config.latent_channels]
        return mean.transpose(1, 2), tape.written

    def _decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        tape = StreamTape(caches)
        pixels = self.decoder(self.conv2(raw.transpose(1, 2)), tape)
        return pixels.transpose(1, 2), tape.written
