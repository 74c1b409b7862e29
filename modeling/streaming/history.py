"""What a rollout remembers: keys and values of a clip's chunks, shown as a `KVCache` shows them.

A stream's ring is overwritten as it rolls; what is remembered here is written once, a tensor a
chunk. So a backward pass, and the recomputation in it, may read what its chunk saw without a copy
of it, and what no later chunk sees and no gradient needs is freed.

B batch, S tokens of a chunk, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.config import StreamConfig, TransformerConfig
from modeling.diffusion.attention import attention
from modeling.diffusion.reuse import Reuse, together
from modeling.diffusion.rope import Rope, fixed_rope_table, rotate, time_shift
from modeling.geometry import PATCH


class History:
    """The chunks that the next one of `batch` clips sees; `latent_height` x `latent_width` is the
    latent grid."""

    def __init__(
        self,
        config: TransformerConfig,
        stream: StreamConfig,
        *,
        batch: int,
        latent_height: int,
        latent_width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.grid = (latent_height // PATCH, latent_width // PATCH)  # tokens
        self.chunk_latents = stream.chunk_latents
        self.slots = stream.window_latents // stream.chunk_latents
        self.sink_slots = stream.sink_latents // stream.chunk_latents
        self.window_positions = stream.window_positions
        tokens = stream.chunk_latents * self.grid[0] * self.grid[1]
        heads = (config.num_heads, config.head_dim)
        self._shape = (config.num_layers, batch, tokens, *heads)
        self._like = torch.empty(0, device=device, dtype=dtype)
        self.seen: list[tuple[Tensor, Tensor]] = []  # keys and values [layers, B, S, N, D]
        self.committed = 0  # chunks since the clip began

    @property
    def moved(self) -> int:
        """How many latents later than they are the sinks are seen, see `KVCache`."""
        if not (self.window_positions and self.sink_slots):
            return 0
        return max(0, self.committed - (self.slots - 1)) * self.chunk_latents

    def empty(self) -> tuple[Tensor, Tensor]:
        """Room for the next chunk's keys and values."""
        return self._like.new_empty(self._shape), self._like.new_empty(self._shape)

    def commit(self, keys: Tensor, values: Tensor) -> None:
        """The chunk with these keys and values becomes history."""
        self.seen.append((keys, values))
        if len(self.seen) > self.slots - 1:
            self.seen.pop(self.sink_slots)
        self.committed += 1


class Remembered:
    """Visibility of one chunk: its own keys and a `History`, as it is now, which stays constant.

    `reuse` as in `Cached`. With `keeps` the chunk's own keys and values are written there.
    """

    def __init__(
        self,
        history: History,
        reuse: Reuse | None = None,
        keeps: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.history, self.reuse, self.keeps = history, reuse, keeps
        self._seen, self._moved = tuple(history.seen), history.moved
        first = history.committed * history.chunk_latents
        self._times = tuple(range(first, first + history.chunk_latents))
        self._shift: Rope | None = None

    def begin(
        self, frames: int, height: int, width: int, head_dim: int, device: torch.device
    ) -> Rope:
        grid, chunk = self.history.grid, self.history.chunk_latents
        if frames != chunk or (height, width) != grid:
            raise ValueError(
                f"{frames} latents of {height}x{width} tokens do not fit a history of chunks of "
                f"{chunk} latents of {grid[0]}x{grid[1]}"
            )
        if self._moved:
            self._shift = time_shift(self._moved, head_dim, device)
        rope = fixed_rope_table(self._times, height, width, head_dim, device)
        tokens = None if self.reuse is None else self.reuse.attending
        return rope if tokens is None else rope.select(tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keeps is not None:
            for kept, new in zip(self.keeps, (k, v), strict=True):
                kept[layer] = new
        keys = [keys[layer] for keys, _ in self._seen]
        values = [values[layer] for _, values in self._seen]
        if self._shift is not None:
            for sink in range(self.history.sink_slots):
                keys[sink] = rotate(keys[sink], self._shift)
        return attention(q, torch.cat([*keys, k], dim=1), torch.cat([*values, v], dim=1))


class Unrolled:
    """Visibility of chunks, one after the other, in a single forward: each sees what its own
    `Remembered` shows."""

    def __init__(self, chunks: Sequence[Remembered]) -> None:
        self.chunks = chunks
        history = chunks[0].history
        self._latents = history.chunk_latents
        self._tokens = history.chunk_latents * history.grid[0] * history.grid[1]
        self.reuse = together([chunk.reuse for chunk in chunks], self._tokens)
        kept = [None if chunk.reuse is None else chunk.reuse.attending for chunk in chunks]
        self._counts = [self._tokens if tokens is None else len(tokens) for tokens in kept]

    def begin(
        self, frames: int, height: int, width: int, head_dim: int, device: torch.device
    ) -> Rope:
        if frames != len(self.chunks) * self._latents:
            raise ValueError(
                f"{len(self.chunks)} chunks of {self._latents} latents, the input has {frames}"
            )
        place = (self._latents, height, width, head_dim, device)
        ropes = [chunk.begin(*place) for chunk in self.chunks]
        return Rope(torch.cat([r.cos for r in ropes]), torch.cat([r.sin for r in ropes]))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(self.chunks, *(x.split(self._counts, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([chunk.attend(layer, *piece) for chunk, *piece in pieces], dim=1)
