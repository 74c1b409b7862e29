"""Exponential moving average of a network under DeepSpeed, in float32 and without communication.

Each rank averages its own part of DeepSpeed's float32 master weights. Averaging bf16 weights
instead loses most of the small movements: at decay 0.99 an update is a hundredth of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.training.zero.inside import full_weights, master_shards, shard_starts


class Ema:
    """Average of `engine`'s weights; `decay` is reached after some 10 / (1 - decay) updates.

    The n-th update uses min(decay, (1 + n) / (10 + n)), so that a short training is not held back
    by its start.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.updates = 0
        self.shards = {name: shard.clone() for name, shard in master_shards(engine).items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, shard in master_shards(self.engine).items():
            self.shards[name].lerp_(shard, 1 - decay)

    @torch.no_grad()
    def full_weights(self, keep: bool = True) -> dict[str, Tensor]:
        """The averaged weights, as `engines.full_weights` gives the network's own.

        The averages take the masters' place for the time of gathering, because DeepSpeed knows how
        to gather those.
        """
        masters = master_shards(self.engine)
        kept = {name: master.clone() for name, master in masters.items()}
        for name, master in masters.items():
            master.copy_(self.shards[name])
        try:
            return full_weights(self.engine, keep)
        finally:
            for name, master in masters.items():
                master.copy_(kept[name])

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "shards": self.shards,
            "starts": shard_starts(self.engine),
        }

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Take up this rank's part: `states` is what it saved itself, or what all ranks of a
        training on another number of them saved."""
        self.updates = states[0]["updates"]
        starts = shard_starts(self.engine)
        for name, shard in self.shards.items():
            end = starts[name] + shard.numel()
            for state in states:
                if name not in state["shards"]:
                    continue
                saved, first = state["shards"][name], state["starts"][name]
                low, high = max(first, starts[name]), min(first + saved.numel(), end)
                if low < high:
                    part = saved[low - first : high - first]
                    shard[low - starts[name] : high - starts[name]].copy_(part)
