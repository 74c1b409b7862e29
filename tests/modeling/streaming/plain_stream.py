"""A second stream, written from the published description: no caches, no rings, no pieces.

It edits whole clips in float64: the VAE runs over the clip at once, a chunk looks at a list of the
chunks before it, and what a mask keeps is found by loops. `EditStream` must give the same.

F latents of a chunk, C channels, H x W latent size, T tokens of a chunk; no batch axis.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig
from modeling.model_dir import Model
from modeling.text.build import build_text_encoder
from tests.modeling.diffusion.plain_transformer import Pruned, Seen, forward


@dataclass
class PlainChunk:
    """What one chunk of a clip became."""

    frames: np.ndarray
    mask: np.ndarray  # bool [F, H / 2, W / 2]
    recomputed: float


@dataclass
class Past:
    """An edited chunk; latents are [F, C, H, W]."""

    edited: Tensor
    source: Tensor
    seen: list[Seen]  # by layer


class PlainStream:
    def __init__(self, model: Model, mask_cache: MaskCacheConfig | None, seed: int) -> None:
        assert model.transformer is not None
        self.config, self.mask_cache = model.config, mask_cache
        self.weights = {k: v.double() for k, v in model.transformer.state_dict().items()}
        self.vae = deepcopy(model.vae).double()  # type: ignore[union-attr]
        self.noise = torch.Generator().manual_seed(seed)
        self.past: list[Past] = []
        self.kept: Tensor | None = None  # tokens of the next chunk's pruned steps
        self.run_in: tuple[Tensor, Tensor] | None = None  # edited and source latents

    def edit(self, frames: np.ndarray, prompts: list[str]) -> list[PlainChunk]:
        """The rest of the clip, uint8 [n, height, width, 3]; `prompts` has one for each chunk."""
        chunk = self.config.stream.chunk_latents
        sizes = [4 * chunk] * len(prompts)
        sizes[0] -= 3 if self.run_in is None else 0
        last, (_, height, width, _) = sum(sizes), frames.shape
        padding = (0, last - len(frames)), (0, -height % 16), (0, -width % 16), (0, 0)
        padded = torch.tensor(np.pad(frames, padding, mode="edge")).permute(0, 3, 1, 2)
        pixels, before = padded.double() / 255 * 2 - 1, []
        if self.run_in is not None:
            before = [self.run_in[0]]
            pixels = torch.cat([self.vae.decode(self.run_in[1][None])[0][0], pixels])
        latents = self.vae.encode(pixels[None])[0][0, -chunk * len(prompts) :]
        made = [self._edit(*pair) for pair in zip(latents.split(chunk), prompts, strict=True)]
        decoded = self.vae.decode(torch.cat([*before, *(x0 for x0, _, _ in made)])[None])[0][0]
        shown = ((decoded + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        parts = np.split(shown[-last:, :height, :width][: len(frames)], np.cumsum(sizes)[:-1])
        return [PlainChunk(part, *rest) for part, (_, *rest) in zip(parts, made, strict=True)]

    def compact(self, prompt: str) -> None:
        """Go on from what a compact state holds: latents in half precision, and no caches."""
        last = len(self.past) - 1
        past = [self.past[i] for i in sorted({*self._visible(last + 1), last})]
        self.past = []
        for chunk in past:
            self._remember(*(x.half().double() for x in (chunk.edited, chunk.source)), prompt)
        edited = torch.cat([chunk.edited for chunk in self.past])
        source = torch.cat([chunk.source for chunk in self.past])
        self.run_in = edited[-6:], source[-6:]

    def _edit(self, source: Tensor, prompt: str) -> tuple[Tensor, np.ndarray, float]:
        """Edited latents of one chunk, its mask, and the share of tokens that was computed."""
        settings, mask = self.config.stream, self.mask_cache
        grid = source.shape[0], source.shape[2] // 2, source.shape[3] // 2
        shown = torch.zeros(grid, dtype=torch.bool)
        shown.view(-1)[slice(None) if self.kept is None else self.kept] = True
        cells = shown.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
        sigmas = [
            settings.shift * u / (1 + (settings.shift - 1) * u)
            for u in (place / 1000 for place in settings.timesteps)
        ]
        x, x0, full, computed = self._noise(source), source, [], 0
        for step, sigma in enumerate(sigmas):
            pruned = None
            if mask and self.kept is not None and step in mask.pruned_steps:
                pruned = Pruned(mask.scope, self.kept, full)
            velocity, _, outputs = self._forward(x, source, 1000 * sigma, prompt, pruned)
            if pruned is None:
                x0, full = x - sigma * velocity, outputs
            elif pruned.scope == "block":
                x0 = torch.where(cells, x - sigma * velocity, x0)
            else:
                x0 = x - sigma * velocity
            computed += shown.numel() if pruned is None else len(pruned.kept)
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * self._noise(source)
        self._remember(x0, source, prompt)
        if mask:
            self.kept = kept_tokens((x0 - source).square().mean(dim=1), mask)
        computed += shown.numel()
        return x0, shown.numpy(), computed / ((len(sigmas) + 1) * shown.numel())

    def _remember(self, edited: Tensor, source: Tensor, prompt: str) -> None:
        """The clean chunk becomes history: its keys at timestep 0."""
        self.past.append(Past(edited, source, self._forward(edited, source, 0, prompt)[1]))

    def _forward(
        self, x: Tensor, source: Tensor, t: float, prompt: str, pruned: Pruned | None = None
    ) -> tuple[Tensor, list[Seen], list[tuple[Tensor, Tensor]]]:
        settings, chunk = self.config.stream, len(self.past)
        places = [*self._visible(chunk), chunk]
        before = [self.past[i].seen for i in places[:-1]]
        if settings.window_positions:
            places = list(range(len(places)))
        *places, place = (i * settings.chunk_latents for i in places)
        text = build_text_encoder(self.config.text).encode([prompt])[0].double()
        latents = torch.cat([x, source], dim=1)
        seen = list(zip(places, before, strict=True))
        config = self.config.transformer
        return forward(config, self.weights, latents, t, text, seen, place, pruned)

    def _visible(self, chunk: int) -> list[int]:
        """The chunks before `chunk` that it sees: all sinks, and the last ones that fit."""
        settings = self.config.stream
        sinks = settings.sink_latents // settings.chunk_latents
        recent = settings.window_latents // settings.chunk_latents - sinks - 1
        return [i for i in range(chunk) if i < sinks or i >= chunk - recent]

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.noise).double()


def kept_tokens(importance: Tensor, mask: MaskCacheConfig) -> Tensor:
    """The tokens that `mask`'s policy keeps by importance [F, H, W] of latent cells."""
    frames, height, width = importance.shape
    rows, columns = height // 2, width // 2
    if mask.policy == "budget":
        padded = torch.full((frames, height + 2, width + 2), -torch.inf, dtype=torch.float64)
        padded[:, 1:-1, 1:-1] = importance
        most = torch.stack(
            [
                padded[f, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4].max()
                for f in range(frames)
                for r in range(rows)
                for c in range(columns)
            ]
        )
        count = max(1, round(len(most) * mask.keep_ratio))
        return most.topk(count).indices.sort().values  # what it takes of equals is not published

    def shortest(lists: list[list[int]]) -> list[list[int]]:
        length = min(len(kept) for kept in lists)
        return [kept[:length] for kept in lists]

    cells: list[list[int]] = []
    for frame in importance.flatten(1).tolist():
        wanted = int(len(frame) * mask.keep_ratio)
        threshold = sorted(frame, reverse=True)[wanted - 1] if wanted else float("inf")
        cells.append([i for i, value in enumerate(frame) if value >= threshold])
    tokens: list[list[int]] = []
    for kept in shortest(cells):
        counts = [0] * (rows * columns)
        for cell in kept:
            counts[cell // width // 2 * columns + cell % width // 2] += 1
        tokens.append([token for token, count in enumerate(counts) if count >= 3])
    places = [f * rows * columns + t for f, kept in enumerate(shortest(tokens)) for t in kept]
    return torch.tensor(places, dtype=torch.long)
