"""AdamW without a first moment is AdamW, and holds none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.training.zero.adam import settle_first_moment, without_first_moment


@pytest.mark.parametrize("fused", [False, True])
def test_it_steps_as_adamw_does_bit_for_bit(fused: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(3, 4))] for _ in "12")
    made = [
        torch.optim.AdamW(parameters, lr=1e-2, betas=(0.0, 0.99), fused=fused)
        for parameters in (ours, theirs)
    ]
    without_first_moment(made[0])
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            gradient = None if step == 1 and one.dim() == 2 else torch.randn(one.shape)
            one.grad, other.grad = gradient, None if gradient is None else gradient.clone()
        for optimizer in made:
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            for name in ("step", "exp_avg_sq"):
                mine, wanted = made[0].state[one][name], made[1].state[other][name]
                assert torch.equal(mine, wanted)
                assert mine.dtype == wanted.dtype
            moment = made[0].state[one]["exp_avg"]
            assert moment.shape == one.shape
            assert moment.untyped_storage().nbytes() == 4  # one zero


def test_it_goes_on_from_a_state_with_a_first_moment() -> None:
    """As one that was saved before, or with other betas."""
    parameter = nn.Parameter(torch.ones(5))
    before = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99))
    parameter.grad = torch.ones(5)
    before.step()
    now = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.0, 0.99))
    without_first_moment(now)
    now.load_state_dict(before.state_dict() | {"param_groups": now.state_dict()["param_groups"]})
    now.step()
    assert now.state[parameter]["step"] == 2
    assert now.state[parameter]["exp_avg"].untyped_storage().nbytes() == 4


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_loaded_is_what_the_betas_of_now_hold(fused: bool) -> None:
    """A first moment that was none becomes one; one that is not used any more takes no memory."""
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in "12")
    made = [torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.99), fused=fused) for p in (ours, theirs)]
    for one in (ours, theirs):
        one.grad = torch.arange(5.0)
    for optimizer in made:
        optimizer.step()
    made[0].state[ours]["exp_avg"] = torch.zeros(1).expand(5)
    made[1].state[theirs]["exp_avg"] = torch.zeros(5)
    settle_first_moment(made[0])
    for optimizer in made:
        optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(made[0].state[ours]["exp_avg"], made[1].state[theirs]["exp_avg"])

    now = torch.optim.AdamW([ours], lr=1e-2, betas=(0.0, 0.99), fused=fused)
    without_first_moment(now)
    now.load_state_dict(made[0].state_dict() | {"param_groups": now.state_dict()["param_groups"]})
    settle_first_moment(now)
    assert now.state[ours]["exp_avg"].untyped_storage().nbytes() == 4
    assert torch.equal(now.state[ours]["exp_avg"], torch.zeros(5))
