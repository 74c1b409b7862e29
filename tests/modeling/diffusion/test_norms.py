"""The transformer's norms by hand, with an epsilon that shows."""

from __future__ import annotations

import torch

from modeling.diffusion.transformer import LayerNorm, RMSNorm

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
