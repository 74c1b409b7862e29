"""The built-in text encoder: no weights, no download, the same numbers on every machine."""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Collection

import torch
from torch import Tensor

from modeling.text.encoder import TextEncoder


class WordsEncoder(TextEncoder):
    """Each word is a fixed pseudo-random vector, plus a code of its place in the prompt.

    Case and punctuation do not matter. Words that look alike have nothing in common: meaning is
    for the network to learn. Wan's cross-attention has no positions, so the order of words is
    only in the place code (sines and cosines, as in "Attention Is All You Need" 3.5).
    """

    def fingerprint(self) -> str:
        return hashlib.sha256(
            f"words-1/{self.config.dim}/{self.config.tokens}".encode()
        ).hexdigest()

    def _embed(self, prompts: list[str]) -> list[Tensor]:
        return [self._embed_one(prompt) for prompt in prompts]

    def _embed_one(self, prompt: str) -> Tensor:
        words = split_words(prompt)
        if len(words) > self.config.tokens:
            self._warn_cut(prompt, len(words))
        words = words[: self.config.tokens]
        if not words:
            return torch.zeros(0, self.config.dim)
        vectors = torch.stack([word_vector(word, self.config.dim) for word in words])
        return vectors + place_code(len(words), self.config.dim)


def split_words(prompt: str) -> list[str]:
    """Lower-cased words without the punctuation at their ends."""
    words = (word.strip(string.punctuation) for word in prompt.lower().split())
    return [word for word in words if word]


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """Words of the prompt that a model was never taught, each once, as `known` lists those that it
    was (`words` of its card); none if it lists nothing.
    """
    if not known:
        return []
    return [word for word in dict.fromkeys(split_words(prompt)) if word not in known]


def word_vector(word: str, dim: int) -> Tensor:
    """[D] of unit variance, made of the word's hash alone: the same on every machine for ever."""
    drawn = hashlib.shake_256(word.encode()).digest(2 * dim)
    levels = [int.from_bytes(drawn[i : i + 2], "little") for i in range(0, 2 * dim, 2)]
    uniform = (torch.tensor(levels, dtype=torch.float64) + 0.5) / 2**15 - 1  # in (-1, 1)
    return (uniform * math.sqrt(3)).float()


def place_code(length: int, dim: int) -> Tensor:
    """[length, D]: sines, then cosines, of wavelengths from 6 to 600 words."""
    half = (dim + 1) // 2
    rate = 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim].float()
