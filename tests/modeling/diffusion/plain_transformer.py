"""The transformer's equations once more, as published: one chunk, in float64, no batch axis.

F latents, C channels, H x W latent size, T tokens, K kept ones, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.config import TransformerConfig


class Seen(NamedTuple):
    """A chunk as the attention of one layer sees it: keys, not rotated, and values [T, N, D]."""

    keys: Tensor
    values: Tensor


class Pruned(NamedTuple):
    """What a pruned step computes: the tokens `kept`, [K]. With scope "attention" or "feedforward",
    `full` are every layer's outputs [T, dim] of both, in this order, in the last full step."""

    scope: str
    kept: Tensor
    full: list[tuple[Tensor, Tensor]]


def forward(
    config: TransformerConfig,
    weights: dict[str, Tensor],
    latents: Tensor,
    t: float,
    text: Tensor,
    before: Sequence[tuple[int, list[Seen]]],
    place: int,
    pruned: Pruned | None = None,
) -> tuple[Tensor, list[Seen], list[tuple[Tensor, Tensor]]]:
    """Velocity [F, C, H, W] of noisy and source `latents` [F, 2 * C, H, W] at timestep `t`.

    `text` is [L, text_dim]. `before` are the chunks that this one sees, each with the RoPE time of
    its first latent; this one's is `place`. Also gives what later chunks see of this one, and the
    outputs of self-attention and feed-forward, both by layer.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def heads(name: str, x: Tensor) -> Tensor:
        x, (module, kind) = linear(name, x), name.rsplit(".", 1)
        if kind in ("q", "k"):
            scale = (x.square().mean(dim=-1, keepdim=True) + config.eps).rsqrt()
            x = x * scale * weights[f"{module}.norm_{kind}.weight"]
        return x.unflatten(-1, (config.num_heads, -1))

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + config.eps).sqrt()

    frames, _, height, width = latents.shape
    grid = frames, height // 2, width // 2
    x = F.conv3d(
        latents.transpose(0, 1),
        weights["patch_embedding.weight"],
        weights["patch_embedding.bias"],
        stride=(1, 2, 2),
    )
    x = x.flatten(1).T  # [T, dim]
    half = config.freq_dim // 2
    wave = torch.tensor([t * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    time = linear("time_embedding.0", torch.cat([wave.cos(), wave.sin()]))
    time = linear("time_embedding.2", F.silu(time))
    modulation = linear("time_projection.1", F.silu(time)).unflatten(0, (6, -1))
    text = linear("text_embedding.0", F.pad(text, (0, 0, 0, config.text_tokens - len(text))))
    text = linear("text_embedding.2", F.gelu(text, approximate="tanh"))

    some = slice(None) if pruned is None or pruned.scope == "feedforward" else pruned.kept
    if pruned and pruned.scope == "block":
        x = x[some]
    seen, outputs = [], []
    for layer in range(config.num_layers):
        name = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = weights[f"{name}.modulation"][0] + modulation
        h = norm(x) * (1 + scale1) + shift1
        if pruned and pruned.scope == "attention":
            h = h[some]
        q, k, v = (heads(f"{name}.self_attn.{kind}", h) for kind in "qkv")
        keys = [rotate(chunk[layer].keys, place, grid) for place, chunk in before]
        keys.append(rotate(k, place, grid, some))
        values = [*(chunk[layer].values for _, chunk in before), v]
        y = attend(rotate(q, place, grid, some), torch.cat(keys), torch.cat(values))
        y = linear(f"{name}.self_attn.o", y)
        if pruned and pruned.scope == "attention":
            y = pruned.full[layer][0].index_copy(0, pruned.kept, y)
        seen.append(Seen(k, v))
        attended = y
        x = x + gate1 * y
        h = norm(x) * weights[f"{name}.norm3.weight"] + weights[f"{name}.norm3.bias"]
        k, v = (heads(f"{name}.cross_attn.{kind}", text) for kind in "kv")
        x = x + linear(f"{name}.cross_attn.o", attend(heads(f"{name}.cross_attn.q", h), k, v))
        h = linear(f"{name}.ffn.0", norm(x) * (1 + scale2) + shift2)
        y = linear(f"{name}.ffn.2", F.gelu(h, approximate="tanh"))
        if pruned and pruned.scope == "feedforward":
            dropped = torch.ones(len(y), dtype=torch.bool).index_fill(0, pruned.kept, False)
            y = torch.where(dropped[:, None], pruned.full[layer][1], y)
        outputs.append((attended, y))
        x = x + gate2 * y

    shift, scale = weights["head.modulation"][0] + time
    x = linear("head.head", norm(x) * (1 + scale) + shift)
    if pruned and pruned.scope == "block":
        whole = x.new_full((frames * grid[1] * grid[2], x.shape[1]), torch.nan)
        x = whole.index_copy(0, pruned.kept, x)
    x = x.unflatten(0, grid).unflatten(-1, (2, 2, -1))  # F rows columns 2 2 C
    return x.permute(0, 5, 1, 3, 2, 4).reshape(frames, -1, height, width), seen, outputs


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [Tq, N, D], k and v [Tk, N, D] -> [Tq, N * D]."""
    weights = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nqk,knd->qnd", weights.softmax(dim=-1), v).flatten(1)


def rotate(
    x: Tensor, place: int, grid: tuple[int, int, int], tokens: Tensor | slice = slice(None)
) -> Tensor:
    """x [T or K, N, D] of the chunk whose first latent is at `place`, turned as RoPE does."""
    half = x.shape[-1] // 2
    sizes = half - 2 * (half // 3), half // 3, half // 3
    places = torch.cartesian_prod(*(torch.arange(n).double() for n in grid)).view(-1, 3)
    places[:, 0] += place
    angles = [
        places[:, axis, None] * 10000 ** (-torch.arange(size).double() / size)
        for axis, size in enumerate(sizes)
    ]
    turns = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=1))[tokens][:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
