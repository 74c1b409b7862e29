"""The transformer's forward for one stream on a GPU: a few kernels of our own, matrix products, and
cuDNN's attention.

It computes what `Transformer.forward` computes with `Cached`, for a batch of one and one timestep.
Keys and values are written where the cache keeps them; sums, gates and norms share one pass.

T tokens of a chunk, K kept tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import ScalingType

from modeling.diffusion.attention import attention
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import Block, CrossAttention, SelfAttention, TextKV, Transformer
from modeling.gpu.kernels.heads import merge_attention, norm_rotate
from modeling.gpu.kernels.rows import FP8, Fp8, add_norm, gelu_fp8
from modeling.streaming.kv_cache import KVCache

# cuDNN's kernel is 1.8 times as fast as PyTorch's flash kernel on Hopper at a window's size.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_TILE = 128  # queries of one thread block of the attention kernel
# cuBLAS (13.0, on an H100) has no product of 8-bit rows with 8960 columns for 64 rows or fewer.
_FEWEST_FP8 = 128


@contextmanager
def fast_attention() -> Iterator[None]:
    with sdpa_kernel(_BACKENDS, set_priority=True):
        yield


class Fp8Linear:
    """A linear layer on 8-bit rows, with 8-bit weights that have one scale for each output."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        scales = weight.abs().amax(dim=1, keepdim=True).float() / torch.finfo(FP8).max
        self._weight = (weight.float() / scales).to(FP8).t()  # [K, N], K innermost as it must be
        self._scales = scales.t()  # [1, N]
        self._bias = bias

    def __call__(self, x: Fp8) -> Tensor:
        """[T, K] -> [T, N] in the type of the bias."""
        tokens = len(x.values)
        if tokens == 0:  # a mask may keep none
            return self._bias.new_empty(0, len(self._bias))
        if tokens < _FEWEST_FP8:
            x = x.rows(torch.arange(_FEWEST_FP8, device=x.values.device).clamp(max=tokens - 1))
        return F.scaled_mm(
            x.values,
            self._weight,
            x.scales,
            ScalingType.RowWise,
            self._scales,
            ScalingType.RowWise,
            bias=self._bias,
            output_dtype=self._bias.dtype,
            use_fast_accum=True,
        )[:tokens]


class FusedTransformer:
    """Forwards without gradient. Parameters of q, k and v become views of one matrix, unless the
    transformer is `trained`, whose parameters stay as they are; `renew` takes up their changes.

    `fp8` computes the linear layers whose inputs come out of one of our kernels (q, k, v, the
    cross-attention's q, the feed-forward) in 8 bits; the two attentions' outputs stay in bf16.
    """

    def __init__(
        self, transformer: Transformer, *, fp8: bool = False, trained: bool = False
    ) -> None:
        self._net = transformer
        self._trained = trained
        self._fp8: list[dict[str, Fp8Linear]] = []
        self._eps = transformer.config.eps
        self._attention = [block.self_attn for block in transformer.layers()]
        self.renew()
        if fp8:
            with torch.no_grad():
                layers = zip(transformer.layers(), self._qkv, strict=True)
                self._fp8 = [_eight_bits(block, qkv) for block, qkv in layers]

    @torch.no_grad()
    def renew(self) -> None:
        """Make what is made of the weights: at the beginning, and after each of their changes."""
        blocks = self._net.layers()
        self._modulation = torch.cat([block.modulation for block in blocks])  # [layers, 6, dim]
        self._qkv = [_joined(attn) for attn in self._attention]
        self._qk_norms = [
            torch.stack([attn.norm_q.weight, attn.norm_k.weight]) for attn in self._attention
        ]
        if not self._trained:
            for attn, joined in zip(self._attention, self._qkv, strict=True):
                _view(attn, *joined)

    def __call__(
        self,
        noisy: Tensor,
        source: Tensor | None,
        timestep: Tensor,
        text: TextKV,
        cache: KVCache,
        reuse: Reuse | None,
    ) -> Tensor:
        """Velocity [1, F, C, H, W]; the chunk's keys and values are left in `cache`.

        noisy, source [1, F, C, H, W]; timestep [1]. With a block-scope `reuse`, tokens that are not
        kept come back as zeros.
        """
        net = self._net
        latents = noisy if source is None else torch.cat([noisy, source.to(noisy)], dim=2)
        time = net.embed_time(timestep)  # [1, 1, dim]
        kept = None if reuse is None else reuse.tokens
        x = net.embed_patches(latents)[0]  # [T, dim]
        tokens = x.shape[0]
        if kept is not None and reuse is not None and reuse.scope == "block":
            if len(kept) == 0:
                return torch.zeros_like(noisy, dtype=x.dtype)
            x = x[kept]  # [K, dim]
        with fast_attention():
            x, y, gate = self._blocks(x, time, text, cache, reuse)
        shift, scale = (net.head.modulation + time[:, :, None])[0, 0]
        _, h = add_norm(x, y, gate, scale, shift, modulated=True, eps=self._eps)
        assert isinstance(h, Tensor)
        out = net.head.head(h)  # [T or K, 4 * C]
        if len(out) < tokens:
            out = out.new_zeros(tokens, out.shape[1]).index_copy(0, kept, out)
        return net.unpatch(out[None], latents.shape[1], *cache.grid)

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV, cache: KVCache) -> None:
        """Leave the clean chunk's keys and values in `cache`; nothing else is computed."""
        timestep = edited.new_zeros(1)
        latents = torch.cat([edited, source.to(edited)], dim=2)
        x = self._net.embed_patches(latents)[0]
        with fast_attention():
            self._blocks(x, self._net.embed_time(timestep), text, cache, None, keys_only=True)

    def _blocks(
        self,
        x: Tensor,
        time: Tensor,
        text: TextKV,
        cache: KVCache,
        reuse: Reuse | None,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers; the result is x + gate * y, with the sum left to whoever needs it next."""
        modulation = self._modulation + self._net.time_projection(time).view(1, 6, -1)
        kept = None if reuse is None else reuse.tokens
        scope = None if reuse is None else reuse.scope
        attending = None if reuse is None else reuse.attending
        y: Tensor | None = None
        gate: Tensor | None = None
        norms = partial(add_norm, eps=self._eps, fp8=bool(self._fp8))
        for layer, block in enumerate(self._net.layers()):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation[layer]
            x, h = norms(x, y, gate, scale1, shift1, modulated=True)
            if kept is not None and scope == "attention":
                h = h.rows(kept) if isinstance(h, Fp8) else h[kept]
            q, keys, values = self._project(layer, h, attending, cache)
            if keys_only and layer == len(self._modulation) - 1:
                return x, x, gate2  # what is left to compute is for the output only
            attn = block.self_attn
            y = attn.o(attend(q, keys, values).flatten(1))
            if reuse is not None and scope == "attention":
                y = reuse.exchange(layer, y[None])[0]
            norm = block.norm3
            x, h = norms(x, y, gate1, norm.weight, norm.bias, modulated=False)
            y = self._cross(layer, block.cross_attn, h, text)
            x, h = norms(x, y, None, scale2, shift2, modulated=True)
            if kept is not None and scope == "feedforward":
                h = h.rows(kept) if isinstance(h, Fp8) else h[kept]
            y, gate = self._feed_forward(layer, block.ffn, h), gate2
            if reuse is not None and scope == "feedforward":
                y = reuse.exchange(layer, y[None])[0]
        assert y is not None
        assert gate is not None
        return x, y, gate

    def _cross(self, layer: int, cross: CrossAttention, h: Tensor | Fp8, text: TextKV) -> Tensor:
        """Attention of h [T, dim] to the text -> [T, dim]."""
        q = self._fp8[layer]["cross_q"](h) if isinstance(h, Fp8) else cross.q(h)
        q = F.rms_norm(q, cross.norm_q.weight.shape, cross.norm_q.weight, cross.norm_q.eps)
        y = attention(cross.heads(q)[None], text.k[layer], text.v[layer])
        out: Tensor = cross.o(y[0].flatten(1))
        return out

    def _feed_forward(self, layer: int, ffn: nn.Module, x: Tensor | Fp8) -> Tensor:
        """Linear, GELU, linear of [T, dim]; in bf16 with the GELU inside the first product."""
        if isinstance(x, Fp8):
            return self._fp8[layer]["ffn_out"](gelu_fp8(self._fp8[layer]["ffn_in"](x)))
        assert isinstance(ffn, nn.Sequential)
        first, _, last = ffn
        assert isinstance(first, nn.Linear)
        hidden = torch.ops.aten._addmm_activation(first.bias, x, first.weight.t(), use_gelu=True)
        out: Tensor = last(hidden)
        return out

    def _project(
        self, layer: int, h: Tensor | Fp8, kept: Tensor | None, cache: KVCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T or K, N, D], and all keys and values that they may see."""
        joined = self._qkv[layer]
        qkv = self._fp8[layer]["qkv"](h) if isinstance(h, Fp8) else F.linear(h, *joined)
        keys, values = cache.k[layer, 0], cache.v[layer, 0]  # [window, N, D]
        start, end = cache.start, cache.start + len(qkv)
        q = norm_rotate(
            qkv, self._qk_norms[layer], cache.rope, kept, keys[start:], values[start:], self._eps
        )
        return self._attention[layer].heads(q), keys[:end], values[:end]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [T, N, D] to k and v [S, N, D] -> [T, N, D].

    Thread blocks take a tile of queries of one head each. If the last round of them leaves much of
    the GPU idle, the keys are attended to in two halves, whose rounds are half as long.
    """
    if len(q) == 0:  # a policy may keep no token at all
        return q
    if splits(q, k) == 1:
        return attention(q[None], k[None], v[None])[0]
    half = len(k) // 2
    halves = [x.view(2, half, *x.shape[1:]).transpose(1, 2) for x in (k, v)]
    queries = q.expand(2, -1, -1, -1).transpose(1, 2)  # [2, N, T, D]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, *halves, None, True, 0.0, False, False
    )
    parts = out.transpose(1, 2).contiguous()
    return merge_attention(parts, lse.view(2, q.shape[1], len(q)).float().contiguous())


def splits(q: Tensor, k: Tensor) -> int:
    """In how many parts the keys are best attended to: 1 or 2."""
    if len(k) % 2 or len(k) < 4096 or not q.is_cuda:
        return 1
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tiles = -(-len(q) // _TILE) * q.shape[1]
    whole, halved = -(-tiles // processors), -(-2 * tiles // processors) / 2
    return 2 if halved < 0.95 * whole else 1


def _joined(attn: SelfAttention) -> tuple[Tensor, Tensor]:
    """Weight [3 * dim, dim] and bias of q, k and v."""
    parts = (attn.q, attn.k, attn.v)
    return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])


def _view(attn: SelfAttention, weight: Tensor, bias: Tensor) -> None:
    """Let the parameters of q, k and v be views of what `_joined` made of them."""
    parts = (attn.q, attn.k, attn.v)
    for part, w, b in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
        part.weight = nn.Parameter(w, requires_grad=False)
        part.bias = nn.Parameter(b, requires_grad=False)


def _eight_bits(block: Block, qkv: tuple[Tensor, Tensor]) -> dict[str, Fp8Linear]:
    first, _, last = block.ffn
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    cross_q = block.cross_attn.q
    return {
        "qkv": Fp8Linear(*qkv),
        "cross_q": Fp8Linear(cross_q.weight, cross_q.bias),
        "ffn_in": Fp8Linear(first.weight, first.bias),
        "ffn_out": Fp8Linear(last.weight, last.bias),
    }
