"""The editors by which other tests judge pictures do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling.config import MaskCacheConfig
from modeling.editor import StreamingEditor
from tests.known_editors import (
    PAINTS,
    UNCHANGED,
    assert_edited,
    block_clip,
    expected_edit,
    known_editor,
    write_known_model,
)


def edit(editor: StreamingEditor, source: np.ndarray, prompt: str, **kwargs: Any) -> np.ndarray:
    stream = editor.open(prompt, height=source.shape[1], width=source.shape[2], **kwargs)
    chunks = [*stream.push(source)]
    last = stream.flush()
    return np.concatenate([chunk.frames for chunk in [*chunks, *([last] if last else [])]])


@pytest.fixture(scope="module")
def editor() -> StreamingEditor:
    return known_editor()


def test_expected_by_hand() -> None:
    """Two tokens, dark and light, and one frame after a stream's first."""
    source = np.zeros((2, 16, 32, 3), np.uint8)
    source[:, :, :16], source[:, :, 16:] = 100, 150
    source[1, 0, 0] = 164  # one pixel of 64: a level brighter
    source[:, :, :, 2] += 20
    edited = expected_edit(source, "Red, now!")
    assert edited[0, 0, 0].tolist() == [100, 100, 120]
    assert edited[1, 7, 7].tolist() == [101, 101, 121]
    assert edited[1, 8, 7].tolist() == [100, 100, 120]
    assert (edited[:, :, 16:] == [210, 150, 170]).all()
    assert (expected_edit(source, "reddish")[:, :, 16:] == [150, 150, 170]).all()
    assert (expected_edit(source, "red and blue")[:, :, 16:] == [210, 150, 230]).all()


def test_a_clip_shows_what_went_wrong() -> None:
    """Light and dark everywhere, and nothing equal that might be exchanged."""
    clip = block_clip(30, 50, 70)
    assert clip.shape == (30, 50, 70, 3)
    light = clip.mean(axis=-1) > 127.5
    assert 0.4 < light.mean() < 0.6
    for other in (
        clip[..., ::-1],
        clip[:, ::-1],
        clip[:, :, ::-1],
        np.roll(clip, 1, axis=0),
        np.roll(clip, 1, axis=2),
        block_clip(30, 50, 70, seed=1),
    ):
        assert np.abs(clip.astype(int) - other).mean(axis=(1, 2, 3)).min() > 2
    assert (np.abs(np.diff(clip.astype(int), axis=0)).mean(axis=(1, 2, 3)) > 10).all()


@pytest.mark.parametrize("prompt", [UNCHANGED, *PAINTS, "Make it red, and blue too.", ""])
def test_the_answer(editor: StreamingEditor, prompt: str) -> None:
    source = block_clip(31, 64, 96)
    for seed in (0, 1):
        assert_edited(edit(editor, source, prompt, seed=seed), source, prompt)
    painted = any(word in prompt.lower() for word in PAINTS)
    assert (expected_edit(source, prompt) != source).any() == painted


@pytest.mark.parametrize("size", [(16, 16), (17, 47), (63, 33)])
def test_odd_sizes(editor: StreamingEditor, size: tuple[int, int]) -> None:
    source = np.random.default_rng(0).integers(0, 256, (11, *size, 3), dtype=np.uint8)
    source[:, : size[0] // 2] //= 3  # clearly dark above, clearly light below
    source[:, size[0] // 2 :] = 255 - source[:, size[0] // 2 :] // 3
    source = source[:, ::-1].copy()
    assert_edited(edit(editor, source, UNCHANGED), source, UNCHANGED)


@pytest.mark.parametrize(
    "stream",
    [
        {"mask_cache": None},
        {"mask_cache": MaskCacheConfig(scope="block", pruned_steps=(1, 2, 3))},
        {"mask_cache": MaskCacheConfig(policy="published")},
        {"timesteps": (1000,), "mask_cache": None},
        {"timesteps": (990, 600, 10), "shift": 3.0, "chunk_latents": 1, "sink_latents": 0},
    ],
)
def test_settings_make_no_difference(stream: dict[str, Any]) -> None:
    source = block_clip(70, 32, 48)
    assert_edited(edit(known_editor(**stream), source, "green"), source, "green")


def test_a_model_directory_of_it(tmp_path: Path) -> None:
    path = write_known_model(tmp_path / "known", name="paint", height=32, width=48)
    editor = StreamingEditor.load(path)
    assert editor.name == "paint"
    assert (editor.settings.height, editor.settings.width) == (32, 48)
    source = block_clip(21, 32, 48)
    assert_edited(edit(editor, source, "blue"), source, "blue")


def test_the_next_chunk_recomputes_what_was_painted(editor: StreamingEditor) -> None:
    """One light token a latent and, since edits move, those that border on it."""
    source = np.full((21, 64, 96, 3), 60, np.uint8)
    source[:, 48:, 80:] = 180
    stream = editor.open("green", height=64, width=96)
    _, second = stream.push(source)
    assert second.mask[:, 2:, 4:].all()
    assert second.mask.sum() == round(0.3 * 3 * 4 * 6)
