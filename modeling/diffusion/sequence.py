"""One clip on several ranks: sequence parallel by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509).

Every rank of a group is given the same clip, holds the weights as its engine does, and computes a
share of the tokens: the same stretch of every latent, so that timesteps, positions and norms are as
in the whole clip. Around self-attention ranks exchange: each then has all tokens of a share of the
heads, and sees with them what any visibility shows. Text and cross-attention are not shared.

A rank's gradients are of its own tokens, times the size of the group, so that their mean over all
ranks, which is what DeepSpeed makes, is the gradient of one rank with the whole clip.

B batch, T tokens of all ranks, O own tokens, N heads, D head size, n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import Function

from infra.runtime.errors import UserError
from modeling.config import TransformerConfig
from modeling.diffusion.attention import Visibility
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import Rope


@dataclass(frozen=True, eq=False)
class Sequence:
    """This rank's place among those that share every clip."""

    group: distributed.ProcessGroup
    rank: int
    size: int

    def heads_of(self, config: TransformerConfig) -> TransformerConfig:
        """The sizes of the attention that one rank sees: as many heads as it computes."""
        if config.num_heads % self.size:
            raise UserError(
                f"compute.sequence_parallel={self.size} does not divide the {config.num_heads} "
                "heads of the transformer; use a number that does"
            )
        heads = config.num_heads // self.size
        return replace(config, dim=heads * config.head_dim, num_heads=heads)

    def own_heads(self, x: Tensor) -> Tensor:
        """Of [..., N, D] of all heads the [..., N / n, D] that this rank attends with."""
        return x.unflatten(-2, (self.size, -1)).select(-3, self.rank)

    def same(self, x: Tensor) -> Tensor:
        """What the group's first rank has, on all of it: each computed it alone, and a bit that is
        another may keep another token."""
        x = x.contiguous()
        distributed.broadcast(x, group=self.group, group_src=0)
        return x

    def share(self, visible: Visibility, frames: int, latent_tokens: int) -> Shared:
        """`visible` as this rank takes part in it, in a forward over `frames` latents."""
        if latent_tokens % self.size:
            raise UserError(
                f"compute.sequence_parallel={self.size} does not divide the {latent_tokens} tokens "
                "of a latent (16x16 pixels each); use a number that does, or another video size"
            )
        return Shared(visible, self, frames, latent_tokens)


class TokenSplit:
    """Which of `tokens` tokens each rank has: `places`, n tensors of indices [O], rising."""

    def __init__(self, sequence: Sequence, tokens: int, places: list[Tensor]) -> None:
        self.sequence, self.tokens = sequence, tokens
        self.own = places[sequence.rank]
        self.most = max(len(place) for place in places)
        # Tensors travel padded to `most` tokens of every rank: where each token then lies ...
        self.back = torch.empty(tokens, dtype=torch.long, device=self.own.device)
        # ... and which token lies at each place; padding repeats token 0, and nobody reads it.
        self.forth = self.own.new_zeros(sequence.size * self.most)
        for rank, place in enumerate(places):
            at = rank * self.most + torch.arange(len(place), device=place.device)
            self.back[place] = at
            self.forth[at] = place

    def whole(self, x: Tensor) -> Tensor:
        """[B, O, C] of every rank -> [B, T, C] on all."""
        whole: Tensor = _Whole.apply(self, x)
        return whole


@lru_cache(maxsize=32)
def by_latents(
    sequence: Sequence, frames: int, latent_tokens: int, device: torch.device
) -> TokenSplit:
    """The same stretch of every latent for one rank."""
    with torch.inference_mode(False):
        tokens = torch.arange(frames * latent_tokens, device=device)
        parts = tokens.view(frames, sequence.size, -1).unbind(1)
        return TokenSplit(sequence, len(tokens), [part.flatten() for part in parts])


class Shared:
    """A visibility of the whole clip, seen by a rank that has some of its tokens.

    `split` is of the tokens that the transformer computes, `reuse` of this rank's among them.
    """

    def __init__(
        self, whole: Visibility, sequence: Sequence, frames: int, latent_tokens: int
    ) -> None:
        self.whole, self.sequence = whole, sequence
        self.frames, self.latent_tokens = frames, latent_tokens
        self.reuse: Reuse | None = None

    def begin(
        self, frames: int, height: int, width: int, head_dim: int, device: torch.device
    ) -> Rope:
        rope = self.whole.begin(frames, height, width, head_dim, device)
        self.split = by_latents(self.sequence, self.frames, self.latent_tokens, device)
        self.attending = self.split
        reuse = self.whole.reuse
        if reuse is not None and reuse.scope != "block":
            own = self.split.own
            local = None
            if reuse.tokens is not None:
                kept, local = self._kept(reuse.tokens)
                if reuse.attending is not None:
                    self.attending = kept
            self.reuse = _OwnReuse(reuse, own, local)
        elif reuse is not None and reuse.tokens is not None:
            indices = torch.arange(len(reuse.tokens), device=device)
            self.split = TokenSplit(
                self.sequence, len(indices), list(indices.tensor_split(self.sequence.size))
            )
            self.attending, self.reuse = self.split, reuse
        return rope.select(self.attending.own)

    def _kept(self, tokens: Tensor) -> tuple[TokenSplit, Tensor]:
        """How the kept `tokens` are split by who has them, and where they are among the own."""
        owner = tokens % self.latent_tokens // (self.latent_tokens // self.sequence.size)
        places = [(owner == rank).nonzero().squeeze(1) for rank in range(self.sequence.size)]
        split = TokenSplit(self.sequence, len(tokens), places)
        return split, torch.searchsorted(self.split.own, tokens[split.own])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, O, N, D] -> [B, O, N, D]."""
        wholes: tuple[Tensor, ...] = _ToHeads.apply(self.attending, q, k, v)
        own: Tensor = _ToTokens.apply(self.attending, self.whole.attend(layer, *wholes))
        return own


class _OwnReuse(Reuse):
    """What one rank recomputes of its own tokens; outputs lie where the whole clip's do."""

    def __init__(self, whole: Reuse, own: Tensor, tokens: Tensor | None) -> None:
        super().__init__(whole.scope, whole.outputs, tokens, fixed_size=whole.fixed_size)
        self.whole, self.own = whole, own

    def exchange(self, layer: int, output: Tensor) -> Tensor:
        if self.tokens is None:
            self.outputs[layer].index_copy_(1, self.own, output)
            return output
        return self.whole.stored(layer)[:, self.own].index_copy(1, self.tokens, output)


class _ToHeads(Function):
    """[B, O, N, D] of every rank -> [B, T, N / n, D], of several tensors at once."""

    @staticmethod
    def forward(ctx: Any, split: TokenSplit, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.split = split
        return _to_heads(split, xs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_to_tokens(ctx.split, gradients)


class _ToTokens(Function):
    """[B, T, N / n, D] of every rank -> [B, O, N, D]."""

    @staticmethod
    def forward(ctx: Any, split: TokenSplit, y: Tensor) -> Tensor:
        ctx.split = split
        return _to_tokens(split, (y,))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _to_heads(ctx.split, (gradient,))[0]


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, split: TokenSplit, x: Tensor) -> Tensor:
        ctx.split = split
        sequence = split.sequence
        batch, own, channels = x.shape
        padded = x.new_zeros(batch, split.most, channels)
        padded[:, :own] = x
        parts = [torch.empty_like(padded) for _ in range(sequence.size)]
        distributed.all_gather(parts, padded, group=sequence.group)
        return torch.cat(parts, dim=1).index_select(1, split.back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        # All ranks work out the same loss of the whole: the sum of what they say of our part.
        split = ctx.split
        return None, gradient.index_select(1, split.own) * split.sequence.size


def _to_heads(split: TokenSplit, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    sequence, (batch, own, heads, size) = split.sequence, xs[0].shape
    ranks = sequence.size
    sent = xs[0].new_empty(ranks, len(xs), batch, split.most, heads // ranks, size)
    for number, x in enumerate(xs):
        sent[:, number, :, :own] = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)
    got = torch.empty_like(sent)
    distributed.all_to_all_single(got, sent, group=sequence.group)
    tokens = got.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)  # [x, B, n * most, N / n, D]
    return tokens.index_select(2, split.back).unbind(0)


def _to_tokens(split: TokenSplit, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    sequence, (batch, _, heads, size) = split.sequence, ys[0].shape
    ranks = sequence.size
    sent = ys[0].new_empty(ranks, len(ys), batch, split.most, heads, size)
    for number, y in enumerate(ys):
        tokens = y.index_select(1, split.forth).unflatten(1, (ranks, -1))
        sent[:, number] = tokens.permute(1, 0, 2, 3, 4)
    got = torch.empty_like(sent)
    distributed.all_to_all_single(got, sent, group=sequence.group)
    whole = got.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)  # [y, B, most, N, D]
    return whole[:, :, : len(split.own)].unbind(0)
