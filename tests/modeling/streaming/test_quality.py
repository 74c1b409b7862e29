"""A stream that is edited less well from a chunk on, and how it is then what it would have been."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling.config import MaskCacheConfig, StreamConfig
from modeling.editor import StreamingEditor
from modeling.streaming.quality import Quality, at_size, kept_steps, mask_cache_of
from modeling.streaming.state import StreamState
from modeling.streaming.stream import EditStream
from tests.known_editors import assert_edited, block_clip, known_editor
from tests.modeling.streaming.test_stream import random_model

STREAM = StreamConfig(height=32, width=48, mask_cache=MaskCacheConfig(keep_ratio=0.6))
SIZE, SMALL = (32, 48), (16, 32)
CLIP = np.random.default_rng(0).integers(0, 256, (69, *SIZE, 3), np.uint8)
SPARING, HALVED, BOTH = (
    Quality(SIZE, sparing=True), Quality(SIZE, halved=True), Quality(SIZE, True, True)
)  # fmt: skip


def editor(**stream: object) -> StreamingEditor:
    model = random_model(0, replace(STREAM, **stream))  # type: ignore[arg-type]
    return StreamingEditor(model, mask_cache=model.config.stream.mask_cache)


def opened(of: StreamingEditor, work: str = "full") -> EditStream:
    return of.open("edit", height=32, width=48, seed=3, work_size=work, detail="source")


def chunks(stream: EditStream, first: int, count: int) -> list[np.ndarray]:
    edited = []
    for _ in range(count):
        wanted = stream.wanted_frames
        edited += [chunk.frames for chunk in stream.push(CLIP[first : first + wanted])]
        first += wanted
    return edited


@pytest.mark.parametrize(
    ("steps", "pruned", "quality", "kept", "then"),
    [
        (4, (1, 2), Quality(SIZE), [0, 1, 2, 3], (1, 2)),
        (4, (1, 2), HALVED, [0, 2], ()),  # the last stays whole
        (4, (1, 2, 3), HALVED, [0, 2], (1,)),  # unless it never was
        (6, (1, 2, 3), HALVED, [0, 2, 4], (1,)),
        (5, (1, 2), HALVED, [0, 2, 4], (1,)),
        (3, (1,), HALVED, [0, 1, 2], (1,)),  # too few to do without any
        (1, (), HALVED, [0], ()),
    ],
)
def test_every_second_step_is_left_out(
    steps: int, pruned: tuple[int, ...], quality: Quality, kept: list[int], then: tuple[int, ...]
) -> None:
    usual = MaskCacheConfig(pruned_steps=pruned)
    settings = StreamConfig(32, 48, timesteps=tuple(range(1000, 1000 - steps, -1)))
    assert kept_steps(settings, quality) == kept
    found = mask_cache_of(usual, settings, quality)
    assert found is not None
    assert found.pruned_steps == then
    assert found.keep_ratio == 0.3


def test_a_sparing_mask_cache_keeps_half() -> None:
    usual = MaskCacheConfig(policy="follow", scope="block", keep_ratio=0.5, threshold=0.02)
    found = mask_cache_of(usual, STREAM, SPARING)
    assert found == replace(usual, keep_ratio=0.25, threshold=0.04)
    assert mask_cache_of(usual, STREAM, Quality(SIZE)) == usual
    assert mask_cache_of(None, STREAM, SPARING) is None


@pytest.mark.parametrize(
    ("quality", "model"),
    [
        (SPARING, {"mask_cache": MaskCacheConfig(keep_ratio=0.3)}),
        (HALVED, {"timesteps": (1000, 500), "mask_cache": MaskCacheConfig(pruned_steps=())}),
    ],
)
def test_changed_at_once_it_is_the_stream_of_such_a_model(
    quality: Quality, model: dict[str, object]
) -> None:
    changed, other = opened(editor()), opened(editor(**model))
    changed.change(quality)
    ours, theirs = chunks(changed, 0, 4), chunks(other, 0, 4)
    assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_changed_back_it_spends_what_it_did() -> None:
    stream = opened(editor())
    shares, first = [], 0
    for quality in (Quality(SIZE), BOTH, Quality(SIZE)):
        stream.change(quality)
        for _ in range(2):
            (chunk,) = stream.push(CLIP[first : (first := first + stream.wanted_frames)])
            shares.append((chunk.steps, round(chunk.recomputed, 3)))
    # A mask cache starts anew: the first chunk after a change computes every token. Later ones of
    # four steps and a refresh leave out 0.4 of two; two steps and a refresh are whole.
    assert shares == [(4, 1.0), (4, pytest.approx(0.844, abs=0.01)), (2, 1.0), (2, 1.0),
                      (4, 1.0), (4, pytest.approx(0.844, abs=0.01))]  # fmt: skip


def test_a_change_that_is_none_changes_nothing() -> None:
    """Its caches are its own, and not made again of the history."""
    of = editor(mask_cache=None)
    changed, other = opened(of), opened(of)
    chunks(other, 0, 1)
    chunks(changed, 0, 1)
    changed.change(SPARING)  # nothing to spare without a mask cache
    assert np.array_equal(chunks(changed, 9, 1), chunks(other, 9, 1))


def test_another_size_before_the_first_chunk_is_as_opened_at_it() -> None:
    of = editor()
    changed, other = opened(of), opened(of, "32x16")
    changed.change(Quality(SMALL))
    assert changed.work == other.work == SMALL
    ours, theirs = chunks(changed, 0, 3), chunks(other, 0, 3)
    assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_another_size_goes_on_from_what_was_seen() -> None:
    """As a stream that is restored from the history at the new size, and not as a new one."""
    of = editor()
    stream = opened(of)
    chunks(stream, 0, 3)
    before = stream.snapshot(compact=True).history
    stream.change(Quality(SMALL))
    state = stream.snapshot(compact=True)
    assert (state.work_height, state.work_width) == SMALL
    assert {part.shape for part in state.history} == {(*before[0].shape[:3], 2, 4)}
    for resized, part in zip(state.history, before, strict=True):
        assert torch.equal(resized, at_size(part, 2, 4))
    restored = of.restore(StreamState.from_bytes(state.to_bytes()))
    ours, theirs = chunks(stream, 33, 2), chunks(restored, 33, 2)
    assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert ours[0].shape == (12, 32, 48, 3)


def test_latents_at_another_size_show_the_same() -> None:
    ramp = torch.linspace(-1, 1, 6).expand(2, 3, 16, 4, 6).half()
    assert torch.equal(at_size(ramp, 4, 6), ramp)
    small = at_size(ramp, 2, 3)
    assert small.shape == (2, 3, 16, 2, 3)
    assert small[0, 0, 0, 0].tolist() == pytest.approx([-0.8, 0.0, 0.8], abs=0.1)
    alone = torch.zeros(2, 1, 16, 2, 6).half()
    alone[..., 1] = 1  # which all that lie within two cells of it see a part of
    assert at_size(alone, 2, 3)[0, 0, 0, 0].tolist() == pytest.approx([3 / 7, 1 / 8, 0], abs=1e-3)


@pytest.mark.parametrize("quality", [Quality(SIZE), SPARING, HALVED, BOTH])
def test_a_moved_stream_spends_what_it_did(quality: Quality) -> None:
    of = editor()
    stream = opened(of)
    stream.change(quality)
    for compact in (True, False):
        state = StreamState.from_bytes(stream.snapshot(compact=compact).to_bytes())
        assert of.restore(state).quality == quality


@pytest.mark.parametrize("quality", [BOTH, Quality(SMALL, True, True)])
def test_a_changed_stream_moves_to_the_bit(quality: Quality) -> None:
    of = editor()
    stream = opened(of)
    chunks(stream, 0, 2)
    stream.change(quality)
    chunks(stream, 21, 1)
    moved = of.restore(StreamState.from_bytes(stream.snapshot().to_bytes()))
    assert moved.quality == stream.quality == quality
    ours, theirs = chunks(stream, 33, 2), chunks(moved, 33, 2)
    assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_only_between_two_chunks() -> None:
    stream = opened(editor())
    list(stream.push(CLIP[:4]))
    with pytest.raises(ValueError, match=r"4 frames of the next chunk.*between two chunks"):
        stream.change(HALVED)


def test_what_is_edited_stays_right_through_all_changes() -> None:
    source, of = block_clip(57, 64, 96), known_editor()
    stream = of.open("paint it red", height=64, width=96, seed=1)
    edited, first = [], 0
    for quality in (Quality((64, 96)), Quality((64, 96), True), Quality((64, 96), True, True)):
        stream.change(quality)
        count = stream.wanted_frames
        edited += [chunk.frames for chunk in stream.push(source[first : first + count])]
        first += count
    assert_edited(np.concatenate(edited), source[:first], "paint it red")
