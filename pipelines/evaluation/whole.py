"""A foundation model as it was trained: the whole clip at once, every latent seeing every other.

`WholeEditor` opens what looks like a stream, so that a foundation model is judged on the clips, and
with the detail, of the causal models that come from it. It keeps every frame until the end and is
no way to edit live video.

Euler's method along the learned flow from noise, with classifier-free guidance (Ho & Salimans
2022) on the velocity: v = v(text) + (scale - 1) * (v(text) - v(no text)).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.detail.work_size import work_size as work_size_in_pixels
from modeling.diffusion.attention import bidirectional
from modeling.diffusion.flow import GRID
from modeling.editor import StreamingEditor
from modeling.geometry import PATCH, TEMPORAL_STRIDE
from modeling.losses.dmd import guided
from modeling.streaming.picture import Detail, Picture
from modeling.streaming.stream import EditedChunk


class WholeEditor(StreamingEditor):
    """A loaded model that edits clips whole, in `steps` steps with guidance `scale` (1: none)."""

    def __init__(self, *args: Any, steps: int, scale: float = 1.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scale = scale
        places = [round(GRID - GRID * n / steps) for n in range(steps)]
        self.timesteps = self.flow.warp(places)
        self.forwards = steps * (1 if scale == 1 else 2)  # of the transformer, for each clip

    def open(  # type: ignore[override]
        self,
        prompt: str,
        *,
        height: int,
        width: int,
        seed: int = 0,
        work_size: str = "full",
        detail: Detail = "off",
    ) -> WholeClip:
        """As `StreamingEditor.open`."""
        trained = (self.settings.height, self.settings.width)
        work = work_size_in_pixels(work_size, height, width, trained)
        return WholeClip(self, Picture(self, (height, width), work, detail), prompt, seed)


class WholeClip:
    """Frames in; all of them out, edited, at the end."""

    def __init__(self, editor: WholeEditor, picture: Picture, prompt: str, seed: int) -> None:
        self.editor, self.picture, self.seed = editor, picture, seed
        self.text = editor.text.encode([prompt]).to(editor.device)
        self.frames: list[Tensor] = []

    def push(self, frames: np.ndarray) -> Iterator[EditedChunk]:
        self.frames.append(torch.from_numpy(frames))
        return iter(())

    @torch.no_grad()
    def flush(self) -> EditedChunk:
        started = time.monotonic()
        frames, vae = torch.cat(self.frames), self.editor.vae
        count = len(frames)
        missing = -(count - 1) % TEMPORAL_STRIDE  # of the last latent: repeated, then cut off
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        source = vae.encode(self.picture.take(frames))[0].float()  # so that small steps add up
        edited, _ = vae.decode(self.sample(source))
        shown = self.picture.give(edited, source, count).cpu().numpy()
        tokens = np.ones(
            (source.shape[1], source.shape[3] // PATCH, source.shape[4] // PATCH), bool
        )
        elapsed = 1000 * (time.monotonic() - started)
        return EditedChunk(0, 0, shown, 1.0, len(self.editor.timesteps), elapsed, tokens)

    def sample(self, source: Tensor) -> Tensor:
        """The edit's latents of the source's, [1, F, C, h, w]."""
        flow, see = self.editor.flow, bidirectional(source.shape[1])
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(source.shape, generator=generator).to(source)
        sigmas = [*flow.sigma(self.editor.timesteps).tolist(), 0.0]
        for n, timestep in enumerate(self.editor.timesteps):
            at = timestep[None]
            velocity = self.editor.transformer(x, source, at, self.text, see)
            if self.editor.scale != 1:
                free = self.editor.transformer(x, source, at, torch.zeros_like(self.text), see)
                velocity = guided(velocity, free, self.editor.scale - 1)
            x = x + (sigmas[n + 1] - sigmas[n]) * velocity
        return x
