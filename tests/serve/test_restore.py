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


@pytest.mark.parametrize("cut", [33, 57, 81])  # frames: before and after the window is full
def test_a_restored_stream_stays_close_to_the_unbroken_one(small_model: Path, cut: int) -> None:
    editor = StreamingEditor.load(small_model)
    frames = clip(9 + 12 * CHUNK)
    unbroken = np.concatenate([chunk.frames for chunk in opened(editor).push(frames)])
    assert unbroken.std() > 20, "a blank picture shows no difference"
    dying = opened(editor)
    assert len(list(dying.push(frames[:cut]))) > 1
    state = StreamState.from_bytes(dying.snapshot(compact=True).to_bytes())
    restored = np.concatenate([chunk.frames for chunk in editor.restore(state).push(frames[cut:])])
    assert len(restored) == len(frames) - cut
    for start in range(0, len(restored), CHUNK):
        here, there = (v[start : start + CHUNK].astype(float) for v in (restored, unbroken[cut:]))
        error = np.mean((here - there) ** 2)
        assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 56, f"{start} frames after the cut"


def opened(editor: StreamingEditor) -> EditStream:
    return editor.open("make it red", height=32, width=48, seed=1)
