"""A stream over a real socket: order, exactness, prompts, modes, resuming."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.editor import StreamingEditor
from serve.client import edit_frames
from tests.serve.conftest import Server, clip


def expected(frames: np.ndarray, prompt: str, seed: int = 0) -> np.ndarray:
    """What the editor makes of `frames` without a server."""
    editor = StreamingEditor.load("demo")
    stream = editor.open(prompt, height=frames.shape[1], width=frames.shape[2], seed=seed)
    chunks = [chunk.frames for chunk in stream.push(frames)]
    rest = stream.flush()
    return np.concatenate(chunks + ([rest.frames] if rest else []))


@pytest.mark.parametrize("count", [1, 9, 10, 21, 30])
def test_lossless_returns_the_editors_frames_exactly(demo: Server, count: int) -> None:
    frames = clip(count)
    edited = list(edit_frames(demo.url, frames, "make it red", fps=16, format="rgb24", seed=3))
    np.testing.assert_array_equal(np.stack(edited), expected(frames, "make it red", seed=3))
