"""Rotary positions over time, height and width, as in Wan2.1.

A head's D/2 complex dimensions are divided between the axes: each spatial axis takes a third
(rounded down), time the rest (22 / 21 / 21 of 64). Angles are computed in float64, so a position
may be as large as a stream is long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rope(NamedTuple):
    """Rotations of T tokens: cosines and sines, each [T, D/2] in float32."""

    cos: Tensor
    sin: Tensor

    def select(self, tokens: Tensor) -> Rope:
        return Rope(self.cos[tokens], self.sin[tokens])


def rope_table(times: Tensor, height: int, width: int, head_dim: int) -> Rope:
    """Rotations for frames at positions `times` [F] on a height x width token grid.

    Tokens run over frames, then rows, then columns: T = F * height * width.
    """
    space = head_dim // 2 // 3
    time = head_dim // 2 - 2 * space
    times_at = _angles(times, time, 2 * time)  # [F, time]
    rows, columns = _grid_angles(height, width, space, times.device)
    frames = times.shape[0]
    angles = torch.cat(
        [
            times_at[:, None, None, :].expand(frames, height, width, time),
            rows[None, :, None, :].expand(frames, height, width, space),
            columns[None, None, :, :].expand(frames, height, width, space),
        ],
        dim=-1,
    ).reshape(frames * height * width, head_dim // 2)
    return Rope(angles.cos().float(), angles.sin().float())


@lru_cache(maxsize=32)
def fixed_rope_table(
    times: tuple[int, ...], height: int, width: int, head_dim: int, device: torch.device
) -> Rope:
    """`rope_table` for positions known on the host, kept for the next call."""
    with torch.inference_mode(False):  # what is kept must also serve a later training step
        return rope_table(torch.tensor(times, device=device), height, width, head_dim)


def time_shift(frames: int, head_dim: int, device: torch.device) -> Rope:
    """The rotation [1, D/2] that moves tokens `frames` later, whatever their place."""
    space = head_dim // 2 // 3
    time = head_dim // 2 - 2 * space
    # Filled, not copied: a copy would make the host wait for the GPU.
    angles = _angles(torch.full((1,), frames, device=device), time, 2 * time)
    angles = torch.nn.functional.pad(angles, (0, 2 * space))
    return Rope(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate x [..., T, N, D]: consecutive pairs of D are the complex dimensions.

    A rope of one token turns all T alike.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., T, N, D/2]
    cos, sin = rope.cos[:, None], rope.sin[:, None]  # [T, 1, D/2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def turn(x: Tensor, rope: Rope, out: Tensor) -> None:
    """`rotate` x [layers, B, T, N, D] into the first T tokens of out [layers, B, T' >= T, N, D]."""
    for turned, layer in zip(out, x, strict=True):  # float32 copies of all would be gigabytes
        turned[:, : x.shape[2]] = rotate(layer, rope)


def _angles(positions: Tensor, count: int, size: int) -> Tensor:
    """[P] -> [P, count] float64 angles; frequencies fall from 1 as THETA^(-2i/size)."""
    exponent = torch.arange(count, dtype=torch.float64, device=positions.device) * 2 / size
    return positions.double()[:, None] / THETA**exponent


@lru_cache(maxsize=32)
def _grid_angles(
    height: int, width: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    return _angles(rows, count, 2 * count), _angles(columns, count, 2 * count)
