"""The Wan2.1 video transformer, with source channels beside the noisy ones.

Parameter names are those of the public Wan checkpoints. What a token may see is a value handed in
(`modeling.diffusion.attention`, `modeling.streaming.kv_cache.Cached`), so all three training
stages and streaming share this one class.

B batch, F latents, C channels, H x W latent size, S = H/2 * W/2 tokens of a latent, T = F * S,
L text tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from modeling.config import TransformerConfig
from modeling.diffusion.attention import Visibility, attention
from modeling.diffusion.recompute import KeptLinear, keeping
from modeling.diffusion.rope import Rope, rotate
from modeling.diffusion.sequence import Sequence


class TextKV(NamedTuple):
    """Cross-attention keys and values of every layer, each [layers, B, L, N, D]."""

    k: Tensor
    v: Tensor


# A layer's keys and values, each [B, L, N, D], or the embedded text [B, L, dim] to make them of.
Words = Tensor | tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Predicts the velocity noise - x0 of noisy latents from source latents and text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # blocks are computed again in the backward pass,
        self.recompute_attention = True  # all of them, or without what `recompute` keeps,
        self.keep_products = 0  # which is more in so many of them
        self.sequence: Sequence | None = None  # the ranks that share every clip's tokens
        dim = config.dim
        channels = config.latent_channels + config.source_channels
        self.patch_embedding = nn.Conv3d(channels, dim, (1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._initialise()

    def forward(
        self,
        noisy: Tensor,
        source: Tensor | None,
        timestep: Tensor,
        text: Tensor | TextKV,
        visible: Visibility,
    ) -> Tensor:
        """Velocity [B, F, C, H, W].

        noisy, source: [B, F, C, H, W] (source None only if the config has no source channels).
        timestep: [B], or [B, F] for one a latent, on the 0..1000 scale.
        text: embeddings [B, L, text_dim] or what `prepare_text` made of them.
        With a block-scope `visible.reuse`, tokens that are not kept come back as zeros.
        Ranks that share a `sequence` are all given the same, and all get the whole.
        """
        latents = noisy if source is None else torch.cat([noisy, source.to(noisy)], dim=2)
        batch, frames, channels, height, width = latents.shape
        if channels != self.patch_embedding.in_channels:
            raise ValueError(
                f"the transformer takes {self.patch_embedding.in_channels} channels (noisy and "
                f"source), got {channels}"
            )
        if height % 2 or width % 2:
            raise ValueError(f"latent size {height}x{width} must be even; pad the video to 16s")
        grid = (height // 2, width // 2)
        reuse = visible.reuse
        kept = reuse.tokens if reuse is not None and reuse.scope == "block" else None
        shared = None
        if self.sequence is not None:
            visible = shared = self.sequence.share(visible, frames, grid[0] * grid[1])
        rope = visible.begin(frames, *grid, self.config.head_dim, latents.device)
        # Keys and values of embeddings are made in the blocks: ZeRO-3 gathers a block's weights
        # for its own forward alone.
        kv = text if isinstance(text, TextKV) else None
        context = self.embed_text(text) if isinstance(text, Tensor) else None

        x = self.embed_patches(latents)  # [B, T, dim]
        time = self.embed_time(timestep)  # [B, F or 1, dim]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B, F or 1, 6, dim]
        if kept is not None:
            x = x[:, kept]  # [B, K, dim]
        if shared is not None:
            x = x[:, shared.split.own]
        for layer, block in enumerate(self.blocks):
            words = context if kv is None else (kv.k[layer], kv.v[layer])
            args = (x, modulation, words, visible, layer, rope)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                keeps = partial(keeping, layer < self.keep_products)
                keep = noop_context_fn if self.recompute_attention else keeps
                x = checkpoint(block, *args, use_reentrant=False, context_fn=keep)
            else:
                x = block(*args)
        x = self.head(x, time)  # [B, T, 4 * C]
        if shared is not None:
            x = shared.split.whole(x)
        if kept is not None:
            tokens = frames * grid[0] * grid[1]
            x = x.new_zeros(batch, tokens, x.shape[-1]).index_copy(1, kept, x)
        return self.unpatch(x, frames, *grid)

    def prepare_text(self, text: Tensor) -> TextKV:
        """Cross-attention keys and values of embeddings [B, L <= text_tokens, text_dim]."""
        context = self.embed_text(text)
        pairs = [block.cross_attn.keys_values(context) for block in self.layers()]
        return TextKV(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]))

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, L <= text_tokens, text_dim] -> [B, text_tokens, dim]."""
        config = self.config
        if (
            text.dim() != 3
            or text.shape[2] != config.text_dim
            or text.shape[1] > config.text_tokens
        ):
            raise ValueError(
                f"text embeddings of shape {tuple(text.shape)} do not fit [batch, up to "
                f"{config.text_tokens}, {config.text_dim}]"
            )
        text = F.pad(text, (0, 0, 0, config.text_tokens - text.shape[1]))
        embedded: Tensor = self.text_embedding(text.to(self.dtype))
        return embedded

    def layers(self) -> Iterator[Block]:
        """`blocks`, typed."""
        return (cast(Block, block) for block in self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed_patches(self, latents: Tensor) -> Tensor:
        """[B, F, channels, H, W] -> [B, T, dim]."""
        b, f, c, h, w = latents.shape
        patches = latents.to(self.dtype).view(b, f, c, h // 2, 2, w // 2, 2)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f * h * w // 4, c * 4)
        weight = self.patch_embedding.weight.flatten(1)  # a strided convolution is a matrix product
        return F.linear(patches, weight, self.patch_embedding.bias)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """[B] or [B, F] -> [B, 1 or F, dim]."""
        if timestep.dim() == 1:
            timestep = timestep[:, None]
        half = self.config.freq_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
        angles = timestep.double()[..., None] * 10000.0**-exponent
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.time_embedding(features.to(self.dtype))

    def unpatch(self, x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """[B, T, 2 * 2 * C] -> [B, F, C, H, W]."""
        x = x.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
        x = x.permute(0, 1, 6, 2, 4, 3, 5)  # B F C rows 2 columns 2
        return x.flatten(5, 6).flatten(3, 4)

    def _initialise(self) -> None:
        """Wan's initialisation; the source channels start at zero, so the source is ignored."""
        if self.patch_embedding.weight.is_meta:
            return  # weights will be loaded; drawing here would import torch's compiler (1.5 s)
        for module in self.modules():
            if isinstance(module, Block | Head):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            noisy = self.patch_embedding.weight[:, : self.config.latent_channels]
            fresh = nn.init.xavier_uniform_(torch.empty(noisy.shape[0], noisy[0].numel()))
            self.patch_embedding.weight.zero_()
            noisy.copy_(fresh.view_as(noisy))
            nn.init.zeros_(cast(Tensor, self.patch_embedding.bias))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by each frame's timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = LayerNorm(dim, eps, affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(dim, eps, affine=True)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(dim, eps, affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU("tanh"),
            KeptLinear(config.ffn_dim, dim, always=True),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Words,
        visible: Visibility,
        layer: int,
        rope: Rope,
    ) -> Tensor:
        """x [B, T, dim], modulation [B, F or 1, 6, dim] -> x."""
        reuse = visible.reuse
        scope = None if reuse is None else reuse.scope
        kept = None if reuse is None or scope == "block" else reuse.tokens
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(2)
        h = modulate(self.norm1(x), shift1, scale1)
        if kept is not None and scope == "attention":
            h = h[:, kept]
        q, k, v = self.self_attn.project(h)
        y = visible.attend(layer, rotate(q, rope), rotate(k, rope), v)
        y = self.self_attn.o(y.flatten(2))
        if reuse is not None and scope == "attention":
            y = reuse.exchange(layer, y)
        x = add_gated(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x).to(x.dtype), text)
        h = modulate(self.norm2(x), shift2, scale2)
        if kept is not None and scope == "feedforward":
            h = h[:, kept]
        y = self.ffn(h)
        if reuse is not None and scope == "feedforward":
            y = reuse.exchange(layer, y)
        return add_gated(x, y, gate2)


class AttentionWeights(nn.Module):
    """Projections of one attention; q and k are normalised over all heads together."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q = KeptLinear(dim, dim)
        self.k = KeptLinear(dim, dim)
        self.v = KeptLinear(dim, dim)
        self.o = KeptLinear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, T, N, D]


class SelfAttention(AttentionWeights):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, dim] -> q, k and v [B, T, N, D], not rotated yet."""
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        return self.heads(q), self.heads(k), self.heads(self.v(x))


class CrossAttention(AttentionWeights):
    """Attention to the text, without positions."""

    def forward(self, x: Tensor, text: Words) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        q = self.heads(self.norm_q(self.q(x)))
        return self.o(attention(q, *self.keys_values(text)).flatten(2))

    def keys_values(self, text: Words) -> tuple[Tensor, Tensor]:
        """Each [B, L, N, D]."""
        if isinstance(text, tuple):
            return text
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, affine=False)
        self.head = nn.Linear(config.dim, 4 * config.latent_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, T, dim], time [B, F or 1, dim] -> [B, T, 4 * C]."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 whatever the input's type."""

    def __init__(self, dim: int, eps: float, affine: bool) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with float32 statistics."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift in the type of shift; x [B, T, dim] in float32 (a norm's output),
    shift and scale [B, F or 1, dim].
    """
    frames = x.unflatten(1, (shift.shape[1], -1))
    modulated = frames * (1 + scale.float()[:, :, None]) + shift.float()[:, :, None]
    return modulated.flatten(1, 2).to(shift.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate, rounded once; x and y [B, T, dim], gate [B, F or 1, dim]."""
    x, y = (a.unflatten(1, (gate.shape[1], -1)) for a in (x, y))
    return torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)
