"""Wan's VAE on a GPU: the passes of `WanVae` with channels innermost and nothing between the
convolutions but one kernel each. On Hopper most convolutions are our own too (`conv`).

A convolution's bias and a residual block's sum are left to the kernel that reads the result next,
which also normalises, applies SiLU, and lays the frames behind the remembered ones. Doubling the
size and convolving is one convolution with four sub-pixel phases at the smaller size.

B batch, F frames at the layer's rate, H x W size at the layer's scale, C channels; [B, F, H, W, C].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.gpu.conv import CausalConvolution
from modeling.gpu.kernels.vae import add_bias_residual, norm_silu
from modeling.vae.streaming import StreamTape
from modeling.vae.wan import ChannelNorm, Downsample, ResidualBlock, Upsample, WanVae

_STEM_CHANNELS = 16
# Numbers of channels at which cuDNN is faster on the three frames that an output sees laid side by
# side, even though they are then written three times (docs/performance.md has the times). Those at
# 96 are for GPUs before and after Hopper.
_STACKED_ENCODING = (96,)
_STACKED_DECODING = (96, 384)


@dataclass
class Sum:
    """An activation whose last additions are still to be done: y + bias + residual.

    Once they are done, it lets go of the parts: they are a large share of the working memory.
    """

    y: Tensor
    bias: Tensor | None = None  # [C]
    residual: Tensor | None = None
    phases: bool = False  # y holds the four phases of a doubled image

    @property
    def done(self) -> bool:
        return self.bias is None and self.residual is None and not self.phases

    def settle(self, value: Tensor) -> None:
        self.y, self.bias, self.residual, self.phases = value, None, None, False

    def value(self) -> Tensor:
        if not self.done:
            assert self.bias is not None
            assert self.residual is not None
            assert not self.phases
            self.settle(add_bias_residual(self.y, self.bias, self.residual))
        return self.y


def fuse(vae: WanVae) -> None:
    """Make `vae` run its passes here from now on."""
    fused = FusedWanVae(vae)
    vae._encode_pass, vae._decode_pass = fused.encode_pass, fused.decode_pass  # type: ignore[method-assign]


class FusedWanVae:
    """The passes of one `WanVae`, whose parameters it shares and lays out anew."""

    def __init__(self, vae: WanVae) -> None:
        self._vae = vae
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                _lay_out(module, torch.channels_last_3d)
            elif isinstance(module, nn.Conv2d):
                _lay_out(module, torch.channels_last)
        # Tensor cores want channels in eights, the pixels' three frames of three are nine.
        stem = stack_frames(vae.encoder.conv1.weight.detach())
        self._stem = _inner(F.pad(stem, (0, 0, 0, 0, 0, _STEM_CHANNELS - stem.shape[1])))
        self._phases = {
            layer: _inner(phase_weights(cast(nn.Conv2d, layer.resample[1]).weight.detach()))
            for layer in vae.decoder.upsamples
            if isinstance(layer, Upsample)
        }
        self._own = {
            conv: CausalConvolution(conv)
            for conv in vae.modules()
            if isinstance(conv, nn.Conv3d) and CausalConvolution.takes(conv)
        }
        self._stacked = {
            conv: _stack(conv)
            for network, channels in (
                (vae.encoder, _STACKED_ENCODING),
                (vae.decoder, _STACKED_DECODING),
            )
            for conv in network.modules()
            if isinstance(conv, nn.Conv3d) and conv.kernel_size == (3, 3, 3)
            if conv.in_channels == conv.out_channels and conv.in_channels in channels
            if conv not in self._own
        }

    def encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        tape = StreamTape(caches)
        encoder = self._vae.encoder
        x = pixels.permute(0, 1, 3, 4, 2)
        past = None if tape.first else _inside(tape.read(_outside(x)))
        behind = x.new_zeros(x.shape[0], 2, *x.shape[2:]) if past is None else past
        x = torch.cat([behind, x], dim=1)
        tape.write(_outside(x[:, -2:]))
        stacked = x.new_zeros(*x[:, 2:].shape[:-1], _STEM_CHANNELS)
        stacked[..., :9] = torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=-1)
        stem = F.conv2d(_images(stacked), self._stem, padding=1)
        h = Sum(_clip(stem, len(x)), encoder.conv1.bias)
        for layer in (*encoder.downsamples, *encoder.middle):
            h = self._layer(layer, h, tape)
        moments = self._vae.conv1(self._head(encoder.head, h, tape))
        mean = moments[:, : self._vae.config.latent_channels]
        return mean.transpose(1, 2), tape.written

    def decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        tape = StreamTape(caches)
        decoder = self._vae.decoder
        x = self._vae.conv2(raw.transpose(1, 2))
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if tape.first else torch.cat([tape.read(x), x], dim=2)
        tape.write(x[:, :, -2:])
        h = Sum(_inside(decoder.conv1(x)))
        for layer in (*decoder.middle, *decoder.upsamples):
            h = self._layer(layer, h, tape)
        return self._head(decoder.head, h, tape).transpose(1, 2), tape.written

    def _layer(self, layer: nn.Module, h: Sum, tape: StreamTape) -> Sum:
        if isinstance(layer, ResidualBlock):
            return self._residual_block(layer, h, tape)
        x = h.value()
        if isinstance(layer, Upsample):
            x = _double_rate(layer, x, tape) if layer.temporal else x
            conv = cast(nn.Conv2d, layer.resample[1])
            y = F.conv2d(_images(x), self._phases[layer], padding=1)
            return Sum(_clip(y, x.shape[0]), conv.bias, phases=True)
        if isinstance(layer, Downsample):
            conv = cast(nn.Conv2d, layer.resample[1])
            # The public network pads right and below only. Padding by 2 all round shifts its
            # windows by one output and needs no padded copy.
            y = F.conv2d(_images(x), conv.weight, conv.bias, stride=2, padding=2)[:, :, 1:, 1:]
            small = y.contiguous(memory_format=torch.channels_last)
            return Sum(_inside(layer.resample_time(_outside(_clip(small, x.shape[0])), tape)))
        return Sum(_inside(layer(_outside(x), tape)))

    def _residual_block(self, block: ResidualBlock, h: Sum, tape: StreamTape) -> Sum:
        norm1, conv1, norm2, conv2 = block.residual.values()
        bias1, bias2 = cast(Tensor, conv1.bias), cast(Tensor, conv2.bias)
        middle = Sum(self._convolve(h, norm1, conv1, tape, keep=True), bias1)
        y = self._convolve(middle, norm2, conv2, tape, keep=False)
        x = h.value()
        if isinstance(block.shortcut, nn.Conv3d):
            x = F.linear(x, block.shortcut.weight.flatten(1), block.shortcut.bias)
        return Sum(y, bias2, x)

    def _head(self, head: nn.ModuleDict, h: Sum, tape: StreamTape) -> Tensor:
        norm, conv = head.values()
        y = self._convolve(h, norm, conv, tape, keep=False)
        return _outside(y + cast(Tensor, conv.bias))

    def _convolve(
        self, h: Sum, norm: nn.Module, conv: nn.Module, tape: StreamTape, keep: bool
    ) -> Tensor:
        """The convolution, without its bias, of SiLU of the norm of h; h is gone if not kept."""
        assert isinstance(norm, ChannelNorm)
        assert isinstance(conv, nn.Conv3d)
        own, stacked = self._own.get(conv), self._stacked.get(conv)
        past = None if tape.first else _inside(tape.read())
        x, seen, tail = norm_silu(
            h.y,
            norm.gamma.flatten(),
            past,
            bias=h.bias,
            residual=h.residual,
            phases=h.phases,
            layout="frames" if own else "padded" if stacked is None else "stacked",
            keep=keep and not h.done,
        )
        if not keep:
            h.settle(h.y.new_empty(0))
        elif x is not None:
            h.settle(x)
        tape.written.append(_outside(tail))
        if own:
            return own(seen, past)
        if stacked is not None:
            return _clip(F.conv2d(_images(seen), stacked, padding=1), len(seen))
        return _inside(F.conv3d(_outside(seen), conv.weight, padding=(0, 1, 1)))


def _double_rate(layer: Upsample, x: Tensor, tape: StreamTape) -> Tensor:
    """[B, F, H, W, C] -> [B, 2 * F, H, W, C]; a stream's first frame stays alone."""
    if tape.first:
        tape.written.append(_outside(x.new_zeros(len(x), 2, *x.shape[2:])))
        return x
    seen = torch.cat([_inside(tape.read()), x], dim=1)
    tape.write(_outside(seen[:, -2:]))
    pairs = _inside(layer.time_conv(_outside(seen))).unflatten(-1, (2, -1))  # [B, F, H, W, 2, C]
    return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)


def stack_frames(weight: Tensor) -> Tensor:
    """[C', C, 3, 3, 3] -> [C', 3 * C, 3, 3]: the frames that a convolution sees as channels."""
    return weight.transpose(1, 2).flatten(1, 2)


def phase_weights(weight: Tensor) -> Tensor:
    """Nearest-neighbour doubling, then a 3 x 3 convolution, as one 2 x 2 convolution.

    weight [C', C, 3, 3] -> [4 * C', C, 2, 2]. Output (2 i + a, 2 j + b) is channel group 2 a + b
    at (i + a, j + b) of that convolution padded by 1. Rows i - 1, i, i of the doubled image are
    rows i - 1 and i of the small one under a = 0, and i, i, i + 1 under a = 1; columns alike.
    """
    wide = weight.float()
    first, middle, last = wide.unbind(2)
    rows = [torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2)]
    groups = []
    for row in rows:  # [C', C, 2, 3]
        left, centre, right = row.unbind(3)
        groups.append(torch.stack([left, centre + right], 3))
        groups.append(torch.stack([left + centre, right], 3))
    return torch.cat(groups).to(weight.dtype)


def _outside(x: Tensor) -> Tensor:
    """[B, F, H, W, C] seen as [B, C, F, H, W], as PyTorch names it; no copy."""
    return x.permute(0, 4, 1, 2, 3)


def _inside(x: Tensor) -> Tensor:
    """[B, C, F, H, W] to [B, F, H, W, C]; no copy if channels are innermost already."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _images(x: Tensor) -> Tensor:
    """[B, F, H, W, C] as images [B * F, C, H, W]; no copy."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _clip(images: Tensor, batch: int) -> Tensor:
    """[B * F, C, H, W] to [B, F, H, W, C]; no copy if channels are innermost already."""
    return images.permute(0, 2, 3, 1).contiguous().unflatten(0, (batch, -1))


def _lay_out(convolution: nn.Conv2d | nn.Conv3d, layout: torch.memory_format) -> None:
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=layout)


def _stack(convolution: nn.Conv3d) -> Tensor:
    """The weight as `stack_frames` has it; the layer keeps it as a view, not a second copy."""
    stacked = _inner(stack_frames(convolution.weight.detach()))
    parts = stacked.unflatten(1, (3, -1))  # [C', 3, C, 3, 3]
    convolution.weight.data = parts.transpose(1, 2)
    return stacked


def _inner(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)
