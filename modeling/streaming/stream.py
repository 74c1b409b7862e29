"""One video being edited: frames in, edited chunks out, all state in plain sight.

F latents of a chunk, C channels, H x W latent size; pixels are uint8 [n, height, width, 3] outside.
Networks see frames at the stream's working size; what comes out has the size that came in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from infra.runtime.errors import UserError
from modeling.config import MaskCacheConfig, StreamConfig
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.geometry import (
    HEAD_FRAMES,
    PATCH,
    TEMPORAL_STRIDE,
    TOKEN_PIXELS,
    padded_latent_size,
)
from modeling.streaming.caches import kv_cache, mask_cache
from modeling.streaming.device import DeviceClock, to_device, to_host
from modeling.streaming.forward import ForwardOn
from modeling.streaming.picture import Detail, Picture, Size, Studio
from modeling.streaming.quality import Quality, at_size, kept_steps, mask_cache_of
from modeling.streaming.state import StreamState
from modeling.streaming.waiting import PendingFrames
from modeling.vae.streaming import VaeState

# Latents that prime the VAE's caches: more than a causal convolution stack sees clearly.
PRIMING_LATENTS = 6


@dataclass(frozen=True)
class EditedChunk:
    """One edited chunk; `frames` is uint8 [n, height, width, 3]."""

    index: int
    first_frame: int
    frames: np.ndarray
    recomputed: float  # share of tokens recomputed over all forwards of the chunk
    steps: int
    compute_ms: float  # of the device; see `EditStream._edit`
    mask: np.ndarray  # bool [F, H/2, W/2]: tokens recomputed in the pruned steps


class Workshop(Studio, Protocol):
    """What all streams of a model share; `modeling.editor.StreamingEditor` is it."""

    transformer: Transformer
    flow: FlowSchedule
    timesteps: Tensor  # [steps]
    identity: str  # of the networks: what a state of another model does not have
    latents: str  # of what its latents mean, which models may share
    forward_on: ForwardOn

    @property
    def settings(self) -> StreamConfig: ...

    def encode_prompt(self, prompt: str) -> TextKV: ...


class EditStream:
    """Made by `StreamingEditor.open` or `restore`."""

    def __init__(
        self,
        editor: Workshop,
        prompt: str,
        *,
        height: int,
        width: int,
        seed: int,
        work: Size,
        detail: Detail,
        mask: MaskCacheConfig | None,
    ) -> None:
        if min(height, width) < TOKEN_PIXELS:
            raise UserError(
                f"frames of {width}x{height} are too small; both sides need at least "
                f"{TOKEN_PIXELS} pixels"
            )
        self.editor = editor
        self.height, self.width, self.seed = height, width, seed
        self._usual = mask
        self._look(work, detail)
        self._spend(Quality(work))
        self._clock = DeviceClock(editor.device)
        # Marks around work that the next chunk's `compute_ms` counts.
        self._work: list[tuple[Any, Any]] = []
        # The newest chunk, edited and source, while it is no history that the next one can see.
        self._unrefreshed: tuple[Tensor, Tensor] | None = None
        # Noise is drawn on the CPU, so that a seed means the same video on every device.
        self._generator = torch.Generator().manual_seed(seed)
        self._encoder: VaeState | None = None
        self._decoder: VaeState | None = None
        # [2, F, C, H, W] edited and source in float16 on the host, sinks first
        self._history: list[Tensor] = []
        # Frames that do not fill a chunk yet, and the source latents of those that are encoded.
        self._pending = PendingFrames(height, width)
        self._source: list[Tensor] = []  # each [1, f, C, H, W]
        self._finished = False
        self.chunks = 0
        self.frames = 0
        self.prompt = prompt
        self._text = editor.encode_prompt(prompt)

    def _look(self, work: Size, detail: Detail) -> None:
        """See frames at this size, with empty caches."""
        editor = self.editor
        self._picture = Picture(editor, (self.height, self.width), work, detail)
        self._kv = kv_cache(editor.transformer, editor.settings, work, editor.device)
        self._forward = editor.forward_on(self._kv)

    def _spend(self, quality: Quality) -> None:
        """Take these steps and this budget of the mask cache, which starts anew."""
        editor, self.quality = self.editor, quality
        settings, network = editor.settings, editor.transformer
        self._timesteps = editor.timesteps[kept_steps(settings, quality)]
        config = mask_cache_of(self._usual, settings, quality)
        self._mask = mask_cache(config, network, settings, self.work, editor.device)
        self._next_tokens: Tensor | None = None  # on the host: `MaskCache.carried`

    @torch.no_grad()
    def change(self, quality: Quality) -> None:
        """Edit like this from the next chunk on; only between two chunks.

        At another working size the caches are made again, of the history at that size: so the edit
        stays what it was, and the change costs what going on from a compact state does.
        """
        if len(self._pending):
            raise ValueError(
                f"{len(self._pending)} frames of the next chunk are there already; change the "
                "quality between two chunks"
            )
        self._refresh()
        if self._work:
            self._clock.wait(self._work[-1][1])  # a GPU still reads what is let go of here
        resized = quality.work != self.work
        if resized:
            self._look(quality.work, self._picture.detail)
            size = padded_latent_size(*quality.work)
            self._history = [at_size(chunk, *size) for chunk in self._history]
        self._spend(quality)
        if resized and self._history:
            self._prime()

    def set_prompt(self, prompt: str) -> None:
        """Edit by `prompt` from the next chunk on."""
        self._refresh()  # by the prompt it was edited by
        self._text = self.editor.encode_prompt(prompt)
        if self._mask:
            self._mask.new_prompt()
            self._next_tokens = _on_host(self._mask.carried())
        self.prompt = prompt

    @property
    def work(self) -> Size:
        """Height and width at which the networks see the frames."""
        return self._picture.work

    @property
    def pending_frames(self) -> int:
        """Frames that wait for their chunk to be complete."""
        return len(self._pending)

    @property
    def wanted_frames(self) -> int:
        """Frames that are missing for the next chunk to be complete."""
        return self._chunk_frames - len(self._pending)

    @property
    def _chunk_frames(self) -> int:
        settings = self.editor.settings
        return settings.chunk_frames if self.chunks else settings.first_chunk_frames

    def push(self, frames: np.ndarray | Tensor) -> Iterator[EditedChunk]:
        """Take frames, uint8 [n, height, width, 3]; each `next()` edits one complete chunk."""
        if isinstance(frames, np.ndarray):
            frames = torch.as_tensor(np.ascontiguousarray(frames))  # torch takes no mirrored view
        if frames.dtype != torch.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"frames of type {frames.dtype} and shape {tuple(frames.shape)} do not fit this "
                f"stream of uint8 [n, {self.height}, {self.width}, 3]"
            )
        if self._finished:
            raise ValueError("the stream was flushed and takes no more frames; open a new one")
        self._pending.add(frames)
        return self._complete_chunks()

    def flush(self) -> EditedChunk | None:
        """End the stream: the rest is padded to a chunk, edited, and cut to what came in."""
        rest = len(self._pending)
        if rest >= self._chunk_frames:
            raise ValueError("complete chunks are waiting; exhaust push() before flush()")
        self._finished = True
        if rest == 0:
            return None
        last = self._pending.between(rest - 1, rest)
        self._pending.add(last.expand(self.wanted_frames, -1, -1, -1))
        with torch.no_grad():
            self._encode()
            self._pending.drop(self._chunk_frames)
            return self._edit(keep=rest)

    def snapshot(self, *, compact: bool = False) -> StreamState:
        """This stream's state between two chunks; see `StreamState` for the two forms.

        The compact form leaves out the frames that wait for a chunk to be complete: after a
        restore, push again from frame `stream.frames` on.
        """
        if not compact:
            self._refresh()
        state = StreamState(
            prompt=self.prompt,
            height=self.height,
            width=self.width,
            work_height=self.work[0],
            work_width=self.work[1],
            sparing=self.quality.sparing,
            halved=self.quality.halved,
            detail=self._picture.detail,
            seed=self.seed,
            chunks=self.chunks,
            frames=self.frames,
            generator=self._generator.get_state(),
            pending=self._pending.between(0, 0 if compact else len(self._pending)).clone(),
            history=tuple(self._history),
            mask_tokens=None if self._next_tokens is None else self._next_tokens.clone(),
            model=self.editor.identity,
            latents=self.editor.latents,
        )
        if not compact:
            state.source = torch.cat(self._source, dim=1) if self._source else None
            state.kv = self._kv.state_dict()
            state.encoder, state.decoder = self._encoder, self._decoder
            state.reproducer = self._picture.reproducer
        return state

    @torch.no_grad()
    def load(self, state: StreamState) -> None:
        """Become the stream that `state` was taken of."""
        editor = self.editor
        self._spend(Quality(self.work, state.sparing, state.halved))
        self._generator.set_state(state.generator)
        self._pending.add(state.pending)
        self.chunks, self.frames = state.chunks, state.frames
        self._next_tokens = tokens = state.mask_tokens
        self._history = list(state.history)
        if self._mask:
            last = self._history[-1][1, -1].to(editor.device) if self._history else None
            on_device = None if tokens is None else tokens.to(editor.device)
            self._mask.carry_on(on_device, last, state.chunks)
        if state.kv is not None:
            if state.source is not None:
                self._source = [state.source.to(editor.device)]
                self._picture.keep(state.pending[: self._frames_of(state.source.shape[1])])
            self._kv.load_state_dict(state.kv)
            self._encoder = state.encoder and state.encoder.to(editor.device)
            self._decoder = state.decoder and state.decoder.to(editor.device)
            self._picture.reproducer = state.reproducer and state.reproducer.to(editor.device)
        elif state.chunks:
            self._prime()

    def _prime(self) -> None:
        """Make the caches again from the history: refresh forwards, and a little VAE run-in."""
        history = [chunk.to(self.editor.device, torch.float32)[:, None] for chunk in self._history]
        for edited, source in history:  # each [1, F, C, H, W]
            self._forward.refresh(edited, source, self._text)
        edited, source = torch.cat(history, dim=2)[:, :, -PRIMING_LATENTS:]
        _, self._decoder = self.editor.vae.decode(edited)
        pixels, reproducer = self.editor.vae.decode(source)
        self._picture.reproducer = reproducer if self._picture.reproduces else None
        _, self._encoder = self.editor.vae.encode(pixels)

    @torch.no_grad()
    def _complete_chunks(self) -> Iterator[EditedChunk]:
        self._encode()
        while len(self._pending) >= self._chunk_frames:
            size = self._chunk_frames
            self._pending.drop(size)
            yield self._edit(keep=size)
            self._encode()

    def _encode(self) -> None:
        """Encode what of the chunk's frames makes up latents and was not encoded before.

        So that little is left to do when the chunk's last frame comes.
        """
        done = sum(latents.shape[1] for latents in self._source)
        head = 0 if self.chunks else HEAD_FRAMES
        total = (min(len(self._pending), self._chunk_frames) + head) // TEMPORAL_STRIDE
        if total == done:
            return
        self._refresh()
        began = self._clock.mark()
        new = self._pending.between(self._frames_of(done), self._frames_of(total))
        latents, self._encoder = self.editor.vae.encode(self._picture.take(new), self._encoder)
        self._source.append(latents.float())
        self._work.append((began, self._clock.mark()))

    def _frames_of(self, latents: int) -> int:
        """How many frames of the current chunk its first `latents` latents hold."""
        return max(latents * TEMPORAL_STRIDE - (0 if self.chunks else HEAD_FRAMES), 0)

    def _edit(self, keep: int) -> EditedChunk:
        """The chunk whose frames are encoded. A GPU gets all its work without being waited for;
        what is waited for are the edited frames, while the refresh goes on; elsewhere it has time
        until there is more to encode. So `compute_ms` counts the refresh of the chunk before.
        """
        clock = self._clock
        began = clock.mark()
        source = torch.cat(self._source, dim=1)
        self._source = []
        steps = len(self._timesteps)
        edited = self._denoise(source)
        mask = to_host(self._mask.token_mask()) if self._mask else _all_tokens(source)
        recomputed = self._mask.recomputed(steps) if self._mask else 1.0
        pixels, self._decoder = self.editor.vae.decode(edited, self._decoder)
        out = to_host(self._picture.give(pixels, source, keep))
        self._remember(edited, source)
        if self._mask:
            self._mask.observe(edited, source)
            self._next_tokens = _on_host(self._mask.carried())
        done = clock.mark()
        work, self._work = [*self._work, (began, done)], []
        self._unrefreshed = edited, source
        if self.editor.device.type == "cuda":
            self._refresh()
        clock.wait(done)
        chunk = EditedChunk(
            index=self.chunks,
            first_frame=self.frames,
            frames=out.numpy(),
            recomputed=recomputed,
            steps=steps,
            compute_ms=sum(clock.between(*span) for span in work),
            mask=mask.numpy(),
        )
        self.chunks += 1
        self.frames += keep
        return chunk

    @torch.no_grad()
    def _refresh(self) -> None:
        """The newest chunk becomes history, if it is not yet."""
        if self._unrefreshed is None:
            return
        began = self._clock.mark()
        self._forward.refresh(*self._unrefreshed, self._text)
        self._unrefreshed = None
        self._work.append((began, self._clock.mark()))

    def _denoise(self, source: Tensor) -> Tensor:
        """Source latents [1, F, C, H, W] to edited ones, in the model's few steps."""
        editor = self.editor
        x, x0 = self._noise(source), source
        for step, t in enumerate(self._timesteps):
            reuse = self._mask.reuse(step) if self._mask else None
            if reuse is None or not reuse.idle:
                velocity = self._forward(x, source, t[None], self._text, reuse)
                estimate = editor.flow.to_x0(x, velocity, t[None])
                x0 = self._mask.settle(step, estimate, x0, source) if self._mask else estimate
            if step + 1 < len(self._timesteps):
                x = editor.flow.add_noise(x0, self._noise(x0), self._timesteps[step + 1][None])
        return x0

    def _remember(self, edited: Tensor, source: Tensor) -> None:
        """Keep the latents of the chunks that the KV cache keeps, for the compact state.

        And always this chunk's, which the VAE's caches are made of even where no window sees it.
        """
        self._history.append(to_host(torch.cat([edited, source]).half()))
        sinks = self._kv.sink_slots
        if len(self._history) > max(self._kv.slots - 1, sinks + 1):
            self._history.pop(sinks)

    def _noise(self, like: Tensor) -> Tensor:
        return to_device(torch.randn(like.shape, generator=self._generator), like.device)


def _on_host(tokens: Tensor | None) -> Tensor | None:
    return None if tokens is None else to_host(tokens)


def _all_tokens(source: Tensor) -> Tensor:
    """The mask that recomputes every token of latents [1, F, C, H, W]."""
    frames, _, height, width = source.shape[1:]
    return torch.ones(frames, height // PATCH, width // PATCH, dtype=torch.bool)
