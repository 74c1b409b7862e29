"""What a viewer sees of an editor's death: the stream after a restore from the compact state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modeling.editor import StreamingEditor
from modeling.streaming.state import StreamState
from modeling.streaming.stream import EditStream
from tests.serve.conftest import clip

CHUNK = 12
FRAMES = clip(9 + 12 * CHUNK)


@pytest.fixture(scope="module")
def editor(small_model: Path) -> StreamingEditor:
    return StreamingEditor.load(small_model)


@pytest.fixture(scope="module")
def unbroken(editor: StreamingEditor) -> np.ndarray:
    edited = np.concatenate([chunk.frames for chunk in opened(editor).push(FRAMES)])
    assert edited.std() > 20, "a blank picture shows no difference"
    return edited


@pytest.mark.parametrize("cut", [33, 57, 81])  # frames: before and after the window is full
def test_a_restored_stream_stays_close_to_the_unbroken_one(
    editor: StreamingEditor, unbroken: np.ndarray, cut: int
) -> None:
    dying = opened(editor)
    assert len(list(dying.push(FRAMES[:cut]))) > 1
    state = StreamState.from_bytes(dying.snapshot(compact=True).to_bytes())
    restored = np.concatenate([chunk.frames for chunk in editor.restore(state).push(FRAMES[cut:])])
    assert len(restored) == len(FRAMES) - cut
    for start in range(0, len(restored), CHUNK):
        here, there = (v[start : start + CHUNK].astype(float) for v in (restored, unbroken[cut:]))
        error = np.mean((here - there) ** 2)
        assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 56, f"{start} frames after the cut"


def opened(editor: StreamingEditor) -> EditStream:
    return editor.open("make it red", height=32, width=48, seed=1)
