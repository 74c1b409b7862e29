"""A new tiny VAE that begins as a low-pass pyramid of its pictures."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from modeling.vae.tiny import MemoryBlock, TimeGrow, TimePool, TinyVae, UpsampleConv

BLUR = torch.tensor([0.25, 0.5, 0.25])
SLOPE = torch.tensor([-1.0, 0.0, 1.0])
SMOOTH, ACROSS, DOWN = (torch.outer(*ab) for ab in ((BLUR, BLUR), (BLUR, SLOPE), (SLOPE, BLUR)))
# What latents 3-12 begin as: (the encoder's halving that makes it, filter, colours it looks at).
SLOPES: tuple[tuple[int, Tensor, tuple[int, ...]], ...] = (
    *((2, ACROSS, (colour,)) for colour in range(3)),
    *((2, DOWN, (colour,)) for colour in range(3)),
    *((halving, kernel, (0, 1, 2)) for halving in (1, 0) for kernel in (ACROSS, DOWN)),
)
COLOURS = 3  # latents 0-2
GAIN = 4.0  # makes latents of about unit variance, as the noise of VAE training expects them


@torch.no_grad()
def start_as_pyramid(vae: TinyVae) -> None:
    """Let the first latents begin as what a picture shrinks to.

    Latents 0-2 begin as the mean red, green and blue of their pixels, 3-8 as the slopes of these
    at the last halving, 9-12 as the slopes of brightness at the two halvings before. The decoder
    begins by enlarging the mean colours smoothly; everything else stays random. From random weights
    alone this network learns to tell light from dark at once, and colours and edges only after
    thousands of steps: a deep ReLU network keeps the length of what comes in and forgets its
    direction.
    """
    layers = [*vae.encoder, *vae.decoder]
    widths = (layer.weight.shape[0] for layer in layers[:-1] if isinstance(layer, nn.Conv2d))
    carried = range(min(COLOURS + len(SLOPES), *widths))  # a narrow network: the part that fits
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            _last(layer).weight.zero_()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.zero_()
    _start_encoder(list(vae.encoder), carried)
    _start_decoder(list(vae.decoder), carried)


def _start_encoder(layers: list[nn.Module], carried: range) -> None:
    """Pixels are in [0, 1], so ReLUs let them through; slopes get an offset of 1/2 for that."""
    halving = 0
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, TimePool):
            width = layer.conv.weight.shape[0]
            for channel in carried:
                layer.conv.weight[channel] = 0
                layer.conv.weight[channel, channel::width] = 1 / layer.stride
        elif isinstance(layer, nn.Conv2d) and isinstance(following, MemoryBlock):
            for channel in carried:
                _set(layer, channel, (channel,), SMOOTH)
            for channel, (where, kernel, colours) in enumerate(SLOPES, start=COLOURS):
                if where == halving and channel in carried:
                    _set(layer, channel, colours, kernel / len(colours))
                    _bias(_last(following))[channel] = 0.5
            halving += 1
    first, last = cast(nn.Conv2d, layers[0]), cast(nn.Conv2d, layers[-1])
    for channel in carried[:COLOURS]:
        _set(first, channel, (channel,), _centre(1.0))
    for channel in carried:
        _set(last, channel, (channel,), _centre(GAIN))
        _bias(last)[channel] = -0.5 * GAIN


def _start_decoder(layers: list[nn.Module], carried: range) -> None:
    first, last = (layer for layer in layers if type(layer) is nn.Conv2d)
    for channel in carried:
        _set(first, channel, (channel,), _centre(1 / GAIN))
        _bias(first)[channel] = 0.5
    for layer in layers:
        if isinstance(layer, TimeGrow):
            width = layer.conv.weight.shape[0] // layer.stride
            for channel in carried:
                layer.conv.weight[channel::width] = 0
                layer.conv.weight[channel::width, channel] = 1
        elif isinstance(layer, UpsampleConv):
            for channel in carried:
                _set(layer, channel, (channel,), SMOOTH)
    for channel in carried[:COLOURS]:
        last.weight[channel, channel, 1, 1] += 1


def _set(layer: nn.Conv2d, output: int, inputs: tuple[int, ...], kernel: Tensor) -> None:
    """Let channel `output` be what `kernel` makes of channels `inputs`, and of no other."""
    layer.weight[output] = 0
    layer.weight[output, inputs] = kernel


def _centre(value: float) -> Tensor:
    return value * torch.eye(9)[4].view(3, 3)


def _last(block: MemoryBlock) -> nn.Conv2d:
    return cast(nn.Conv2d, block.conv[-1])


def _bias(layer: nn.Conv2d) -> Tensor:
    return cast(Tensor, layer.bias)
