"""The transformer's norms by hand, with an epsilon that shows."""

from __future__ import annotations

import torch

from modeling.config import TransformerConfig
from modeling.diffusion.transformer import LayerNorm, RMSNorm, Transformer

X = torch.tensor([[3.0, -4.0, 0.0, 5.0]])


def test_root_mean_square() -> None:
    norm = RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, -1.0])
    wanted = torch.tensor([[3.0, -8.0, 0.0, -5.0]]) / (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(norm(X), wanted)
    assert norm(X.bfloat16()).dtype == torch.bfloat16


def test_layer() -> None:
    wanted = (X - 1) / (11.5 + 0.5) ** 0.5
    torch.testing.assert_close(LayerNorm(4, 0.5, affine=False)(X), wanted)
    norm = LayerNorm(4, 0.5, affine=True)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.ones(4)
    torch.testing.assert_close(norm(X.bfloat16()), wanted * norm.weight + 1)


def test_every_norm_of_a_model_has_its_epsilon_and_weights_where_wan_has_them() -> None:
    config = TransformerConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4,
        eps=0.25,
    )  # fmt: skip
    found = {
        name: (type(m), m.eps, m.weight is not None)
        for name, m in Transformer(config).named_modules()
        if isinstance(m, LayerNorm | RMSNorm)
    }
    wanted: dict[str, tuple[type, float, bool]] = {"head.norm": (LayerNorm, 0.25, False)}
    for block in ("blocks.0", "blocks.1"):
        for name, affine in (("norm1", False), ("norm2", False), ("norm3", True)):
            wanted[f"{block}.{name}"] = (LayerNorm, 0.25, affine)
        for attention in ("self_attn", "cross_attn"):
            for part in "qk":
                wanted[f"{block}.{attention}.norm_{part}"] = (RMSNorm, 0.25, True)
    assert found == wanted
