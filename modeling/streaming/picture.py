"""What a stream shows its networks, and what it makes of their pictures.

n frames, uint8 [n, H, W, 3] of the stream's size outside; the networks see [1, n, 3, h, w] in
[-1, 1] of its working size, padded to whole tokens.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from infra.runtime.errors import UserError
from modeling.config import StreamConfig
from modeling.detail.guide import Follow, blurred
from modeling.detail.noise_gate import only_edited
from modeling.detail.resample import Resize
from modeling.detail.transfer import Transfer
from modeling.geometry import SPATIAL_STRIDE, padded_latent_size
from modeling.pixels import from_uint8, to_uint8
from modeling.streaming.device import to_device
from modeling.vae.streaming import StreamingVae, VaeState

Size = tuple[int, int]  # height, width in pixels
Detail = Literal["source", "off"]  # whether what is enlarged gets the source's detail


class Studio(Protocol):
    """What all streams of a model share; part of `modeling.streaming.stream.Workshop`."""

    vae: StreamingVae
    device: torch.device
    resize: Resize
    following: Follow
    transfer: Transfer

    @property
    def settings(self) -> StreamConfig: ...


class Picture:
    """The frames of one stream's current chunk on their way in, and its edit on its way out."""

    def __init__(self, studio: Studio, size: Size, work: Size, detail: Detail) -> None:
        if detail not in get_args(Detail):
            raise UserError(f"detail {detail!r} is none; choose {' or '.join(get_args(Detail))}")
        self.size, self.work, self.detail = size, work, detail
        self._studio = studio
        self._blur = studio.settings.guide_blur
        # A decoder for the source, where it is decoded again: see `_seen`.
        self.reproducer: VaeState | None = None
        self._large: list[Tensor] = []  # on the device, where their detail is wanted

    def take(self, frames: Tensor) -> Tensor:
        """Frames uint8 [n, H, W, 3] as the encoder wants them: [1, n, 3, padded h, padded w]."""
        small = self._studio.resize(self.keep(frames), *self.work, "bicubic")
        pixels = from_uint8(small.permute(0, 3, 1, 2))
        latent_height, latent_width = padded_latent_size(*self.work)
        right = latent_width * SPATIAL_STRIDE - self.work[1]
        below = latent_height * SPATIAL_STRIDE - self.work[0]
        return F.pad(pixels, (0, right, 0, below), mode="replicate")[None]

    def keep(self, frames: Tensor) -> Tensor:
        """Bring frames to the device, and keep them there if the chunk's edit needs them."""
        frames = to_device(frames, self._studio.device)
        if self.detail == "source":
            self._large.append(frames)
        return frames

    def give(self, pixels: Tensor, source: Tensor, count: int) -> Tensor:
        """The chunk's first `count` frames, uint8 [count, H, W, 3], of its decoded edit.

        `source` are the chunk's source latents [1, F, C, h, w].
        """
        edit = self._frames(pixels, count)
        if self.detail == "off":
            return self._studio.resize(edit, *self.size, "bicubic")
        large, self._large = torch.cat(self._large)[:count], []
        seen = self._seen(large, source)
        edit = only_edited(seen, edit)
        if self._blur is not None:
            edit = self._studio.following(seen, edit)
        return self._studio.transfer(large, seen, edit)

    @property
    def reproduces(self) -> bool:
        """Whether the source is decoded as well as the edit."""
        return self.detail == "source" and self._blur is None

    def _seen(self, large: Tensor, source: Tensor) -> Tensor:
        """The source as the editor sees it, which lacks what the edit lacks because of the VAE."""
        if self._blur is not None:
            return blurred(self._studio.resize(large, *self.work, "bicubic"), self._blur)
        reproduced, self.reproducer = self._studio.vae.decode(source, self.reproducer)
        return self._frames(reproduced, len(large))

    def _frames(self, pixels: Tensor, count: int) -> Tensor:
        """[1, n, 3, padded h, padded w] in [-1, 1] -> uint8 [count, h, w, 3]."""
        frames = to_uint8(pixels[0, :count, :, : self.work[0], : self.work[1]])
        return frames.permute(0, 2, 3, 1).contiguous()
