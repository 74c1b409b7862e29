"""`EditStream` equals the plain stream, whatever the model, the clip and the way it comes in."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from modeling.config import (
    MaskCacheConfig,
    ModelConfig,
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
)
from modeling.diffusion.transformer import Transformer
from modeling.editor import StreamingEditor
from modeling.model_dir import Model
from modeling.streaming.quality import Quality
from modeling.streaming.state import FORMAT_VERSION, StreamState
from modeling.streaming.stream import EditedChunk
from modeling.vae.build import build_vae
from tests.modeling.streaming.plain_stream import PlainStream


@dataclass(frozen=True)
class Case:
    """A stream and how it is fed."""

    stream: StreamConfig
    vae: Literal["tiny", "wan"] = "tiny"
    size: tuple[int, int] = (32, 48)
    chunks: int = 6
    short: int = 0  # frames that the last chunk lacks
    pieces: tuple[int, ...] = (1000,)  # of the pushes, in turn
    switches: tuple[int, ...] = ()  # chunks from which another prompt holds
    exact: tuple[int, ...] = ()  # frames after which the stream is moved with all its caches
    compact: int | None = None  # chunks after which it is moved with its latents alone
    seed: int = 0


def random_model(seed: int, stream: StreamConfig, kind: Literal["tiny", "wan"] = "tiny") -> Model:
    """Nothing in it is small: every token matters to every other, and pictures have contrast."""
    vae = VaeConfig(kind, base_dim=4, widths=(8, 8, 8, 8), mean=(0.0,) * 16, std=(1.0,) * 16)
    config = ModelConfig(
        transformer=TransformerConfig(
            dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=6
        ),
        vae=vae,
        text=TextConfig(kind="words", dim=8, tokens=6),
        stream=stream,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = Transformer(config.transformer)
        for parameter in transformer.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        autoencoder = build_vae(vae)
        for name, parameter in autoencoder.named_parameters():
            if not name.endswith("gamma"):
                parameter.normal_(
                    std=(2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
                )
        # Latents of about unit variance, and pixels that mostly stay inside [-1, 1].
        raw, _ = autoencoder.encode_raw(torch.rand(1, 13, 3, 32, 48) * 2 - 1)
        autoencoder.mean.copy_(raw.mean(dim=(0, 1, 3, 4)).view(-1, 1, 1))
        autoencoder.std.copy_(raw.std(dim=(0, 1, 3, 4)).view(-1, 1, 1))
        pixels, _ = autoencoder.decode_raw(raw)
        last = [m for m in autoencoder.decoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)][
            -1
        ]
        last.weight /= 2 * pixels.std()
        last.bias = nn.Parameter((last.bias - pixels.mean()) / (2 * pixels.std()))
    for module in (transformer, autoencoder):
        module.eval().requires_grad_(False)
    return Model(config, transformer, autoencoder, {}, None)


def mask_caches(steps: int) -> st.SearchStrategy[MaskCacheConfig | None]:
    if steps == 1:
        return st.none()
    return st.none() | st.builds(
        MaskCacheConfig,
        policy=st.sampled_from(["published", "budget"]),
        scope=st.sampled_from(["attention", "feedforward", "block"]),
        keep_ratio=st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]),
        pruned_steps=st.sets(st.integers(1, steps - 1)).map(sorted).map(tuple),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chunk = draw(st.sampled_from([3, 1, 2]))
    sinks = draw(st.integers(0, 2))
    timesteps = draw(st.sampled_from([(1000, 750, 500, 250), (1000, 500, 40), (900,)]))
    stream = StreamConfig(
        height=32,
        width=48,
        chunk_latents=chunk,
        sink_latents=chunk * sinks,
        window_latents=chunk * (sinks + draw(st.integers(1, 3))),
        window_positions=draw(st.booleans()),
        timesteps=timesteps,
        shift=draw(st.sampled_from([5.0, 1.0, 8.0])),
        mask_cache=draw(mask_caches(len(timesteps))),
    )
    chunks = draw(st.integers(1, 7))
    last = 4 * chunk - (3 if chunks == 1 else 0)
    frames = 4 * chunk * chunks - 3
    return Case(
        stream,
        vae=draw(st.sampled_from(["tiny", "tiny", "tiny", "wan"])),
        size=(draw(st.integers(16, 34)), draw(st.integers(16, 50))),
        chunks=chunks,
        short=draw(st.integers(0, last - 1)),
        pieces=tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))),
        switches=tuple(draw(st.lists(st.integers(1, chunks), max_size=2))),
        exact=tuple(draw(st.lists(st.integers(0, frames), max_size=2))),
        compact=draw(st.none() | st.integers(1, chunks - 1)) if chunks > 1 else None,
        seed=draw(st.integers(0, 100)),
    )


WAN = StreamConfig(height=32, width=48, mask_cache=MaskCacheConfig(policy="published"))
TURNS = replace(WAN, mask_cache=MaskCacheConfig(keep_ratio=0.5, pruned_steps=(1, 3)))
SMALL = replace(WAN, chunk_latents=2, window_latents=6, sink_latents=2, shift=8.0)
BLOCK = replace(WAN, mask_cache=MaskCacheConfig(scope="block", pruned_steps=(1, 2, 3)))


EXAMPLES = (  # what is always tried, whatever is drawn beside it
    Case(TURNS, size=(33, 47), short=5, pieces=(7,), switches=(2, 4), exact=(30,)),
    Case(SMALL, chunks=5, pieces=(3, 20), seed=5),
    Case(BLOCK, size=(31, 49), short=11, pieces=(1,), switches=(3,), exact=(9, 50), seed=1),
    Case(WAN, compact=5, chunks=7, pieces=(5, 40), switches=(2,), exact=(70,), seed=2),
    Case(replace(BLOCK, window_positions=False), chunks=7, compact=2, switches=(1,), seed=3),
    Case(WAN, vae="wan", chunks=4, compact=3, pieces=(6,), seed=4),
)


@example(EXAMPLES[0])
@example(EXAMPLES[5])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
@example(EXAMPLES[4])
@given(case=cases())
@settings(max_examples=10, deadline=None)
def test_it_equals_the_plain_stream(case: Case) -> None:
    mask_cache = case.stream.mask_cache
    model = random_model(case.seed, case.stream, case.vae)
    height, width = case.size
    frames = 4 * case.stream.chunk_latents * case.chunks - 3 - case.short
    clip = np.random.default_rng(case.seed).integers(0, 256, (frames, height, width, 3), np.uint8)
    prompts = [f"edit {sum(i >= at for at in case.switches)}" for i in range(case.chunks)]

    plain = PlainStream(model, mask_cache, case.seed)
    cut = case.compact or case.chunks
    border = 4 * case.stream.chunk_latents * cut - 3
    wanted = plain.edit(clip[:border], prompts[:cut])
    if case.compact is not None:
        plain.compact(prompts[cut - 1])
        wanted += plain.edit(clip[border:], prompts[cut:])

    found = list(stream_chunks(StreamingEditor(model, mask_cache=mask_cache), case, clip, prompts))
    assert [chunk.index for chunk in found] == list(range(case.chunks))
    assert sum(len(chunk.frames) for chunk in found) == frames
    shown = 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.first_frame == shown
        shown += len(ours.frames)
        assert ours.frames.dtype == np.uint8
        assert ours.frames.shape == theirs.frames.shape
        off = np.abs(ours.frames.astype(int) - theirs.frames)
        assert off.max() <= 1, (ours.index, off.mean())  # where float32 rounds the other way
        # A compact state's latents may be rounded to the other half-precision number, which moves
        # all that they reach by a part of a level.
        assert (off > 0).mean() < (0.01 if ours.index < cut else 0.1)
        assert np.array_equal(ours.mask, theirs.mask), ours.index
        assert ours.recomputed == pytest.approx(theirs.recomputed, abs=1e-9)
        assert ours.steps == len(case.stream.timesteps)


def test_a_state_says_of_whom_it_is_and_what_was_asked_for() -> None:
    editor = StreamingEditor(random_model(0, WAN), mask_cache=None)
    stream = editor.open("paint", height=64, width=96, seed=3, work_size="48x32", detail="source")
    stream.change(Quality((16, 32), sparing=True))
    list(stream.push(np.zeros((11, 64, 96, 3), np.uint8)))
    for compact in (True, False):
        state = StreamState.from_bytes(stream.snapshot(compact=compact).to_bytes())
        told = {name: getattr(state, name) for name in state.__dataclass_fields__}
        assert told | {
            "prompt": "paint", "height": 64, "width": 96, "work_height": 16, "work_width": 32,
            "detail": "source", "seed": 3, "chunks": 1, "frames": 9, "sparing": True,
            "halved": False, "model": editor.identity, "latents": editor.latents,
        } == told  # fmt: skip
        assert len(state.pending) == (0 if compact else 2)
        assert len(state.history) == 1
    assert len({editor.identity, editor.latents, ""}) == 3


def test_a_state_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> object:
            return (tmp_path / "mark").touch, ()

    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, "prompt": Bomb()}, buffer)
    with pytest.raises(ValueError, match=f"no stream state in {len(buffer.getvalue())} bytes"):
        StreamState.from_bytes(buffer.getvalue())
    assert not (tmp_path / "mark").exists()


def stream_chunks(
    editor: StreamingEditor, case: Case, clip: np.ndarray, prompts: list[str]
) -> Iterator[EditedChunk]:
    """`clip` through a stream as `case` says; a prompt is set as soon as its chunk is next."""
    stream = editor.open(prompts[0], height=case.size[0], width=case.size[1], seed=case.seed)
    pieces = itertools.cycle(case.pieces)
    moves, compact = sorted(case.exact), case.compact
    while stream.frames + stream.pending_frames < len(clip):
        at = stream.frames + stream.pending_frames
        if moves and at >= moves[0]:
            moves.pop(0)
            stream = editor.restore(StreamState.from_bytes(stream.snapshot().to_bytes()))
        for chunk in stream.push(clip[at : at + next(pieces)]):
            yield chunk
            compacted = stream.chunks == compact
            if compacted:
                compact = None
                data = stream.snapshot(compact=True).to_bytes()
                stream = editor.restore(StreamState.from_bytes(data))
                assert stream.pending_frames == 0
            if stream.chunks < len(prompts) and prompts[stream.chunks] != stream.prompt:
                stream.set_prompt(prompts[stream.chunks])
            if compacted:
                break  # the frames that waited are pushed again
    last = stream.flush()
    if last is not None:
        yield last
