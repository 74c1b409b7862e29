"""What a token may see: a value handed to the transformer, not a kind of transformer.

`bidirectional`, `chunk_causal` and `teacher_forcing` describe a whole clip as spans: queries of
some frames see keys of some frames. A span is one attention call without a mask, so every backend's
fastest kernel serves and nothing is computed only to be masked away. `Cached` (in `kv_cache`)
is the fourth mode: one chunk that sees its own keys and those a cache remembers.

B batch, F frames, T tokens of all frames, N heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modeling.diffusion.recompute import kept_attention
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import Rope, fixed_rope_table, rotate, time_shift


class Visibility(Protocol):
    """How self-attention runs in one forward."""

    reuse: Reuse | None  # which tokens are recomputed and what stands in for the others

    def begin(
        self, frames: int, height: int, width: int, head_dim: int, device: torch.device
    ) -> Rope:
        """Called once a forward, with the token grid; returns the rotations of its tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q and k, and v, all [B, T, N, D], to the attended values [B, T, N, D]."""


@dataclass(frozen=True)
class Span:
    """Frames `queries` see the keys of frames `keys`; both are (start, end) pairs.

    The first of `keys` are seen `moved` latents later than they are, as a stream sees its sinks.
    """

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    moved: int = 0


class Spans:
    """Visibility of a whole clip. `positions` holds the RoPE time of every frame."""

    reuse = None

    def __init__(self, spans: tuple[Span, ...], positions: tuple[int, ...]) -> None:
        self.spans = spans
        self.positions = positions
        borders = {0, len(positions)}
        for span in spans:
            borders.update(edge for pair in (span.queries, *span.keys) for edge in pair)
        self._edges = sorted(borders)
        self._frame_tokens = 0
        self._shifts: dict[int, Rope] = {}

    def begin(
        self, frames: int, height: int, width: int, head_dim: int, device: torch.device
    ) -> Rope:
        if frames != len(self.positions):
            raise ValueError(
                f"this visibility covers {len(self.positions)} frames, the input has {frames}"
            )
        self._frame_tokens = height * width
        self._shifts = {
            span.moved: time_shift(span.moved, head_dim, device)
            for span in self.spans
            if span.moved
        }
        return fixed_rope_table(self.positions, height, width, head_dim, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [(b - a) * self._frame_tokens for a, b in pairwise(self._edges)]
        # Split, not sliced: a slice's gradient is as large as the whole, and added up as such.
        parts = [x.split(sizes, dim=1) for x in (q, k, v)]
        made = [
            attention(
                self._take(parts[0], (s.queries,)),
                self._keys(parts[1], s),
                self._take(parts[2], s.keys),
            )
            for s in self.spans
        ]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs of frames see each other."""
        return sum(
            (s.queries[1] - s.queries[0]) * sum(end - start for start, end in s.keys)
            for s in self.spans
        )

    def _keys(self, parts: tuple[Tensor, ...], span: Span) -> Tensor:
        if not span.moved:
            return self._take(parts, span.keys)
        sinks = rotate(self._take(parts, span.keys[:1]), self._shifts[span.moved])
        return torch.cat([sinks, self._take(parts, span.keys[1:])], dim=1)

    def _take(self, parts: tuple[Tensor, ...], ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """The tokens of these frames, of what was split at the edges."""
        place = self._edges.index
        taken = [part for a, b in ranges for part in parts[place(a) : place(b)]]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention; q [B, Tq, N, D], k and v [B, Tk, N, D] -> [B, Tq, N, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = kept_attention(q, k, v)
    if out is None:
        out = scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def bidirectional(frames: int) -> Spans:
    """Every frame sees every frame."""
    return Spans((Span((0, frames), ((0, frames),)),), tuple(range(frames)))


def chunk_causal(frames: int, chunk: int) -> Spans:
    """A frame sees its own chunk and all earlier ones."""
    chunks = _chunks(frames, chunk)
    return Spans(tuple(Span((a, b), ((0, b),)) for a, b in chunks), tuple(range(frames)))


def teacher_forcing(
    frames: int,
    chunk: int,
    *,
    window: int | None = None,
    sinks: int = 0,
    window_positions: bool = True,
) -> Spans:
    """For a clip of `frames` stacked twice on the frame axis, clean half first (2 * frames).

    A clean chunk sees the clean chunks up to itself; a noisy chunk sees itself and the clean
    chunks before it, which is what a cache of refreshed chunks shows at inference. Both halves
    have the same positions. `window` (None: all), `sinks` and `window_positions` are those of a
    stream, of which each chunk then sees what a `KVCache` of them shows.
    """
    clean, noisy = [], []
    for a, b in _chunks(frames, chunk):
        before: tuple[tuple[int, int], ...] = ((0, a),) if a else ()
        moved = 0
        if window is not None and b > window:
            recent = a - (window - chunk - sinks)
            before = tuple((x, y) for x, y in ((0, sinks), (recent, a)) if x < y)
            moved = b - window if window_positions and sinks else 0
        clean.append(Span((a, b), (*before, (a, b)), moved))
        noisy.append(Span((frames + a, frames + b), (*before, (frames + a, frames + b)), moved))
    return Spans((*clean, *noisy), tuple(range(frames)) * 2)


def _chunks(frames: int, chunk: int) -> list[tuple[int, int]]:
    if chunk < 1 or frames % chunk:
        raise ValueError(f"{frames} latent frames cannot be cut into chunks of {chunk}")
    return [(start, start + chunk) for start in range(0, frames, chunk)]
