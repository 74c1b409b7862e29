"""A stream that is told the right edits of what is past."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.streaming.forward import PlainForward
from pipelines.evaluation.evaluate import edit_clip
from pipelines.evaluation.true_history import TrueHistory
from tests.known_editors import assert_edited, block_clip, expected_edit, known_model


@pytest.mark.parametrize(
    ("frames", "work_size"), [(10, "full"), (21, "full"), (26, "full"), (14, "1/2")]
)
def test_the_past_is_the_truth_and_the_edit_its_own(frames: int, work_size: str) -> None:
    """Chunk by chunk, but for the last one, which nothing follows."""
    editor, past = TrueHistory(known_model(), mask_cache=None), []

    class Noting(PlainForward):
        def refresh(self, edited: Tensor, *rest: Any) -> None:
            past.append(edited)
            super().refresh(edited, *rest)

    editor.forward_on = lambda cache: Noting(editor.transformer, cache)
    scale = 1 if work_size == "full" else 2
    source = block_clip(frames, 32, 48).repeat(scale, 1).repeat(scale, 2)
    truth = expected_edit(source, "paint it blue")
    options = {"work_size": work_size, "detail": "off"}
    chunks, _ = edit_clip(editor, source, "paint it red", 0, truth=truth, **options)
    if work_size == "full":
        edit = np.concatenate([chunk.frames for chunk in chunks])
        assert_edited(edit, source, "paint it red")
    assert [chunk.shape[1] for chunk in past] == [3] * (len(chunks) - 1)
    with torch.no_grad():
        pixels, _ = editor.vae.decode(torch.cat(past, dim=1))
    shown = (127.5 * (pixels[0].permute(0, 2, 3, 1) + 1)).round().clamp(0, 255).numpy()
    off = np.abs(shown - truth[: len(shown), ::scale, ::scale])
    assert off.mean() <= 2  # shrunk with a filter that sees over a block's border
    assert scale > 1 or off.max() <= 2


@pytest.mark.parametrize("frames", [10, 20])
def test_a_last_chunk_that_was_filled_up_has_a_whole_truth(frames: int) -> None:
    """It becomes history at once on a GPU, elsewhere when the state is asked for."""
    editor, past = TrueHistory(known_model(), mask_cache=None), []

    class Noting(PlainForward):
        def refresh(self, edited: Tensor, *rest: Any) -> None:
            past.append(edited.shape[1])
            super().refresh(edited, *rest)

    editor.forward_on = lambda cache: Noting(editor.transformer, cache)
    source = block_clip(frames, 32, 48)
    stream = editor.open("paint it red", height=32, width=48, truth=source)
    list(stream.push(source))  # a generator
    assert stream.flush() is not None
    stream.snapshot()
    assert past == [3, 3]
