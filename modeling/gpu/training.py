"""The transformer's blocks in training on a GPU: the plain block's function on fewer passes over
memory, forward and backward.

Matrix products and attention are the plain block's own modules, so DeepSpeed's hooks see them.
"""

from __future__ import annotations

from types import MethodType

from torch import Tensor

from modeling.diffusion.attention import Visibility, attention
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import Rope
from modeling.diffusion.transformer import Block, TextKV, Transformer, Words, add_gated
from modeling.gpu.kernels.heads import turn
from modeling.gpu.kernels.training import add_norm, norm_rotate
from modeling.gpu.transformer import FusedTransformer
from modeling.streaming.forward import StreamForward
from modeling.streaming.kv_cache import KVCache


def fuse_blocks(transformer: Transformer) -> None:
    """Run `transformer`'s blocks on our kernels from now on, with gradient or without.

    Parameters, their names and the modules that hold them stay as they are.
    """
    for block in transformer.layers():
        block.forward = MethodType(_forward, block)  # type: ignore[method-assign]


def _forward(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    text: Words,
    visible: Visibility,
    layer: int,
    rope: Rope,
) -> Tensor:
    """`Block.forward`; x [B, T, dim], modulation [B, F or 1, 6, dim]."""
    reuse = visible.reuse
    scope = None if reuse is None else reuse.scope
    kept = None if reuse is None or scope == "block" else reuse.tokens
    batch, tokens, dim = x.shape
    modulations = (block.modulation + modulation).unbind(2)  # each [B, F or 1, dim]
    shift1, scale1, gate1, shift2, scale2, gate2 = (m.reshape(-1, dim) for m in modulations)
    eps = block.norm1.eps
    own, cross, norm = block.self_attn, block.cross_attn, block.norm3
    rows = x.reshape(-1, dim)  # [B * T, dim]
    rows, h = add_norm(rows, None, None, scale1, shift1, modulated=True, eps=eps)
    if kept is not None and scope == "attention":
        h = h.view(batch, tokens, dim)[:, kept].reshape(-1, dim)
    q = norm_rotate(own.q(h), own.norm_q.weight, rope, own.norm_q.eps).view(batch, -1, dim)
    k = norm_rotate(own.k(h), own.norm_k.weight, rope, own.norm_k.eps).view(batch, -1, dim)
    v = own.v(h).view(batch, -1, dim)
    y = visible.attend(layer, own.heads(q), own.heads(k), own.heads(v))
    y = own.o(y.reshape(-1, dim))
    if reuse is not None and scope == "attention":
        y = reuse.exchange(layer, y.view(batch, -1, dim)).reshape(-1, dim)
    rows, h = add_norm(
        rows, y, gate1, norm.weight[None], norm.bias[None], modulated=False, eps=norm.eps
    )
    q = norm_rotate(cross.q(h), cross.norm_q.weight, None, cross.norm_q.eps)
    y = attention(cross.heads(q.view(batch, tokens, dim)), *cross.keys_values(text))
    y = cross.o(y.reshape(-1, dim))
    rows, h = add_norm(rows, y, None, scale2, shift2, modulated=True, eps=eps)
    if kept is not None and scope == "feedforward":
        h = h.view(batch, tokens, dim)[:, kept].reshape(-1, dim)
    y = block.ffn(h).view(batch, -1, dim)
    if reuse is not None and scope == "feedforward":
        y = reuse.exchange(layer, y)
    return add_gated(rows.view_as(x), y, gate2.view(batch, -1, dim))


class RolloutForward:
    """`streaming.forward.ForwardOn` of a network that is trained: rollouts without gradient, on the
    kernels that streams run on. Call `renew` after each of its updates.

    No CUDA graphs, which would have to be captured for every rollout.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._network = FusedTransformer(transformer, trained=True)

    def renew(self) -> None:
        self._network.renew()

    def __call__(self, cache: KVCache) -> StreamForward:
        return _Forward(self._network, cache)


class _Forward:
    """`StreamForward` of one rollout."""

    def __init__(self, network: FusedTransformer, cache: KVCache) -> None:
        self._network, self._cache = network, cache
        cache.turn = turn

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        return self._network(noisy, source, timestep, text, self._cache, reuse)

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self._network.refresh(edited, source, text, self._cache)
        self._cache.commit()
