"""What both video VAEs share: the stream's frame geometry, its state, and standardised latents.

A stream's first latent holds one pixel frame and every other latent four, so n latents are
4 n - 3 pixel frames. Both networks are causal: what is left of a push is a fixed number of
activations of its last frames, which `VaeState` carries. The encoder runs once a latent, so that
feeding a clip whole or in any pieces gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling.config import VaeConfig
from modeling.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE

# Latents of one pass through the decoder; longer ones run in several passes, so that working memory
# does not grow with the clip. A stream decodes chunks, which a GPU does faster at once.
_DECODED_AT_ONCE = 3


@dataclass
class VaeState:
    """What one stream's encoder or decoder remembers; fixed in size, never changed in place.

    `caches` are the network's activations of the last frames, in its own order (empty before the
    first frame); `pending` are the pixel frames `[B, p, 3, H, W]`, p <= 3, that do not complete a
    latent yet. Saved with `torch.save`, it loads with `weights_only=True` wherever this module is
    imported.
    """

    caches: list[Tensor]
    pending: Tensor | None = None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> VaeState:
        pending = None if self.pending is None else self.pending.to(device=device, dtype=dtype)
        return VaeState([cache.to(device=device, dtype=dtype) for cache in self.caches], pending)


torch.serialization.add_safe_globals([VaeState])


class StreamingVae(nn.Module):
    """Base of `WanVae` and `TinyVae`; a subclass gives the two passes through its network.

    All methods are differentiable and leave the state handed in as it was. An encoder's state is
    for encoding only, a decoder's for decoding.
    """

    passes_at_once = False  # whether a pass takes any number of latents, as training likes it
    mean: Tensor
    std: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        # Not persistent: they belong to the config, and public checkpoints do not hold them.
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; training may keep the statistics in another type."""
        return next(self.parameters()).dtype

    def encode(self, pixels: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Pixels `[B, f, 3, H, W]` in [-1, 1] to standardised latents `[B, F, C, H/8, W/8]`.

        `state` None starts a stream. Frames that do not complete a latent wait in the state
        returned, so F may be 0. Raises ValueError if H or W is no multiple of 8 or the state is of
        another size.
        """
        raw, state = self.encode_raw(pixels, state)
        return (raw - self.mean) / self.std, state

    def decode(self, latents: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Standardised latents `[B, F, C, h, w]` to pixels `[B, f, 3, 8 h, 8 w]` in [-1, 1].

        `state` None starts a stream, whose first latent gives one frame; all others give four.
        """
        pixels, state = self.decode_raw(latents * self.std + self.mean, state)
        return pixels.clamp(-1.0, 1.0), state

    def encode_raw(self, pixels: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """`encode` without standardisation: the mean of the posterior, as training needs it."""
        _expect_frames("pixels", pixels, 3)
        batch, _, _, height, width = pixels.shape
        if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(
                f"pixels of {width}x{height} cannot be encoded: width and height must be "
                f"multiples of {SPATIAL_STRIDE}; pad or crop the frames"
            )
        pixels = pixels.to(self.dtype)
        state = state or VaeState([])
        if state.pending is not None:
            _expect_same_stream(state.pending, pixels)
            pixels = torch.cat([state.pending, pixels], dim=1)

        caches, frames, done = state.caches, pixels.shape[1], 0
        means: list[Tensor] = []
        while True:
            # The stream's first latent is its first frame alone.
            stop = done + (TEMPORAL_STRIDE if caches else 1)
            if stop > frames:
                break
            if self.training and self.passes_at_once:  # faster on a GPU; equal but for rounding
                stop += (frames - stop) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
            mean, caches = self._encode_pass(pixels[:, done:stop], caches)
            means.append(mean)
            done = stop
        if not means:
            size = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
            means.append(pixels.new_zeros(batch, 0, self.config.latent_channels, *size))
        # A copy, because a view would keep the caller's whole clip alive.
        pending = pixels[:, done:].clone() if done < frames else None
        return torch.cat(means, dim=1), VaeState(caches, pending)

    def decode_raw(self, raw: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """`decode` from unstandardised latents and without the clamp, as training needs it."""
        _expect_frames("latents", raw, self.config.latent_channels)
        raw = raw.to(self.dtype)
        caches = state.caches if state else []
        pieces: list[Tensor] = []
        done = 0
        while done < raw.shape[1]:
            stop = done + (_DECODED_AT_ONCE if caches else 1)  # the stream's first latent is alone
            if self.training and self.passes_at_once:
                stop = raw.shape[1]
            pixels, caches = self._decode_pass(raw[:, done:stop], caches)
            pieces.append(pixels)
            done = stop
        if not pieces:
            batch, _, _, height, width = raw.shape
            size = (height * SPATIAL_STRIDE, width * SPATIAL_STRIDE)
            pieces.append(raw.new_zeros(batch, 0, 3, *size))
        return torch.cat(pieces, dim=1), VaeState(caches)

    def _encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One latent: of 1 frame with empty caches (a stream's start), of 4 after. Of
        1 + 4 k or 4 k frames, with `passes_at_once`."""
        raise NotImplementedError

    def _decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One latent to 1 frame with empty caches (a stream's start), k to 4 k after."""
        raise NotImplementedError


class StreamTape:
    """The caches of one pass: read in layer order, and written anew in the same order.

    Every layer with a memory calls `write` once, after one `read` unless `first`.
    """

    def __init__(self, caches: list[Tensor]) -> None:
        self.first = not caches  # the stream's first pass: there is nothing to read
        self.written: list[Tensor] = []
        self._caches = caches

    def read(self, x: Tensor | None = None) -> Tensor:
        """What the layer wrote in the pass before; `x` is its input now, to compare sizes."""
        cache = self._caches[len(self.written)]
        if x is not None:
            _expect_same_stream(cache, x)
        return cache

    def write(self, x: Tensor) -> None:
        # A copy, because a view would keep the whole activation alive between passes.
        self.written.append(x.clone())


class RememberingBlock(nn.Module):
    """A layer on `[B*F, C, H, W]` that is called with the pass's tape and B."""


def run_images(
    network: nn.Sequential, frames: Tensor, caches: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One pass of `[B, F, C, H, W]` through a network of layers on images and of such as remember;
    and the caches for the next."""
    batch = frames.shape[0]
    tape = StreamTape(caches)
    x = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for layer in network:
        x = layer(x, tape, batch) if isinstance(layer, RememberingBlock) else layer(x)
    return x.unflatten(0, (batch, -1)), tape.written


def _expect_frames(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[2] != channels:
        raise ValueError(
            f"{name} must be [batch, frames, {channels}, height, width], got {list(x.shape)}"
        )


def _expect_same_stream(before: Tensor, x: Tensor) -> None:
    if before.shape[0] != x.shape[0] or before.shape[-2:] != x.shape[-2:]:
        raise ValueError(
            f"the state is of a stream of batch {before.shape[0]} and size "
            f"{tuple(before.shape[-2:])}, but the push brings batch {x.shape[0]} and size "
            f"{tuple(x.shape[-2:])} at the same layer; start a new stream with state=None"
        )
