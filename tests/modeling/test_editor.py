"""Streams of the demo preset with random weights: the contract that serving relies on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modeling.config import MaskCacheConfig, VaeConfig
from modeling.diffusion.transformer import Transformer
from modeling.editor import StreamingEditor
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import Model, load_model, save_model
from modeling.presets import PRESETS
from modeling.streaming.state import StateError, StreamState
from modeling.streaming.stream import EditedChunk, EditStream
from modeling.vae.build import build_vae
from tests.known_editors import (
    TOLERANCE,
    TURNED,
    assert_edited,
    block_clip,
    expected_edit,
    write_known_model,
)

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def editor() -> StreamingEditor:
    return make_editor(MaskCacheConfig(policy="budget"))


def make_editor(mask_cache: MaskCacheConfig | None, vae: str = "tiny") -> StreamingEditor:
    """The preset's stream, with networks of a quarter of its width and half its depth."""
    demo = PRESETS["demo"]
    sizes = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 2}
    tiny = replace(demo.vae, widths=(16, 12, 8, 8))
    config = replace(
        demo,
        transformer=replace(demo.transformer, **sizes),
        vae=VaeConfig(kind="wan", base_dim=4) if vae == "wan" else tiny,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer, autoencoder = Transformer(config.transformer), build_vae(config.vae)
        # A fresh transformer predicts zero everywhere.
        torch.nn.init.normal_(transformer.head.head.weight, std=0.05)
        torch.nn.init.normal_(transformer.patch_embedding.weight, std=0.05)
    for network in (transformer, autoencoder):
        network.eval().requires_grad_(False)
    return StreamingEditor(Model(config, transformer, autoencoder, {}, None), mask_cache=mask_cache)


def video(frames: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def edit(stream: EditStream, frames: np.ndarray, piece: int = 1000) -> list[EditedChunk]:
    chunks = []
    for start in range(0, len(frames), piece):
        chunks.extend(stream.push(frames[start : start + piece]))
    return chunks


def pixels(chunks: list[EditedChunk]) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks])


def open_stream(editor: StreamingEditor, prompt: str = "make it blue", seed: int = 0) -> EditStream:
    return editor.open(prompt, height=HEIGHT, width=WIDTH, seed=seed)


def test_chunks_come_as_soon_as_they_are_complete(editor: StreamingEditor) -> None:
    stream = open_stream(editor)
    sizes = []
    for frame in video(35):
        sizes += [len(chunk.frames) for chunk in stream.push(frame[None])]
    assert sizes == [9, 12, 12]
    assert stream.wanted_frames == 10
    last = stream.flush()
    assert last is not None
    assert (last.index, last.first_frame, last.frames.shape) == (3, 33, (2, HEIGHT, WIDTH, 3))
    assert last.frames.dtype == np.uint8
    with pytest.raises(ValueError, match="flushed"):
        stream.push(video(1))


@pytest.mark.parametrize("vae", ["tiny", "wan"])
def test_any_split_gives_the_same_frames(vae: str) -> None:
    editor = make_editor(MaskCacheConfig(policy="budget"), vae)
    frames = video(33)
    whole = pixels(edit(open_stream(editor), frames))
    for piece in (1, 5, 13):
        assert np.array_equal(whole, pixels(edit(open_stream(editor), frames, piece)))


def test_the_window_rolls_and_the_mask_cache_works(editor: StreamingEditor) -> None:
    chunks = edit(open_stream(editor), video(9 + 12 * 6))
    assert [chunk.recomputed for chunk in chunks[:1]] == [1.0]
    for chunk in chunks[1:]:
        kept = chunk.mask.mean()
        assert kept == pytest.approx(0.3, abs=0.03)
        assert chunk.recomputed == pytest.approx(1 - 2 / 5 * (1 - kept))
        assert chunk.mask.shape == (3, HEIGHT // 16, WIDTH // 16)


def test_prompt_and_seed_matter_and_repeat(editor: StreamingEditor) -> None:
    frames = video(9)
    base = pixels(edit(open_stream(editor), frames))
    assert np.array_equal(base, pixels(edit(open_stream(editor), frames)))
    assert not np.array_equal(base, pixels(edit(open_stream(editor, seed=1), frames)))
    assert not np.array_equal(base, pixels(edit(open_stream(editor, "a red star"), frames)))


def test_interleaved_streams_are_independent(editor: StreamingEditor) -> None:
    clips = video(45, seed=1), video(45, seed=2)
    alone = [pixels(edit(open_stream(editor, seed=i), clip)) for i, clip in enumerate(clips)]
    streams = [open_stream(editor, seed=i) for i in range(2)]
    together: list[list[EditedChunk]] = [[], []]
    for start in range(0, 45, 7):
        for i, stream in enumerate(streams):
            together[i] += edit(stream, clips[i][start : start + 7])
    for i in range(2):
        assert np.array_equal(alone[i], pixels(together[i]))


def test_a_prompt_switch_acts_from_the_next_chunk(editor: StreamingEditor) -> None:
    frames = video(33)
    unswitched = pixels(edit(open_stream(editor), frames))
    stream = open_stream(editor)
    first = edit(stream, frames[:21])
    stream.set_prompt("turn it into a red star")
    switched = pixels(first + edit(stream, frames[21:]))
    assert np.array_equal(switched[:21], unswitched[:21])
    assert not np.array_equal(switched[21:], unswitched[21:])


@pytest.mark.parametrize(
    ("scope", "vae", "cuts"),
    [
        ("attention", "tiny", (0, 5, 9, 16, 69)),
        ("block", "tiny", (0, 5, 9, 16, 69)),
        (None, "tiny", (0, 5, 9, 16, 69)),
        ("block", "wan", (5, 30)),
    ],
)
def test_exact_restore_is_bit_equal(scope: str | None, vae: str, cuts: tuple[int, ...]) -> None:
    settings = None if scope is None else MaskCacheConfig(scope=scope)  # type: ignore[arg-type]
    editor = make_editor(settings, vae)
    frames = video(93 if vae == "tiny" else 45)
    stream = open_stream(editor, seed=3)
    chunks: list[EditedChunk] = []
    taken, done = [], 0
    for cut in cuts:
        chunks += edit(stream, frames[done:cut], piece=3)  # latents of a chunk come one by one
        done = cut
        taken.append((cut, len(chunks), stream.snapshot().to_bytes()))
    unbroken = pixels(chunks + edit(stream, frames[done:]))
    assert len(unbroken) == len(frames)
    for cut, before, data in taken:
        after = edit(editor.restore(StreamState.from_bytes(data)), frames[cut:])
        assert np.array_equal(unbroken, pixels(chunks[:before] + after)), cut


@pytest.mark.parametrize("cut", [0, 5, 9, 30, 69])
def test_compact_restore_goes_on(editor: StreamingEditor, cut: int) -> None:
    """The caller hands in again what was not edited yet; numbering goes on."""
    frames = video(93)
    stream = open_stream(editor, seed=5)
    before = edit(stream, frames[:cut])
    data = stream.snapshot(compact=True).to_bytes()
    restored = editor.restore(StreamState.from_bytes(data))
    assert restored.snapshot(compact=True).to_bytes() == data
    after = edit(restored, frames[restored.frames :])
    assert [chunk.index for chunk in before + after] == list(range(8))
    assert len(pixels(before + after)) == 93


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    config = PRESETS["demo"]
    parts = {"transformer": Transformer(config.transformer), "vae": build_vae(config.vae)}
    one = save_model(tmp_path / "one", config, **parts, card={})  # type: ignore[arg-type]
    with torch.no_grad():
        next(parts["vae"].parameters()).flatten()[0] += 1e-3
    two = save_model(tmp_path / "two", config, **parts, card={})  # type: ignore[arg-type]
    first = StreamingEditor.load(one)
    assert first.identity == StreamingEditor.load(one).identity == model_fingerprint(one)
    for compact in (True, False):
        state = open_stream(first).snapshot(compact=compact)
        StreamingEditor.load(one).restore(StreamState.from_bytes(state.to_bytes()))
        with pytest.raises(StateError, match="edited by another model than two"):
            StreamingEditor.load(two).restore(StreamState.from_bytes(state.to_bytes()))


def test_a_stream_goes_on_with_another_model_of_the_same_latents(tmp_path: Path) -> None:
    """From its next chunk on the edit is the new model's, and nothing is lost or repeated."""
    source = block_clip(45, 64, 96)
    one = StreamingEditor.load(write_known_model(tmp_path / "one"))
    two = StreamingEditor.load(write_known_model(tmp_path / "two", paints=TURNED))
    assert one.identity != two.identity
    for compact in (True, False):
        stream = one.open("paint it red", height=64, width=96, seed=1)
        before = edit(stream, source[:25])  # two chunks, and four frames ahead
        data = stream.snapshot(compact=compact).to_bytes()
        after = two.restore(StreamState.from_bytes(data))
        given = after.frames + after.pending_frames
        assert given == (21 if compact else 25)
        chunks = edit(after, source[given:])
        assert [chunk.index for chunk in before + chunks] == [0, 1, 2, 3]
        assert_edited(pixels(before), source[:21], "paint it red")
        wanted = expected_edit(source, "paint it blue")[21:]
        assert np.abs(pixels(chunks).astype(int) - wanted).max() <= TOLERANCE


def test_another_models_mask_cache_begins_anew(tmp_path: Path) -> None:
    """What one policy carries from chunk to chunk means nothing to another."""
    source = block_clip(33, 64, 96)
    one = StreamingEditor.load(
        write_known_model(tmp_path / "one"), mask_cache=MaskCacheConfig(scope="block")
    )
    two = StreamingEditor.load(
        write_known_model(tmp_path / "two", paints=TURNED),
        mask_cache=MaskCacheConfig(policy="follow", scope="block"),
    )
    stream = one.open("paint it red", height=64, width=96, seed=1)
    edit(stream, source[:21])
    state = StreamState.from_bytes(stream.snapshot(compact=True).to_bytes())
    assert state.mask_tokens is not None
    chunks = edit(two.restore(state), source[21:])
    wanted = expected_edit(source, "paint it blue")[21:]
    assert np.abs(pixels(chunks).astype(int) - wanted).max() <= TOLERANCE


def test_networks_without_a_directory_have_their_own_identity() -> None:
    model = load_model("demo")
    one = StreamingEditor(model, mask_cache=None)
    assert StreamingEditor(model, mask_cache=None).identity == one.identity
    assert model.vae is not None
    with torch.no_grad():
        next(model.vae.parameters()).flatten()[1] += 1e-3
    assert StreamingEditor(model, mask_cache=None).identity != one.identity


def test_mirrored_frames_are_taken(editor: StreamingEditor) -> None:
    frames = video(9)
    mirrored = pixels(edit(open_stream(editor), frames[:, :, ::-1]))
    np.testing.assert_array_equal(
        mirrored, pixels(edit(open_stream(editor), frames[:, :, ::-1].copy()))
    )


def test_compact_state_is_small_at_full_size(editor: StreamingEditor) -> None:
    """A turned-over window at 832x480 stays under the 8 MB that a replica sends along."""
    height, width = 48, 80
    stream = editor.open("make it blue", height=height, width=width)
    edit(stream, video(9 + 12 * 4 + 11, height, width))
    latents = sum(part.nbytes for part in stream.snapshot(compact=True).history)
    assert latents == 2 * 9 * 16 * (height // 8) * (width // 8) * 2  # float16, nothing pending
    overhead = len(stream.snapshot(compact=True).to_bytes()) - latents
    assert latents * (480 * 832) / (height * width) + overhead < 8e6


def test_frames_are_encoded_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a chunk's last frame finds all but one latent encoded."""
    editor = make_editor(None)
    given: list[int] = []
    encode = editor.vae.encode

    def counted(frames: torch.Tensor, *state: Any) -> Any:
        given.append(frames.shape[1])
        return encode(frames, *state)

    monkeypatch.setattr(editor.vae, "encode", counted)
    stream = open_stream(editor)
    for frame in video(9 + 12):
        list(stream.push(frame[None]))
    assert given == [1, 4, 4, 4, 4, 4]


def test_what_a_chunk_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stretch of work once: the encodings as frames came, the edit, the refresh."""
    ticks = itertools.count()
    monkeypatch.setattr("modeling.streaming.device.time.perf_counter", lambda: float(next(ticks)))
    stream = open_stream(make_editor(None))
    frames = video(21)
    chunks = [*edit(stream, frames[:9]), *edit(stream, frames[9:], piece=4)]
    assert [chunk.compute_ms for chunk in chunks] == [2000.0, 5000.0]  # a second between two marks


def test_frames_do_not_wait_until_their_chunk_is_history() -> None:
    """Which is a forward of its own: a fifth of the shipped model's chunk on a CPU."""
    stream = open_stream(make_editor(None))
    frames, history = video(9 + 12 + 12), []
    list(stream.push(frames[:9]))
    for ask in (
        lambda: stream.snapshot(compact=True),  # needs no caches
        lambda: list(stream.push(frames[9:12])),  # too few to be encoded
        lambda: list(stream.push(frames[12:13])),
        lambda: list(stream.push(frames[13:21])),
        lambda: stream.set_prompt("make it red"),  # history is of the prompt before
        lambda: list(stream.push(frames[21:])),
        lambda: stream.snapshot(),
    ):
        ask()
        history.append(stream._kv.committed)
    assert history == [0, 0, 1, 1, 2, 2, 3]


class OnAGpu:
    """An editor that says so."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, editor: StreamingEditor) -> None:
        self._editor = editor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._editor, name)


def test_on_a_gpu_a_chunk_is_history_as_soon_as_it_is_shown() -> None:
    """It has the time, while the frames are looked at."""
    editor, frames = make_editor(None), video(21)
    streams = [open_stream(editor) for _ in range(2)]
    shown: list[list[EditedChunk]] = []
    history = []
    streams[1].editor = OnAGpu(editor)  # type: ignore[assignment]
    for stream in streams:
        shown.append([])
        for part in (frames[:9], frames[9:]):
            shown[-1] += edit(stream, part)
            history.append(stream._kv.committed)
    assert history == [0, 1, 1, 2]
    assert np.array_equal(*(pixels(chunks) for chunks in shown))
