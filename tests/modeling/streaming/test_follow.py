"""The published mask cache's defects, each by a check that it fails and `follow` passes.

Those that are no matter of its choice: `test_published_defects`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig
from modeling.streaming import follow
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.state import StreamState
from tests.known_editors import assert_edited, block_clip, known_editor
from tests.modeling.streaming.test_kv_cache import CONFIG

F, C, ROWS, COLUMNS = 3, 16, 8, 14
FOLLOW = MaskCacheConfig(policy="follow", scope="block", pruned_steps=(1, 2, 3))
PUBLISHED = MaskCacheConfig(policy="published")
NOISE = 0.05  # of an estimate

Where = Tensor  # bool [F, ROWS, COLUMNS], tokens


def cache(config: MaskCacheConfig) -> MaskCache:
    return MaskCache(
        config, CONFIG, chunk_latents=F, latent_height=2 * ROWS, latent_width=2 * COLUMNS
    )


def nowhere() -> Where:
    return torch.zeros(F, ROWS, COLUMNS, dtype=torch.bool)


def at(rows: slice, columns: slice) -> Where:
    where = nowhere()
    where[:, rows, columns] = True
    return where


def scene(seed: int = 0) -> Tensor:
    """One latent that stands still, [1, F, C, H, W]."""
    one = torch.randn(1, 1, C, 2 * ROWS, 2 * COLUMNS, generator=torch.manual_seed(seed))
    return one.expand(1, F, -1, -1, -1)


def edit(source: Tensor, where: Where, by: float = 0.5, noise: float = NOISE) -> Tensor:
    cells = where.repeat_interleave(2, 1).repeat_interleave(2, 2)[None, :, None]
    return source + by * cells + noise * torch.randn(source.shape, generator=torch.manual_seed(9))


def run(mask: MaskCache, edited: Tensor, source: Tensor) -> Where:
    """One chunk with `edited` for the estimate of all its steps; the tokens that it recomputed."""
    before = source
    for step in range(4):
        before = mask.settle(step, edited, before, source)
    kept = mask.token_mask()
    mask.observe(edited, source)
    return kept


def both(check: Callable[[MaskCache], None]) -> None:
    """`check` holds for ours and fails for the published policy, or it would show no defect."""
    check(cache(FOLLOW))
    with pytest.raises(AssertionError):
        check(cache(PUBLISHED))


def test_nothing_edited_computes_nothing() -> None:
    def check(mask: MaskCache) -> None:
        for _ in range(3):
            kept = run(mask, edit(scene(), nowhere()), scene())
        assert not kept.any()

    both(check)


def test_everything_edited_computes_everything() -> None:
    def check(mask: MaskCache) -> None:
        for _ in range(3):
            kept = run(mask, edit(scene(), ~nowhere()), scene())
        assert kept.all()

    both(check)


def test_the_mask_is_of_this_chunk_and_not_the_one_before() -> None:
    left, right = at(slice(2, 5), slice(1, 4)), at(slice(2, 5), slice(9, 12))

    def check(mask: MaskCache) -> None:
        for where in (left, left, right, left):
            kept = run(mask, edit(scene(), where), scene())
            assert kept[where].all()

    both(check)


def test_within_a_chunk_the_mask_moves_too() -> None:
    moving = nowhere()
    for n in range(F):
        moving[n, 3:5, 4 * n + 1 : 4 * n + 3] = True
    kept = run(cache(FOLLOW), edit(scene(), moving), scene())
    assert kept[moving].all()
    assert not (kept & ~follow.grow(moving, 3)).any()


def test_noise_is_not_an_edit() -> None:
    """A small edit among an estimate's noise: what is kept lies around the edit."""
    small = at(slice(3, 5), slice(6, 8))

    def check(mask: MaskCache) -> None:
        for _ in range(3):
            kept = run(mask, edit(scene(), small, noise=0.3), scene())
        assert kept[small].all()
        assert (kept & ~follow.grow(small, 3)).float().mean() < 0.01

    both(check)


def test_thin_edits_are_kept_whole() -> None:
    """A line one token wide, and all of it: the published lists lose most of such tokens."""
    line = at(slice(0, ROWS), slice(6, 7))
    line |= at(slice(4, 5), slice(0, COLUMNS))

    def check(mask: MaskCache) -> None:
        weaker = edit(edit(scene(), at(slice(0, 6), slice(0, 5)), by=0.6), line, by=1.0)
        for _ in range(2):
            kept = run(mask, weaker, scene())
        assert kept[line].all()

    both(check)


def level(times: float) -> float:
    """By how much an edit of a large region must move latents for that much of the threshold."""
    return float(np.sqrt(times * FOLLOW.threshold))


def test_what_was_edited_stays_so_while_it_is_likely() -> None:
    region = at(slice(1, 7), slice(3, 10))
    core = at(slice(2, 6), slice(4, 9))
    mask = cache(FOLLOW)
    weak = edit(scene(), region, by=level(0.75), noise=0)
    assert not run(mask, weak, scene()).any()
    assert run(mask, edit(scene(), region, by=level(1.5), noise=0), scene())[core].all()
    assert run(mask, weak, scene())[core].all()
    assert not run(mask, edit(scene(), region, by=level(0.3), noise=0), scene()).any()
    assert not run(mask, weak, scene()).any()


@pytest.mark.parametrize("what", ["prompt", "cut"])
def test_a_new_prompt_and_a_scene_cut_forget(what: str) -> None:
    region, core = at(slice(1, 7), slice(3, 10)), at(slice(2, 6), slice(4, 9))
    mask = cache(FOLLOW)
    strong, weak = (edit(scene(), region, by=level(by), noise=0) for by in (1.5, 0.75))
    assert run(mask, strong, scene())[core].all()
    source = scene()
    if what == "prompt":
        mask.new_prompt()
    else:
        weak, source = weak - scene() + scene(1), scene(1)
    assert not run(mask, weak, source).any()


def test_a_new_prompt_is_edited_where_it_asks() -> None:
    left, right = at(slice(2, 5), slice(1, 4)), at(slice(2, 5), slice(9, 12))

    def check(mask: MaskCache) -> None:
        run(mask, edit(scene(), left), scene())
        mask.new_prompt()
        assert run(mask, edit(scene(), right), scene())[right].all()

    both(check)


def test_a_cut_within_a_chunk_forgets_too() -> None:
    region, core = at(slice(1, 7), slice(3, 10)), at(slice(2, 6), slice(4, 9))
    source = scene().clone()
    source[:, 1:] = scene(1)[:, 1:]
    edited = source.clone()
    edited[:, :1] = edit(source, region, by=level(1.5), noise=0)[:, :1]
    edited[:, 1:] = edit(source, region, by=level(0.75), noise=0)[:, 1:]
    kept = run(cache(FOLLOW), edited, source)
    assert kept[0][core[0]].all()
    assert not kept[1:].any()


def test_what_comes_before_a_cut_within_a_chunk_goes_on_from_the_chunk_before() -> None:
    region, core = at(slice(1, 7), slice(3, 10)), at(slice(2, 6), slice(4, 9))
    mask = cache(FOLLOW)
    run(mask, edit(scene(), region, by=level(1.5), noise=0), scene())
    source = torch.cat([scene()[:, :2], scene(1)[:, 2:]], dim=1)
    kept = run(mask, edit(source, region, by=level(0.75), noise=0), source)
    assert kept[:2][core[:2]].all()
    assert not kept[2:].any()


def test_what_comes_after_a_cut_within_a_chunk_follows_it() -> None:
    """Another scene from the second latent on, surely edited there and likely in the third."""
    region, core = at(slice(1, 7), slice(3, 10)), at(slice(2, 6), slice(4, 9))
    source = torch.cat([scene()[:, :1], scene(1)[:, 1:]], dim=1)
    edited = edit(source, region, by=level(1.5), noise=0)
    edited[:, 2:] = edit(source, region, by=level(0.75), noise=0)[:, 2:]
    assert run(cache(FOLLOW), edited, source)[core].all()


def test_the_source_stands_in_for_what_is_not_edited() -> None:
    where, mask = at(slice(2, 5), slice(1, 4)), cache(FOLLOW)
    source, edited = scene(), edit(scene(), where)
    made = mask.settle(0, edited, torch.zeros_like(source), source)
    cells = mask.cell_mask().expand_as(source)
    assert torch.equal(made[cells], edited[cells])
    assert torch.equal(made[~cells], source[~cells])
    assert mask.reuse(0) is None
    assert mask.reuse(1) is not None


def test_share_counts_the_pruned_steps() -> None:
    mask = cache(FOLLOW)
    run(mask, edit(scene(), nowhere()), scene())
    assert mask.recomputed(4) == pytest.approx(2 / 5)
    run(mask, edit(scene(), ~nowhere()), scene())
    assert mask.recomputed(4) == 1
    assert mask.reuse(1) is None  # a forward like any other, which one graph serves


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scope": "attention"}, "set scope to block"),
        ({"scope": "block", "threshold": 0}, "threshold 0 must be above 0"),
        ({"scope": "block", "dilate": -1}, "dilate -1 0 or more"),
    ],
)
def test_settings_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCacheConfig(policy="follow", **wrong)


def test_an_edit_of_everything_shows_alike_everywhere() -> None:
    """At the border, too, where a neighbourhood has fewer tokens."""
    source = scene()[0]
    found = follow.evidence(source + 0.5, source)
    torch.testing.assert_close(found, torch.full((F, ROWS, COLUMNS), 0.25))


def test_a_token_alone_counts_a_quarter() -> None:
    """Of which its neighbourhood shows no more than a ninth of the change."""
    source, where = torch.zeros(1, C, 2 * ROWS, 2 * COLUMNS), torch.zeros(1, ROWS, COLUMNS)
    where[0, 3, 5] = 2.0
    found = follow.evidence(source + where.repeat_interleave(2, 1).repeat_interleave(2, 2), source)
    assert found[0, 3, 5] == pytest.approx(0.25 * 4)
    assert found[0, 2:5, 4:7].sum() == pytest.approx(1 + 8 * 4 / 81)
    assert found.count_nonzero() == 9


@pytest.mark.parametrize(("change", "cut"), [(0.99, False), (1.01, True)])
def test_two_scenes_differ_by_more_than_one(change: float, cut: bool) -> None:
    before = torch.zeros(C, 4, 4)
    assert follow.is_cut(before, before + change**0.5) is cut


def test_likely_tokens_are_kept_beside_sure_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the threshold: a sure one in the middle, likely ones, and one that is none."""
    shares = torch.tensor([[[0.7, 0.52, 1.2, 0.52, 0.48]]])
    monkeypatch.setattr(follow, "evidence", lambda *_: 0.02 * shares)
    still = torch.zeros(1, C, 2, 10)
    kept = follow.undilated(still, still, None, threshold=0.02)
    assert kept.tolist() == [[[False, True, True, True, False]]]
    before = torch.tensor([[True, False, False, False, True]])
    kept = follow.undilated(still, still, before, threshold=0.02)
    assert kept.tolist() == [[[True, True, True, True, False]]]


def test_a_chunk_follows_the_last_latent_of_the_one_before() -> None:
    """That one began with another scene, which says nothing about this one."""
    region, core = at(slice(1, 7), slice(3, 10)), at(slice(2, 6), slice(4, 9))
    cut = torch.cat([scene(1)[:, :1], scene()[:, 1:]], dim=1)
    mask = cache(FOLLOW)
    run(mask, edit(cut, region, by=level(1.5), noise=0), cut)
    kept = run(mask, edit(scene(), region, by=level(0.75), noise=0), scene())
    assert kept[core].all()


def test_what_is_carried_is_the_answer_for_the_last_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nowhere()
    for n in range(F):
        found[n, n, n] = True
    monkeypatch.setattr(follow, "undilated", lambda *_, **options: found)
    mask = cache(FOLLOW)
    run(mask, scene(), scene())
    carried = mask.carried()
    assert carried is not None
    assert torch.equal(carried, found[-1].flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_carried_goes_on_elsewhere(cut: bool) -> None:
    """A likely edit is kept by a cache that took over from one that was sure, unless there was a
    cut between."""
    region, core = at(slice(1, 7), slice(3, 10)), at(slice(2, 6), slice(4, 9))
    first, second = cache(FOLLOW), cache(FOLLOW)
    run(first, edit(scene(), region, by=level(1.5), noise=0), scene())
    second.carry_on(first.carried(), scene(1 if cut else 0)[0, -1], 1)
    kept = run(second, edit(scene(), region, by=level(0.75), noise=0), scene())
    assert kept.any() != cut
    assert cut or kept[core].all()


def test_nothing_to_compute_runs_nothing() -> None:
    stream = known_editor(mask_cache=FOLLOW).open("leave it as it is", height=64, width=96, seed=0)
    forward, calls = stream._forward, []

    class Counting:
        refresh = staticmethod(forward.refresh)

        def __call__(self, *arguments: Any) -> Tensor:
            calls.append(arguments)
            return forward(*arguments)

    stream._forward = Counting()
    chunks = list(stream.push(block_clip(45, 64, 96)))
    assert len(calls) == len(chunks) == 4  # the first step of each


def test_a_stream_that_changes_nothing_and_one_that_paints() -> None:
    editor, source = known_editor(mask_cache=FOLLOW), block_clip(45, 64, 96)
    for prompt, shares in (("leave it as it is", {0.4}), ("paint it red", None)):
        stream = editor.open(prompt, height=64, width=96, seed=3)
        chunks = [*stream.push(source)]
        assert_edited(np.concatenate([chunk.frames for chunk in chunks]), source, prompt, within=1)
        found = {chunk.recomputed for chunk in chunks}
        assert found == shares if shares else all(0.4 < share <= 1 for share in found)


@pytest.mark.parametrize("after", [9, 21, 30])
def test_a_restored_stream_goes_on_exactly(after: int) -> None:
    editor, source = known_editor(mask_cache=FOLLOW), block_clip(57, 64, 96)
    whole = editor.open("paint it red", height=64, width=96, seed=3)
    expected = np.concatenate([chunk.frames for chunk in whole.push(source)])
    first = editor.open("paint it red", height=64, width=96, seed=3)
    made = [chunk.frames for chunk in first.push(source[:after])]
    state = StreamState.from_bytes(first.snapshot().to_bytes())
    assert state.mask_tokens is not None
    second = editor.restore(state)
    made += [chunk.frames for chunk in second.push(source[after:])]
    assert np.array_equal(np.concatenate(made), expected)
    carried = [stream.snapshot().mask_tokens for stream in (whole, second)]
    assert carried[0] is not None
    assert carried[1] is not None
    assert torch.equal(carried[0], carried[1])


def test_a_new_prompt_is_new_where_the_stream_is_restored() -> None:
    """Moved before the next chunk: what the old prompt edited says nothing there either."""
    stream = known_editor(mask_cache=FOLLOW).open("paint it red", height=64, width=96, seed=3)
    list(stream.push(block_clip(21, 64, 96)))
    assert stream.snapshot().mask_tokens is not None
    stream.set_prompt("paint it blue")
    assert stream.snapshot().mask_tokens is None
    assert stream.snapshot(compact=True).mask_tokens is None
