"""What runs the transformer for one stream: this plain path anywhere, `modeling.gpu` on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.streaming.kv_cache import Cached, KVCache


class StreamForward(Protocol):
    """The transformer on one stream's cache."""

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        """Velocity [1, F, C, H, W], valid until the next call."""

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        """Make the clean chunk history: its keys at timestep 0, as in training."""


class PlainForward:
    """`StreamForward` on any device."""

    def __init__(self, transformer: Transformer, cache: KVCache) -> None:
        self._transformer = transformer
        self._cache = cache

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        velocity: Tensor = self._transformer(
            noisy, source, timestep, text, Cached(self._cache, reuse)
        )
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self(edited, source, edited.new_zeros(1), text, None)
        self._cache.commit()


ForwardOn = Callable[[KVCache], StreamForward]  # what runs the forwards of one stream
