"""The transformer's blocks in training on a GPU: the plain block's function on fewer passes over
memory, forward and backward.

Matrix products and attention are the plain block's own modules, so DeepSpeed's hooks see them.
"""

from __future__ import annotations

from types import MethodType

from torch import Tensor

from modeling.diffusion.attention import Visibility, attention
from modeling.diffusion.rope import Rope
from modeling.diffusion.transformer import Block, Transformer, Words, add_gated
from modeling.gpu.kernels.training import add_norm, norm_rotate


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
    if reuse is not None and reuse.scope != "block":  # two kinds of tokens in one block
        return Block.forward(block, x, modulation, text, visible, layer, rope)
    batch, tokens, dim = x.shape
    modulations = (block.modulation + modulation).unbind(2)  # each [B, F or 1, dim]
    shift1, scale1, gate1, shift2, scale2, gate2 = (m.reshape(-1, dim) for m in modulations)
    eps = block.norm1.eps
    own, cross, norm = block.self_attn, block.cross_attn, block.norm3
    rows = x.reshape(-1, dim)  # [B * T, dim]
    rows, h = add_norm(rows, None, None, scale1, shift1, modulated=True, eps=eps)
    q = norm_rotate(own.q(h), own.norm_q.weight, rope, own.norm_q.eps).view(batch, tokens, dim)
    k = norm_rotate(own.k(h), own.norm_k.weight, rope, own.norm_k.eps).view(batch, tokens, dim)
    v = own.v(h).view(batch, tokens, dim)
    y = visible.attend(layer, own.heads(q), own.heads(k), own.heads(v))
    y = own.o(y.reshape(-1, dim))
    rows, h = add_norm(
        rows, y, gate1, norm.weight[None], norm.bias[None], modulated=False, eps=norm.eps
    )
    q = norm_rotate(cross.q(h), cross.norm_q.weight, None, cross.norm_q.eps)
    y = attention(cross.heads(q.view(batch, tokens, dim)), *cross.keys_values(text))
    y = cross.o(y.reshape(-1, dim))
    rows, h = add_norm(rows, y, None, scale2, shift2, modulated=True, eps=eps)
    y = block.ffn(h)
    return add_gated(rows.view_as(x), y.view_as(x), gate2.view(batch, -1, dim))
