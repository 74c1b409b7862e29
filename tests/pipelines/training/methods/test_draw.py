"""The random numbers of a batch: from (seed, step, accumulation, rank) and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from infra.runtime.errors import UserError
from modeling.diffusion.flow import FlowSchedule
from pipelines.training.kernels import prepare
from pipelines.training.methods import base
from pipelines.training.methods.base import Draw, FixedDraw, draw_timesteps, prepare_network
from tests.pipelines.training.plain import CONFIG, PlainNetwork, setting


def draw(seed: int = 0, step: int = 0, micro: int = 0, rank: int = 0, world: int = 4) -> Draw:
    return setting("foundation", rank=rank, world_size=world, seed=seed).draw(step, micro)


PLACES = {
    "a start": draw,
    "another seed": lambda: draw(seed=1),
    "another step": lambda: draw(step=1),
    "another accumulation": lambda: draw(micro=1),
    "another rank": lambda: draw(rank=1),
    "seed and step changed over": lambda: draw(seed=1, step=0, micro=1),
    "a far step": lambda: draw(step=10**6),
}


@pytest.mark.parametrize(
    "numbers",
    [
        lambda d: d.normal_like(torch.empty(2, 30)),
        lambda d: d.keep(60, 0.5).flatten(),
        lambda d: torch.rand(4, generator=d.own),
    ],
    ids=["normal_like", "keep", "own"],
)
def test_every_place_has_its_own_numbers(numbers: Callable[[Draw], Tensor]) -> None:
    drawn = {name: numbers(make()) for name, make in PLACES.items()}
    for a, b in combinations(drawn, 2):
        assert not torch.equal(drawn[a], drawn[b]), f"{a} and {b} draw the same"
    torch.manual_seed(99)  # torch's own state is without effect
    for name, make in PLACES.items():
        assert torch.equal(numbers(make()), drawn[name]), f"{name} does not draw the same again"


def test_what_ranks_share_is_nobodys_own() -> None:
    drawn = [draw(rank=rank) for rank in range(4)]
    shared = torch.stack([torch.rand(9, generator=here.shared) for here in drawn])
    own = torch.stack([torch.rand(9, generator=here.own) for here in drawn])
    assert torch.equal(shared, shared[:1].expand(4, 9))
    assert torch.cat([shared[:1], own]).unique(dim=0).shape[0] == 5


def test_held_out_clips_have_noise_of_their_own_and_always_the_same() -> None:
    def drawn(place: int, **section: int) -> Tensor:
        here = FixedDraw(setting("foundation", **section), place, 2)
        return torch.cat([here.normal_like(torch.empty(4)), here.spread(1)[0]])

    assert torch.equal(drawn(0), drawn(0, seed=5))  # or no two validations could be compared
    assert not torch.isin(drawn(0), drawn(1)).any()
    levels = [FixedDraw(setting("foundation"), place, 4).spread(1).item() for place in range(4)]
    gaps = torch.tensor(levels).sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((3,), 1 / 4))  # as those of ranks do


def test_seeds_are_what_they_were() -> None:
    """So that a training goes on with the numbers that it began with, and two validations can be
    compared, whatever version of this made them."""
    there = setting("foundation", rank=3, world_size=4, seed=7).draw(5, 1)
    here = setting("foundation")
    found = [draw(), there, FixedDraw(here, 0, 4), FixedDraw(here, 3, 4)]
    assert [(each.own.initial_seed(), each.shared.initial_seed()) for each in found] == [
        (8407437806151696170, 7896617691693857887),
        (310487666455595109, 6088092377933311330),
        (4447490575564582474, 8071776124730964103),
        (1539720418252776130, 8071776124730964103),
    ]


@pytest.mark.parametrize(("stage", "frames"), [("vae", 9), ("foundation", None), ("distill", None)])
def test_a_vae_reads_clips_and_the_others_whole_pairs(stage: str, frames: int | None) -> None:
    assert setting(stage).clip_frames == frames


@pytest.mark.parametrize(
    ("stage", "sharing", "rank", "groups", "place"),
    [
        ("foundation", 2, 0, [[0, 1], [2, 3], [4, 5], [6, 7]], (0, 0, 2)),
        ("distill", 2, 5, [[0, 1], [2, 3], [4, 5], [6, 7]], (2, 1, 2)),
        ("causal", 4, 7, [[0, 1, 2, 3], [4, 5, 6, 7]], (1, 3, 4)),
        ("foundation", 1, 5, [], None),
        ("vae", 2, 5, [], None),
    ],
)
def test_who_shares_a_clip(
    stage: str,
    sharing: int,
    rank: int,
    groups: list[list[int]],
    place: tuple[int, int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank makes all groups, in the same order: that is a collective."""
    made: list[list[int]] = []

    def new_group(ranks: list[int]) -> int:
        made.append(ranks)
        return len(made) - 1

    monkeypatch.setattr(base.distributed, "new_group", new_group)
    here = setting(stage, rank=rank, world_size=8)
    here.config.compute.sequence_parallel = sharing
    found = here.sequence
    assert (found and (found.group, found.rank, found.size)) == place
    assert here.sequence is found
    assert made == groups
    shared = place[2] if place else 1
    assert (here.data_rank, here.data_workers) == (rank // shared, 8 // shared)


def test_one_draw_goes_on() -> None:
    here = draw()
    like = torch.empty(50)
    assert not torch.equal(here.normal_like(like), here.normal_like(like))
    assert not torch.equal(here.spread(2), here.spread(2))


def test_the_noise_is_standard_normal() -> None:
    noise = draw().normal_like(torch.empty(100, 1000))
    assert noise.mean().item() == pytest.approx(0, abs=0.015)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_spread_numbers_lie_evenly_over_the_clips_of_all_ranks() -> None:
    ranks = [draw(step=3, rank=rank).spread(5, 2) for rank in range(4)]
    drawn = torch.cat(ranks)  # [20, 2]
    assert drawn.shape == (20, 2)
    gaps = drawn.sort(dim=0).values.diff(dim=0)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 20), atol=1e-6, rtol=0)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert not torch.allclose(drawn[:, 0], drawn[:, 1], atol=1e-3)  # columns are independent
    steps = {round(draw(step=step).spread(1).item(), 4) for step in range(50)}
    assert len(steps) > 45  # the start moves with the step
    assert min(steps) < 0.1
    assert max(steps) > 0.9


def test_a_seed_of_the_stage_goes_before_that_of_the_pipeline() -> None:
    both = setting("foundation", seed=0)
    both.config.seed = 7
    assert both.seed == 0
    assert setting("foundation").seed == 0
    other = setting("foundation", seed=None)
    other.config.seed = 7
    assert other.seed == 7


def test_the_networks_type_is_the_precision() -> None:
    here = setting("foundation")
    assert here.dtype == torch.float32
    here.config.compute.precision = "bf16"
    assert here.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("size", "groups"), [(2, [[0, 1], [2, 3], [4, 5]]), (3, [[0, 1, 2], [3, 4, 5]])]
)
def test_ranks_that_follow_each_other_share_a_clip(
    size: int, groups: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank must make every group."""
    made: list[list[int]] = []

    def new_group(ranks: list[int]) -> list[int]:
        made.append(ranks)
        return ranks

    monkeypatch.setattr(distributed, "new_group", new_group)
    for rank in range(6):
        made.clear()
        here = setting("foundation", rank, 6)
        here.config.compute.sequence_parallel = size
        assert here.sequence is not None
        assert made == groups
        own: Any = here.sequence.group
        assert (own[here.sequence.rank], here.sequence.size) == (rank, size)
        assert here.sequence is here.sequence  # once
        assert (groups[here.data_rank], here.data_workers) == (own, len(groups))
    assert setting("foundation", 1, 6).sequence is None


@pytest.mark.parametrize("told", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_network_recomputes_what_it_is_told(told: tuple[bool, bool, bool]) -> None:
    here = setting("foundation")
    here.section.keep_products = told[2]
    here.config.compute.activation_checkpointing, here.config.compute.recompute_attention = told[:2]
    network = PlainNetwork()
    prepare_network(network, here)  # type: ignore[arg-type]
    found = network.gradient_checkpointing, network.recompute_attention, network.keep_products
    assert found == told


@pytest.mark.parametrize(("heads", "fits"), [(4, True), (3, False)])
def test_a_network_whose_heads_cannot_be_shared_out_is_refused_before_it_trains(
    heads: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "new_group", lambda ranks: ranks)
    here = setting("foundation", 1, 2)
    here.config.compute.sequence_parallel = 2
    network: Any = PlainNetwork()
    network.config = replace(CONFIG.transformer, dim=24, num_heads=heads)
    with nullcontext() if fits else pytest.raises(UserError, match=f"{heads} heads"):
        prepare_network(network, here)
        assert network.sequence is here.sequence


def test_what_networks_begin_with_is_drawn_by_the_seed_alone_on_the_threads_asked_for() -> None:
    drawn: dict[int, list[float]] = {}
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            for seed in (5, 5, 6):
                here = setting("foundation", seed=seed)
                here.config.compute.threads_per_worker = 2
                prepare(here)
                assert torch.get_num_threads() == 2
                assert drawn.setdefault(seed, number := torch.rand(3).tolist()) == number
    finally:
        torch.set_num_threads(threads)
    assert drawn[5] != drawn[6]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_keep_drops_the_share_it_is_told(share: float) -> None:
    kept = draw().keep(2000, share)
    assert kept.shape == (2000, 1, 1, 1, 1)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert 1 - kept.mean().item() == pytest.approx(share, abs=0 if share in (0, 1) else 0.04)


def test_timesteps_are_the_grid_of_the_shift_each_place_alike() -> None:
    schedule = FlowSchedule(8.0)
    drawn = draw_timesteps(draw(world=1), schedule, 1000, 3)
    assert drawn.shape == (1000, 3)
    for column in drawn.T:  # a thousand evenly spread numbers take every place once
        u = torch.arange(1000, 0, -1) / 1000
        expected = 1000 * 8 * u / (1 + 7 * u)
        found = column.sort(descending=True).values
        assert (found - expected).abs().max() < 13  # one place beside, by rounding
        assert column.unique().numel() > 950
