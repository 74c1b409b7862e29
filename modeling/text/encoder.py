"""What every text encoder does: remember prompts, cut and pad them, free its weights.

B prompts, L tokens, D embedding size.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any, Self

import torch
from torch import Tensor

from modeling.config import TextConfig

log = logging.getLogger(__name__)

CACHED_PROMPTS = 256
IDLE_CALLS = 256  # calls in a row that needed no weights, after which they are freed


class TextEncoder(ABC):
    """Encodes prompts and remembers the last of them, so that a repeated prompt costs nothing."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")
        self._cache: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> [true length, D], CPU
        self._model: Any = None
        self._idle_calls = 0

    def encode(self, prompts: list[str]) -> Tensor:
        """float32 [B, L, D] on `device`, zero after each prompt's true length.

        A prompt longer than L tokens is cut, with a warning in the log. When only remembered
        prompts have been asked for in a while, the weights are freed.
        """
        fresh = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        found = {p: self._cache[p] for p in prompts if p in self._cache}
        if fresh:
            found |= zip(fresh, self._embed(fresh), strict=True)
        self._idle_calls = 0 if fresh else self._idle_calls + 1
        if self._idle_calls == IDLE_CALLS:
            self.release()
        for prompt in found:
            self._cache[prompt] = found[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        out = torch.zeros(len(prompts), self.config.tokens, self.config.dim)
        for row, prompt in zip(out, prompts, strict=True):
            row[: len(found[prompt])] = found[prompt]
        return out.to(self.device)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def release(self) -> None:
        """Free the weights. Prompts encoded before stay available; a new one loads them again."""
        self._model = None

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the embeddings; goes into encoded datasets."""

    @abstractmethod
    def _embed(self, prompts: list[str]) -> list[Tensor]:
        """float32 [true length, D] on the CPU for each prompt."""

    def _warn_cut(self, prompt: str, length: int) -> None:
        log.warning(
            "prompt of %d tokens is cut to the first %d: %.80r", length, self.config.tokens, prompt
        )
