"""Self-forcing: the generator makes a clip chunk by chunk, as a stream will: over its own history,
with the stream's window and mask cache.

A chunk's gradient sees its history as constant, so where the generator learns all chunks' last
steps are computed again, together, with gradient: one forward over as many latents as the clip has
keeps a GPU busier than one a chunk, asks a seventh of the host, and uses each layer once.

B batch, F latents, C channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling.config import StreamConfig, TransformerConfig
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.sequence import Sequence
from modeling.diffusion.transformer import TextKV
from modeling.streaming.forward import ForwardOn
from modeling.streaming.history import History, Remembered, Unrolled
from modeling.streaming.kv_cache import KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.policies import POLICIES

ForwardCall = Callable[..., Tensor]  # Transformer.forward
# Numbers of a layer's result, tokens x dim, from which on a forward keeps a GPU at work: a tile of
# 128 x 128 for each of 128 multiprocessors. One of fewer takes the time of launching its kernels,
# however many clips are in it.
FILLS = 128**3


def exit_step(seed: int, step: int, steps: int) -> int:
    """Which of `steps` denoising steps a rollout ends at; the same on all ranks and after a resume.

    All ranks must run equally many forwards, or collectives hang.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return int(torch.randint(steps, (), generator=generator))


def rollout(
    trained: ForwardCall | None,
    passed: Any,
    config: TransformerConfig,
    stream: StreamConfig,
    schedule: FlowSchedule,
    *,
    source: Tensor,
    text: Tensor,
    last_step: int,
    generator: torch.Generator,
    gradient_chunks: int | None = None,
    sequence: Sequence | None = None,
    dtype: torch.dtype = torch.float32,
    forwards: ForwardOn | None = None,
    truth: Tensor | None = None,
) -> Tensor:
    """Clean latents [B, F, C, h, w] that the generator makes of `source` [B, F, C, h, w].

    Each chunk is denoised from pure noise along `stream.timesteps` and ends after step
    `last_step` (0 is the first) with that step's clean estimate. All steps, and the refresh at
    timestep 0 that writes the chunk into the history, go through `passed` without gradient. Then
    that last step of the last `gradient_chunks` chunks (None: of all) goes through `trained` (the
    engine; None for a rollout without gradient).

    With `stream.mask_cache` the pruned steps recompute what a stream's would, clip by clip, since
    each has tokens of its own. `sequence` are the ranks that share the clips; `dtype` is the
    network's, for the keys and values that are remembered. `forwards` runs what has no gradient,
    clip by clip, where a device has something faster than to call `passed`, unless one clip's chunk
    is too small for it (`FILLS`): all clips then go through `passed` together. Ranks that share a
    clip each run all of it with `forwards`, which costs less than to exchange around every layer.

    `truth` [B, F, C, h, w] becomes the history in place of what was made: no stream has that, and
    what training gains by its own history is measured against it.
    """
    tokens = stream.chunk_latents * source.shape[3] * source.shape[4] // 4  # of a clip's chunk
    if len(source) > 1 and stream.mask_cache is None and tokens * config.dim < FILLS:
        forwards = None
    if len(source) > 1 and (stream.mask_cache is not None or forwards is not None):
        alone = partial(
            rollout,
            *(trained, passed, config, stream, schedule),
            last_step=last_step,
            generator=generator,
            gradient_chunks=gradient_chunks,
            sequence=sequence,
            dtype=dtype,
            forwards=forwards,
        )
        truths = [None] * len(source) if truth is None else truth.split(1)
        clips = zip(source.split(1), text.split(1), truths, strict=True)
        return torch.cat([alone(source=clip, text=said, truth=own) for clip, said, own in clips])
    timesteps = schedule.warp(stream.timesteps)[: last_step + 1]
    batch, (height, width) = source.shape[0], source.shape[3:]
    place: dict[str, Any] = {
        "latent_height": height,
        "latent_width": width,
        "device": source.device,
    }
    heads = sequence.heads_of(config) if sequence else config
    history = History(heads, stream, batch=batch, dtype=dtype, **place)
    mask = stream.mask_cache and MaskCache(
        stream.mask_cache, config, chunk_latents=stream.chunk_latents, dtype=dtype, **place
    )
    passing: _Passing | _FastPassing
    if forwards is None:
        passing = _Passing(passed, history, text)
    else:
        with torch.no_grad():
            words = passed.prepare_text(text)
        cache = KVCache(
            config,
            batch=batch,
            chunk_latents=stream.chunk_latents,
            window_latents=stream.window_latents,
            sink_latents=stream.sink_latents,
            window_positions=stream.window_positions,
            dtype=dtype,
            **place,
        )
        passing = _FastPassing(forwards, cache, words, history if trained else None, sequence)
    pieces = source.split(stream.chunk_latents, dim=1)
    without = 0 if gradient_chunks is None else max(0, len(pieces) - gradient_chunks)
    truths = None if truth is None else truth.split(stream.chunk_latents, dim=1)
    made: list[Tensor] = []
    lasts: list[_LastStep] = []
    with torch.no_grad():
        for number, piece in enumerate(pieces):
            noisy, clean = _noise_like(piece, generator), piece
            for step, timestep in enumerate(timesteps):
                last = step == last_step
                reuse = mask.reuse(step) if mask else None
                if reuse is not None and last and reuse.tokens is None:
                    reuse = None  # kept for a step that does not come
                times, again = _each(timestep, piece), _never_idle(reuse)
                estimate = schedule.to_x0(noisy, passing(noisy, piece, times, again), times)
                clean = mask.settle(step, estimate, clean, piece) if mask else estimate
                if not last:
                    noise = _noise_like(piece, generator)
                    noisy = schedule.add_noise(clean, noise, _each(timesteps[step + 1], piece))
                elif trained is not None and number >= without:
                    lasts.append(_LastStep(noisy, clean == estimate, Remembered(history, again)))
                    if mask and reuse is not None:
                        mask.let_go()
            made.append(clean)
            if mask:
                mask.observe(clean, piece)
            if number + 1 < len(pieces):
                passing.refresh(truths[number] if truths else clean, piece)
    clip = torch.cat(made, dim=1)
    if trained is None:
        return clip
    learnt = [torch.cat(x, dim=1) for x in (made[without:], pieces[without:])]
    times = _each(timesteps[-1], source)
    learns = _again(trained, schedule, lasts, *learnt, times=times, text=text)
    return torch.cat([*made[:without], learns], dim=1)


class _LastStep(NamedTuple):
    """What a chunk's last step was computed of, and which latents took its estimate."""

    noisy: Tensor  # [B, F, C, h, w]
    taken: Tensor  # bool, likewise
    visible: Remembered


def _again(
    trained: ForwardCall,
    schedule: FlowSchedule,
    lasts: list[_LastStep],
    made: Tensor,
    source: Tensor,
    *,
    times: Tensor,
    text: Tensor,
) -> Tensor:
    """`made` [B, F, C, h, w] by these last steps of its chunks, with gradient."""
    noisy = torch.cat([last.noisy for last in lasts], dim=1)
    taken = torch.cat([last.taken for last in lasts], dim=1)
    visible = Unrolled([last.visible for last in lasts])
    estimate = schedule.to_x0(noisy, trained(noisy, source, times, text, visible), times)
    return torch.where(taken, estimate, made)


class _Passing:
    """The forwards without gradient of one rollout, over its history."""

    def __init__(self, network: ForwardCall, history: History, text: Tensor) -> None:
        self._network, self._history, self._text = network, history, text

    def __call__(self, noisy: Tensor, source: Tensor, times: Tensor, reuse: Reuse | None) -> Tensor:
        visible = Remembered(self._history, reuse)
        return self._network(noisy, source, times, self._text, visible)

    def refresh(self, clean: Tensor, source: Tensor) -> None:
        """The chunk becomes history."""
        kept = self._history.empty()
        zero = torch.zeros(len(clean), device=clean.device)
        self._network(clean, source, zero, self._text, Remembered(self._history, keeps=kept))
        self._history.commit(*kept)


class _FastPassing:
    """The same as a stream runs them, over its own cache. `history` gets a copy of what a chunk
    leaves there, since later ones overwrite it: of the heads that this rank of a `sequence` attends
    with; None where no chunk learns."""

    def __init__(
        self,
        forwards: ForwardOn,
        cache: KVCache,
        text: TextKV,
        history: History | None,
        sequence: Sequence | None,
    ) -> None:
        self._forward = forwards(cache)
        self._cache, self._text, self._history = cache, text, history
        self._sequence = sequence

    def __call__(self, noisy: Tensor, source: Tensor, times: Tensor, reuse: Reuse | None) -> Tensor:
        made = self._forward(noisy, source, times, self._text, reuse)
        return made if self._sequence is None else self._sequence.same(made)

    def refresh(self, clean: Tensor, source: Tensor) -> None:
        start = self._cache.start
        own = slice(start, start + self._cache.slot_tokens)
        self._forward.refresh(clean, source, self._text)
        if self._history is not None:
            kept = (self._cache.k[:, :, own], self._cache.v[:, :, own])
            if self._sequence is not None:
                kept = (self._sequence.own_heads(kept[0]), self._sequence.own_heads(kept[1]))
            self._history.commit(kept[0].clone(), kept[1].clone())


def _never_idle(reuse: Reuse | None) -> Reuse | None:
    """All ranks run equally many forwards: what a stream leaves out computes a token for nothing,
    which `MaskCache.settle` puts aside."""
    if reuse is None or not reuse.idle:
        return reuse
    nothing = torch.zeros(1, dtype=torch.long, device=reuse.outputs.device)
    return Reuse(reuse.scope, reuse.outputs, nothing, fixed_size=False)


def rollout_flops(
    count: Callable[..., float], frames: int, stream: StreamConfig, step: int | None
) -> list[float]:
    """Of denoising step `step` of each chunk of a rollout over `frames` latents, or of its refresh.

    `count` is `forward_flops` of the network. Pruned steps count the share of tokens that the mask
    cache may keep at most; a policy that is asked within the chunk may keep all.
    """
    chunk, mask = stream.chunk_latents, stream.mask_cache
    kept = 1.0
    counted = mask and mask.scope != "feedforward"  # whose share is counted whole
    if mask and counted and step in mask.pruned_steps and not POLICIES[mask.policy].asked_within:
        kept = mask.keep_ratio
    made: list[float] = []
    for end in range(chunk, frames + chunk, chunk):
        share = kept if made else 1.0  # the first has nothing to go by
        computed = chunk * (share if mask and mask.scope == "block" else 1.0)
        before = min(end, stream.window_latents) - chunk
        pairs = chunk * share * (before + chunk * share)
        made.append(count(frames=computed, pairs=pairs, attending=share * chunk / computed))
    return made


def _each(timestep: Tensor, latents: Tensor) -> Tensor:
    return timestep.expand(latents.shape[0])


def _noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(latents.shape, device=latents.device, generator=generator)
