"""The mask cache that leaves alone what has stopped moving from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig
from modeling.streaming import settled
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.settled import PROBE, Settled
from modeling.streaming.state import StreamState
from tests.known_editors import assert_edited, block_clip, known_editor
from tests.modeling.streaming.test_follow import C, at, cache, nowhere, scene

SETTLED = MaskCacheConfig(policy="settled", scope="block", pruned_steps=(1, 2, 3))
STILL = (False, False, False)
Moves = tuple[bool, bool, bool]


def run(mask: MaskCache, moves: Moves, source: Tensor | None = None) -> list[bool]:
    """One chunk whose estimate moves a twentieth of the tokens, or none, in steps 1, 2 and 3; which
    of these steps are computed."""
    source = scene() if source is None else source
    clean = mask.settle(0, source + 0.5, source, source)
    computed = []
    for step, moved in enumerate(moves, start=1):
        reuse = mask.reuse(step)
        assert reuse is None or reuse.idle  # all or nothing
        computed.append(reuse is None)
        if reuse is None:  # as a stream does
            here = at(slice(2, 6), slice(5, 9)) if moved else nowhere()
            cells = here.repeat_interleave(2, 1).repeat_interleave(2, 2)[None, :, None]
            clean = mask.settle(step, clean + 0.5 * cells, clean, source)
    mask.observe(clean, source)
    return computed


def test_what_stands_still_is_tried_in_every_eighth_chunk() -> None:
    """So that what begins to move is found."""
    mask = cache(SETTLED)
    chunks = [run(mask, STILL) for _ in range(18)]
    assert chunks == [[n % 8 == 0, False, False] for n in range(18)]


def test_a_step_is_computed_after_one_that_moved_something() -> None:
    mask = cache(SETTLED)
    for _ in range(3):
        assert run(mask, (True, True, True)) == [True, True, True]
    assert run(mask, (True, False, True)) == [True, True, False]
    assert run(mask, (False, True, True)) == [True, False, False]
    assert run(mask, (True, True, True)) == [False, False, False]  # until the next probe
    run(mask, (True, True, True))
    run(mask, (True, True, True))
    assert run(mask, (True, True, False)) == [True, True, True]


def test_trembling_and_a_few_tokens_are_no_movement() -> None:
    noise = 0.1 * torch.randn(scene().shape, generator=torch.manual_seed(4))
    few = at(slice(0, 1), slice(0, 1)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for moved in (noise, 0.5 * few[None, :, None]):
        mask = cache(SETTLED)
        before = mask.settle(0, scene() + 0.5, scene(), scene())
        mask.settle(1, before + moved, before, scene())
        reuse = mask.reuse(2)
        assert reuse is not None
        assert reuse.idle


@pytest.mark.parametrize(("tokens", "moves"), [(2, False), (3, True)])
def test_a_chunk_has_settled_while_two_tokens_in_a_hundred_move(
    tokens: int, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = torch.full((100,), 0.5)  # as much as the threshold is no movement
    found[:tokens] = 0.51
    monkeypatch.setattr(settled, "evidence", lambda estimate, before: found)
    known = settled.Settled(0.5)
    assert known.moved(2, found, found) is moves
    assert known.moves is None  # the second step alone says something of the next chunk
    assert known.moved(1, found, found) is known.moves is moves


def test_an_estimate_that_is_not_computed_again_stands() -> None:
    """In a rollout, whose ranks compute all steps alike: neither the new one nor the source."""
    mask, source = cache(SETTLED), scene()
    run(mask, STILL)
    first = mask.settle(0, source + 0.5, source, source)
    assert torch.equal(first, source + 0.5)
    assert torch.equal(mask.settle(1, source + 0.9, first, source), first)
    assert mask.recomputed(4) == pytest.approx(2 / 5)


@pytest.mark.parametrize("what", ["prompt", "cut", "cut within"])
def test_after_a_new_prompt_and_a_scene_cut_the_second_step_is_tried(what: str) -> None:
    mask, source = cache(SETTLED), None
    run(mask, STILL)
    assert not run(mask, STILL)[0]
    if what == "prompt":
        mask.new_prompt()
    elif what == "cut":
        source = scene(1)
    else:
        source = torch.cat([scene()[:, :1], scene(1)[:, 1:]], dim=1)
    assert run(mask, STILL, source)[0]


@pytest.mark.parametrize("first", [1, 2])  # latent of the new scene: the last one counts
def test_what_moved_in_a_new_scene_is_known_in_the_chunk_after_it(first: int) -> None:
    mask = cache(SETTLED)
    run(mask, STILL, torch.cat([scene()[:, :first], scene(1)[:, first:]], dim=1))
    assert not run(mask, STILL, scene(1))[0]


def test_a_camera_that_moves_fast_is_no_cut() -> None:
    """Each latent is then as unlike the one before as another scene; one of another scene still
    stands out while it moves slowly."""
    mask = cache(SETTLED)
    panning = torch.cat([scene(n)[:, :1] for n in range(3)], dim=1)
    run(mask, STILL, panning)
    assert not run(mask, STILL, panning)[0]
    slow = [scene(2) + 0.4 * scene(n) for n in (3, 4, 5)]
    run(mask, STILL, torch.cat([latent[:, :1] for latent in slow], dim=1))
    moving = [scene(6) + 0.4 * scene(n) for n in (3, 4, 5)]
    assert run(mask, STILL, torch.cat([latent[:, :1] for latent in moving], dim=1))[0]


def test_share_and_mask_say_what_was_computed() -> None:
    mask = cache(SETTLED)
    run(mask, (True, True, True))
    assert mask.recomputed(4) == 1
    run(mask, STILL)
    assert mask.recomputed(4) == pytest.approx(3 / 5)
    assert mask.token_mask().all()
    run(mask, STILL)
    assert mask.recomputed(4) == pytest.approx(2 / 5)
    assert not mask.token_mask().any()


def test_a_step_that_is_not_pruned_is_computed() -> None:
    mask = cache(MaskCacheConfig(policy="settled", scope="block", pruned_steps=(1, 3)))
    run(mask, STILL)
    assert run(mask, (False, True, False)) == [False, True, True]
    assert mask.recomputed(4) == pytest.approx(4 / 5)
    assert run(mask, STILL) == [False, True, False]


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize(("chunks", "cut"), [(2, False), (2, True), (PROBE, False)])
def test_what_is_carried_goes_on_elsewhere(chunks: int, cut: bool, moves: bool) -> None:
    first, second = cache(SETTLED), cache(SETTLED)
    for _ in range(chunks):
        run(first, (moves, False, False))
    second.carry_on(first.carried(), scene()[0, -1], chunks)
    source = scene(1) if cut else scene()
    expected, found = (run(mask, STILL, source) for mask in (first, second))
    assert expected == found
    assert found[0] == (moves or chunks == PROBE or cut)


@pytest.mark.parametrize(("above", "moves"), [(2, False), (3, True)])
def test_a_chunk_moves_if_more_than_two_in_a_hundred_tokens_do(
    above: int, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by more than the threshold: some reach it. Only step 1 says so of the next chunk's."""
    found = torch.full((1, 10, 10), 0.25)
    found.view(-1)[:above] = 0.26
    monkeypatch.setattr(settled, "evidence", lambda estimate, before: found)
    for step, known in ((1, moves), (2, None)):
        mine = Settled(0.25)
        assert mine.moved(step, found, found) is moves
        assert mine.moves is known


@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        ([0.1, 0.1, 0.9], False), ([0.1, 0.1, 1.1], True),  # two scenes differ by more than 1
        ([0.8, 0.8, 1.5], False), ([0.8, 0.8, 1.7], True),  # and by twice what is usual there
        ([1.7, 0.8, 0.8], True), ([5.0, 5.0, 0.1], False),
    ],
)  # fmt: skip
def test_a_cut_stands_out_from_how_much_changes_anyway(changes: list[float], cut: bool) -> None:
    levels = torch.tensor([0.0, *changes]).sqrt().cumsum(0)
    latents = levels[:, None, None, None].expand(-1, C, 4, 4)
    assert settled._has_cut(latents) is cut


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
