"""Keys and values of a stream in fixed memory: a ring of chunk slots, the first of them sinks.

The last slot belongs to the chunk being denoised once the window is full, and `commit` copies it
over the oldest chunk that is no sink. So the keys a chunk may see always lie in one contiguous
run, nothing is ever shifted (attention does not care for the order of keys), and a forward that
keeps only some tokens of its chunk simply sees a shorter run.

RoPE needs only distances. Recent keys are stored rotated at the place where the stream was when
they were made. With `window_positions` the window counts from 0 as the published long-video mode
does: recent chunks keep their distance to the query by themselves, and only the sinks, whose first
keys are kept, are turned further, once a chunk. Distances then never leave the trained range.

B batch, S slot tokens (a chunk), N heads, D head size.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from modeling.config import TransformerConfig
from modeling.diffusion.attention import attention
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import Rope, rope_table, time_shift, turn


class KVCache:
    """Self-attention keys and values of all layers for `batch` streams in step.

    `latent_height` x `latent_width` is the latent grid.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        batch: int,
        latent_height: int,
        latent_width: int,
        chunk_latents: int,
        window_latents: int,
        sink_latents: int = 0,
        window_positions: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if window_latents % chunk_latents or sink_latents % chunk_latents:
            raise ValueError(
                f"a window of {window_latents} latents with {sink_latents} sinks does not divide "
                f"into chunks of {chunk_latents}"
            )
        if window_latents < sink_latents + chunk_latents:
            raise ValueError(
                f"a window of {window_latents} latents does not hold {sink_latents} sinks and a "
                f"chunk of {chunk_latents}"
            )
        self.grid = (latent_height // 2, latent_width // 2)  # tokens
        self.head_dim = config.head_dim
        self.chunk_latents = chunk_latents
        self.slot_tokens = chunk_latents * self.grid[0] * self.grid[1]
        self.slots = window_latents // chunk_latents
        self.sink_slots = sink_latents // chunk_latents
        self.window_positions = window_positions
        self.turn = turn  # a GPU has a kernel for it
        shape = (config.num_layers, batch, self.slots * self.slot_tokens)
        heads = (config.num_heads, config.head_dim)
        self.k = torch.zeros(*shape, *heads, device=device, dtype=dtype)  # [layers, B, T, N, D]
        self.v = torch.zeros_like(self.k)
        sinks = self.sink_slots * self.slot_tokens if window_positions else 0
        self.sink_k = torch.zeros(*shape[:2], sinks, *heads, device=device, dtype=dtype)
        angles = (self.slot_tokens, config.head_dim // 2)
        self.rope = Rope(torch.empty(angles, device=device), torch.empty(angles, device=device))
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next chunk is the first of a stream."""
        self.committed = 0  # chunks in the history since the stream began
        self._place()

    @property
    def history_slots(self) -> int:
        return min(self.committed, self.slots - 1)

    @property
    def start(self) -> int:
        """First token of the slot of the chunk being denoised."""
        return self.history_slots * self.slot_tokens

    def commit(self) -> None:
        """The chunk written last becomes history; call it after the refresh forward."""
        if self.committed < self.sink_slots and self.window_positions:
            slot = slice(self.start, self.start + self.slot_tokens)
            self.sink_k[:, :, slot] = self.k[:, :, slot]
        if self.committed >= self.slots - 1:
            self._roll()
        self.committed += 1
        self._place()
        if self.window_positions and self.committed >= self.slots:
            self._turn_sinks()

    def elsewhere(self, k: Tensor, v: Tensor) -> KVCache:
        """A cache of this shape in that memory, for forwards only: it commits nothing."""
        other = copy(self)
        other.k, other.v, other.sink_k = k, v, self.sink_k.new_empty(0)
        other.rope = Rope(*(torch.empty_like(part) for part in self.rope))
        return other

    def copy_(self, other: KVCache) -> None:
        """Hold what forwards on `other`, of this shape, see."""
        held, seen = (self.k, self.v, *self.rope), (other.k, other.v, *other.rope)
        for mine, theirs in zip(held, seen, strict=True):
            mine.copy_(theirs)
        self.committed = other.committed

    def take(self, other: KVCache) -> None:
        """Hold the chunk that was written last on `other`, which `copy_` was called on."""
        slot = slice(self.start, self.start + self.slot_tokens)
        self.k[:, :, slot] = other.k[:, :, slot]
        self.v[:, :, slot] = other.v[:, :, slot]

    def state_dict(self) -> dict[str, Tensor | int]:
        """All that a stream remembers, copied; `load_state_dict` restores it bit for bit."""
        used = self.start
        return {
            "committed": self.committed,
            "k": self.k[:, :, :used].clone(),
            "v": self.v[:, :, :used].clone(),
            "sink_k": self.sink_k.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        k, v, sink_k = state["k"], state["v"], state["sink_k"]
        assert isinstance(k, Tensor)
        assert isinstance(v, Tensor)
        assert isinstance(sink_k, Tensor)
        layers, batch, used = k.shape[:3]
        same = (layers, batch, *k.shape[3:]) == (*self.k.shape[:2], *self.k.shape[3:])
        if not same or used > self.k.shape[2] or sink_k.shape != self.sink_k.shape:
            raise ValueError(
                f"a KV state of shape {tuple(k.shape)} with sinks of {tuple(sink_k.shape)} does "
                f"not fit a cache of {tuple(self.k.shape)} with {tuple(self.sink_k.shape)}; "
                "restore it with the model and size it was made with"
            )
        self.k[:, :, :used] = k.to(self.k)
        self.v[:, :, :used] = v.to(self.v)
        self.sink_k.copy_(sink_k)
        self.committed = int(state["committed"])
        self._place()

    def _roll(self) -> None:
        ring = self.slots - 1 - self.sink_slots  # chunks between the sinks and the current one
        if ring == 0:
            return
        oldest = self.sink_slots + (self.committed - self.sink_slots) % ring
        last, size = (self.slots - 1) * self.slot_tokens, self.slot_tokens
        for cache in (self.k, self.v):
            cache[:, :, oldest * size : (oldest + 1) * size] = cache[:, :, last : last + size]

    def _place(self) -> None:
        """Set the rotations of the chunk that comes next."""
        first = self.committed * self.chunk_latents
        times = torch.arange(first, first + self.chunk_latents, device=self.k.device)
        for ours, new in zip(self.rope, rope_table(times, *self.grid, self.head_dim), strict=True):
            ours.copy_(new)

    def _turn_sinks(self) -> None:
        """Move the sinks right before the recent chunks, as if the window began at position 0."""
        if self.sink_slots == 0:
            return
        first = (self.committed - (self.slots - 1)) * self.chunk_latents
        self.turn(self.sink_k, time_shift(first, self.head_dim, self.k.device), self.k)


class Cached:
    """Visibility of one chunk: its own keys and the history of `cache`.

    The chunk's keys are written into its slot; the last forward before `commit` decides what stays.
    So there is no gradient: that is what `history.Remembered` is for. `reuse` names the tokens that
    are recomputed; only their keys are then seen beside the history, as published.
    """

    def __init__(self, cache: KVCache, reuse: Reuse | None = None) -> None:
        self.cache = cache
        self.reuse = reuse
        self._start = cache.start

    def begin(
        self, frames: int, height: int, width: int, head_dim: int, device: torch.device
    ) -> Rope:
        if frames != self.cache.chunk_latents or (height, width) != self.cache.grid:
            raise ValueError(
                f"{frames} latents of {height}x{width} tokens do not fit a cache of chunks of "
                f"{self.cache.chunk_latents} latents of {self.cache.grid[0]}x{self.cache.grid[1]}"
            )
        rope, reuse = self.cache.rope, self.reuse
        if reuse is not None and reuse.attending is not None:
            return rope.select(reuse.attending)
        return rope

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, end = self._start, self._start + k.shape[1]
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[:, start:end] = k
        values[:, start:end] = v
        return attention(q, keys[:, :end], values[:, :end])
