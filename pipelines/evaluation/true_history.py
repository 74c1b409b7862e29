"""Streams whose past is right.

`TrueHistory` opens streams that remember the right edit of each chunk instead of their own. It
needs the answer, so it is no way to edit: what it gains over an ordinary stream is what that
stream's own history costs. The right edit also shows what is asked for, so it is a bound. Which
tokens a mask cache recomputes still follows from what was made: compare with `cache=none`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import TextKV
from modeling.editor import StreamingEditor
from modeling.streaming.forward import StreamForward
from modeling.streaming.picture import Picture
from modeling.streaming.stream import EditStream


class TrueHistory(StreamingEditor):
    """A loaded model whose streams are told their right past."""

    def open(  # type: ignore[override]
        self, prompt: str, *, height: int, width: int, truth: np.ndarray, **options: Any
    ) -> EditStream:
        """As `StreamingEditor.open`; `truth` is the right edit of the whole clip, uint8
        [F, height, width, 3]."""
        stream = super().open(prompt, height=height, width=width, **options)
        picture = Picture(self, (height, width), stream.work, "off")
        with torch.no_grad():
            frames = picture.take(_whole_chunks(torch.from_numpy(truth), self))
            latents = self.vae.encode(frames)[0].float()  # [1, F, C, h, w]
        stream._forward = _Told(stream._forward, latents.split(self.settings.chunk_latents, dim=1))
        return stream


class _Told:
    """The forwards of a stream; each refresh leaves the next of `right` in the history."""

    def __init__(self, forward: StreamForward, right: tuple[Tensor, ...]) -> None:
        self._forward = forward
        self._right = iter(right)

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        return self._forward(noisy, source, timestep, text, reuse)

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self._forward.refresh(next(self._right), source, text)


def _whole_chunks(frames: Tensor, editor: StreamingEditor) -> Tensor:
    """[F, H, W, 3] with its last frame repeated until a chunk is complete, as a flush does: a GPU
    refreshes the last chunk, too, and so does a snapshot."""
    first, chunk = editor.settings.first_chunk_frames, editor.settings.chunk_frames
    missing = (first - len(frames)) % chunk
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
