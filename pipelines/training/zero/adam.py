"""AdamW without a first moment where it would hold nothing: with a first beta of 0, as distill has,
the moment after a step is that step's gradient. It takes 4 bytes a parameter and network, and as
many of every checkpoint.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_MOMENT = "exp_avg"
_WITHOUT: WeakSet[torch.optim.Optimizer] = WeakSet()  # those that do without it


def without_first_moment(optimizer: torch.optim.AdamW) -> None:
    """Let `optimizer`, of betas (0, b), do without its first moment, bit for bit.

    While it steps the gradient serves as the moment, which an update writes it into; in between the
    state holds zeros that take no memory, so that whoever reads an optimizer's state finds what
    AdamW has. A training that goes on with another first beta begins with a first moment of zeros.
    """
    assert all(group["betas"][0] == 0 for group in optimizer.param_groups)
    _WITHOUT.add(optimizer)
    optimizer.register_step_pre_hook(_lend_gradients)
    optimizer.register_step_post_hook(_take_back)


def settle_first_moment(optimizer: torch.optim.Optimizer) -> None:
    """Bring what was loaded from a checkpoint to what `optimizer` holds: a moment of its own for
    each parameter, or zeros that take no memory (moving them to a GPU had written them out). An
    update into such zeros, which are one number, would write beyond it."""
    for state in optimizer.state.values():
        if _MOMENT in state:
            moment = state[_MOMENT]
            state[_MOMENT] = (
                moment.new_zeros(1).expand(moment.shape)
                if optimizer in _WITHOUT
                else moment.contiguous()  # as it is, unless it is such zeros
            )


def _lend_gradients(optimizer: Any, *_: object) -> None:
    for parameter, fused in _stepping(optimizer):
        state = optimizer.state[parameter]
        if not state:  # what AdamW begins with
            place = parameter.device if fused else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state[_MOMENT] = parameter.grad


def _take_back(optimizer: Any, *_: object) -> None:
    for parameter, _fused in _stepping(optimizer):
        nothing = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
        optimizer.state[parameter][_MOMENT] = nothing.expand(parameter.shape)


def _stepping(optimizer: Any) -> list[tuple[Tensor, bool]]:
    """The parameters that the optimizer's step changes, and whether in one kernel."""
    return [
        (parameter, bool(group["fused"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
