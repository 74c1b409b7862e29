"""The mask cache that leaves alone what has stopped moving from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig
from modeling.streaming import follow
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.settled import PROBE
from modeling.streaming.state import StreamState
from tests.known_editors import assert_edited, block_clip, known_editor
from tests.modeling.streaming.test_follow import Where, at, cache, nowhere, scene

SETTLED = MaskCacheConfig(policy="settled", scope="block", pruned_steps=(1, 2, 3))
HERE, THERE = at(slice(2, 5), slice(1, 4)), at(slice(3, 6), slice(9, 12))


def cells(where: Where) -> Tensor:
    return where.repeat_interleave(2, 1).repeat_interleave(2, 2)[None, :, None]


def run(
    mask: MaskCache, moves: tuple[Where, Where, Where], source: Tensor | None = None
) -> list[Where]:
    """One chunk whose estimate moves at these tokens in steps 1, 2 and 3; the tokens that each of
    these steps computes."""
    source = scene() if source is None else source
    assert mask.reuse(0) is None  # whatever the chunk before computed last
    clean = mask.settle(0, source + 0.5, source, source)
    computed = []
    for step, where in enumerate(moves, start=1):
        reuse = mask.reuse(step)
        tokens = None if reuse is None else reuse.tokens
        kept = ~nowhere() if tokens is None else nowhere().flatten().index_fill(0, tokens, True)
        computed.append(kept.view_as(where))
        if reuse is None or not reuse.idle:  # as a stream does
            clean = mask.settle(step, clean + 0.5 * cells(where), clean, source)
    mask.observe(clean, source)
    return computed


STILL = (nowhere(), nowhere(), nowhere())


def test_what_stands_still_is_tried_once_and_then_left_alone() -> None:
    mask = cache(SETTLED)
    first, *later = [run(mask, STILL) for _ in range(PROBE)]
    assert first[0].all()
    assert not first[1].any()
    assert not first[2].any()
    assert not any(step.any() for chunk in later for step in chunk)
    assert run(mask, STILL)[0].all()  # what begins to move must be found


def test_what_moves_is_computed_with_what_lies_around_it_in_the_next_chunk_too() -> None:
    mask = cache(SETTLED)
    for chunk in range(3):
        tried = run(mask, (HERE, HERE, nowhere()))
        for step in tried if chunk else tried[1:]:
            assert step[follow.grow(HERE, 1)].all()
            assert not step[~follow.grow(HERE, 3)].any()


def test_a_step_computes_what_the_one_before_moved() -> None:
    mask = cache(SETTLED)
    tried = run(mask, (HERE | THERE, THERE, nowhere()))
    assert tried[1][HERE].all()
    assert tried[1][THERE].all()
    assert tried[2][THERE].all()
    assert not tried[2][HERE].any()


def test_trembling_is_no_movement() -> None:
    mask = cache(SETTLED)
    before = scene() + 0.5
    mask.settle(0, before, scene(), scene())
    noise = 0.1 * torch.randn(before.shape, generator=torch.manual_seed(4))
    mask.settle(1, before + noise, before, scene())
    assert mask.reuse(2) is not None
    assert mask.reuse(2).idle  # type: ignore[union-attr]


def test_an_estimate_that_is_not_computed_again_stands() -> None:
    mask = cache(SETTLED)
    run(mask, (HERE, nowhere(), nowhere()))
    source = scene()
    first = mask.settle(0, source + 0.5, source, source)
    assert torch.equal(first, source + 0.5)  # not the source, wherever it is edited
    second = mask.settle(1, source + 0.9, first, source)
    kept = cells(mask.token_mask()).expand_as(source)
    assert kept.any()
    assert torch.equal(second[kept], (source + 0.9)[kept])
    assert torch.equal(second[~kept], first[~kept])


@pytest.mark.parametrize("what", ["prompt", "cut", "cut within"])
def test_a_new_prompt_and_a_scene_cut_try_everything(what: str) -> None:
    mask, source = cache(SETTLED), None
    run(mask, STILL)
    assert not run(mask, STILL)[0].any()
    if what == "prompt":
        mask.new_prompt()
    elif what == "cut":
        source = scene(1)
    else:
        source = torch.cat([scene()[:, :1], scene(1)[:, 1:]], dim=1)
    assert run(mask, STILL, source)[0].all()


def test_what_moved_in_a_new_scene_is_known_in_the_chunk_after_it() -> None:
    mask = cache(SETTLED)
    run(mask, STILL, torch.cat([scene()[:, :1], scene(1)[:, 1:]], dim=1))
    assert not run(mask, STILL, scene(1))[0].any()


def test_share_and_mask_count_all_steps() -> None:
    mask = cache(SETTLED)
    run(mask, (HERE, nowhere(), nowhere()))
    around = int(follow.grow(HERE, 2).sum())
    assert mask.recomputed(4) <= (3 + around / HERE.numel()) / 5
    assert mask.recomputed(4) > 3 / 5
    assert mask.token_mask().all()
    run(mask, STILL)
    assert mask.token_mask()[HERE].all()
    assert not mask.token_mask()[THERE].any()
    run(mask, STILL)
    assert mask.recomputed(4) == pytest.approx(2 / 5)
    assert not mask.token_mask().any()


def test_a_step_that_is_not_pruned_is_computed_whole() -> None:
    mask = cache(MaskCacheConfig(policy="settled", scope="block", pruned_steps=(1, 3)))
    for _ in range(2):
        tried = run(mask, (nowhere(), HERE, nowhere()))
    assert not tried[0].any()
    assert tried[1].all()
    assert tried[2][HERE].all()
    assert not tried[2][THERE].any()


@pytest.mark.parametrize(("chunks", "cut"), [(2, False), (2, True), (PROBE, False)])
def test_what_is_carried_goes_on_elsewhere(chunks: int, cut: bool) -> None:
    first, second = cache(SETTLED), cache(SETTLED)
    for _ in range(chunks):
        run(first, (HERE, nowhere(), nowhere()))
    second.carry_on(first.carried(), scene()[0, -1], chunks)
    source = scene(1) if cut else scene()
    expected, found = (run(mask, STILL, source) for mask in (first, second))
    assert all(torch.equal(*steps) for steps in zip(expected, found, strict=True))
    assert found[0].all() == (chunks == PROBE or cut)


def test_a_settled_stream_runs_its_first_steps_alone() -> None:
    stream = known_editor(mask_cache=SETTLED).open("paint it red", height=64, width=96, seed=0)
    forward, calls = stream._forward, []

    class Counting:
        refresh = staticmethod(forward.refresh)

        def __call__(self, *arguments: Any) -> Tensor:
            calls.append(arguments)
            return forward(*arguments)

    stream._forward = Counting()
    source = block_clip(45, 64, 96)
    chunks = list(stream.push(source))
    assert_edited(np.concatenate([c.frames for c in chunks]), source, "paint it red", within=1)
    assert len(calls) == len(chunks) + 1  # the first chunk tried its second step
    assert [chunk.recomputed for chunk in chunks] == pytest.approx([3 / 5, 2 / 5, 2 / 5, 2 / 5])


def test_a_restored_stream_goes_on_exactly() -> None:
    editor, source = known_editor(mask_cache=SETTLED), block_clip(57, 64, 96)
    whole = editor.open("paint it red", height=64, width=96, seed=3)
    expected = list(whole.push(source))
    first = editor.open("paint it red", height=64, width=96, seed=3)
    made = list(first.push(source[:21]))
    second = editor.restore(StreamState.from_bytes(first.snapshot().to_bytes()))
    made += list(second.push(source[21:]))
    for one, other in zip(expected, made, strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert one.recomputed == other.recomputed


def test_only_whole_tokens_settle() -> None:
    with pytest.raises(ValueError, match="policy settled, whose tokens skip the whole transformer"):
        MaskCacheConfig(policy="settled", scope="attention")
