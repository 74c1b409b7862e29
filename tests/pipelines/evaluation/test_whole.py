"""A clip that is sampled whole comes out as the model's known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.evaluation.evaluate import edit_clip
from pipelines.evaluation.whole import WholeEditor
from tests.known_editors import (
    TOLERANCE,
    assert_edited,
    block_clip,
    expected_edit,
    known_editor,
    known_model,
)


def whole(steps: int, scale: float = 1.0) -> WholeEditor:
    return WholeEditor(known_model(), mask_cache=None, steps=steps, scale=scale)


def edited(editor: WholeEditor, source: np.ndarray, seed: int = 0) -> np.ndarray:
    (chunk,), _ = edit_clip(editor, source, "paint it red", seed)
    assert chunk.steps == len(editor.timesteps)
    assert (chunk.index, chunk.first_frame, chunk.recomputed) == (0, 0, 1.0)
    assert chunk.mask.all()
    return chunk.frames


@pytest.mark.parametrize("steps", [1, 4])
def test_every_number_of_steps_ends_at_the_edit(steps: int) -> None:
    source = block_clip(16, 40, 48)  # neither whole latents nor whole tokens
    assert_edited(edited(whole(steps), source), source, "paint it red")


def test_guidance_goes_on_beyond_the_edit() -> None:
    """x0 = free + scale * (edit - free), and free is the source."""
    source = block_clip(13, 48, 64)
    plain, there = (expected_edit(source, prompt).astype(int) for prompt in ("as is", "paint red"))
    wanted = plain + 1.5 * (there - plain)
    whole_range = wanted < 250  # above that something was cut off
    assert (there - plain)[whole_range].max() == 60
    found = edited(whole(4, 1.5), source)
    assert np.abs(found - wanted)[whole_range].max() <= TOLERANCE + 1


def test_steps_add_up_in_float32_whatever_the_networks_compute_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of 50 steps may be less than the last bit of bfloat16, in which a GPU encodes."""
    editor, taken = whole(2), []
    encode, forward = editor.vae.encode, editor.transformer.forward

    def halved(*args: Any) -> Any:
        latents, state = encode(*args)
        return latents.bfloat16(), state

    def recorded(x: Tensor, *args: Any) -> Tensor:
        taken.append(x.dtype)
        return forward(x, *args)

    monkeypatch.setattr(editor.vae, "encode", halved)
    monkeypatch.setattr(editor.transformer, "forward", recorded)
    edited(editor, block_clip(9, 32, 48))
    assert taken == [torch.float32] * 2


def test_the_seed_decides_what_it_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, begun = whole(1), []
    forward = editor.transformer.forward

    def recorded(x: Tensor, *args: Any) -> Tensor:
        begun.append(x)
        return forward(x, *args)

    monkeypatch.setattr(editor.transformer, "forward", recorded)
    for seed in (0, 7, 0):
        edited(editor, block_clip(9, 32, 48), seed)
    assert torch.equal(begun[0], begun[2])
    assert not torch.isclose(begun[0], begun[1]).any()


def test_it_sees_at_the_working_size_and_keeps_the_sources_detail() -> None:
    source = block_clip(9, 64, 96).repeat(2, 1).repeat(2, 2)
    options = {"work_size": "1/2", "detail": "source"}
    chunks, _ = edit_clip(whole(2), source, "leave it", 0, **options)
    assert chunks[0].mask.shape == (3, 4, 6)
    streamed, _ = edit_clip(known_editor(mask_cache=None), source, "leave it", 0, **options)
    assert np.array_equal(chunks[0].frames, streamed[0].frames)
    assert np.array_equal(chunks[0].frames, source)  # of what is not edited, to the bit
