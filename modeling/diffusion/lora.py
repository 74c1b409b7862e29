"""Low-rank adaptation (LoRA, arXiv 2106.09685): a linear layer's weights stay, and the product of
two thin matrices beside them is trained.

The layers keep their names, so whatever reads or writes a transformer's weights finds them, and
`merged` gives a transformer like any other. The patch embedding is trained whole: its source
channels start at zero in a model that was no editor, and no adapter behind them could see a source.

r rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.runtime.errors import UserError

WHOLE = "patch_embedding."  # trained as it is
_DOWN, _UP = "lora_down", "lora_up"


class LowRankLinear(nn.Linear):
    """A linear layer and `scale` times its low-rank change, which begins at nothing."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = scale
        self.lora_down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))  # [r, I]
        self.lora_up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))  # [O, r]
        if not layer.weight.is_meta:
            nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.lora_down), self.lora_up)
        return F.linear(x, self.weight, self.bias) + self.scale * change


def adapt(network: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put an adapter of `rank`, scaled by alpha / rank, beside each linear layer whose name ends in
    one of `targets`, and let these alone, and the patch embedding, be trained.

    UserError for a target that is no linear layer's.
    """
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not isinstance(layer, LowRankLinear)
    }
    chosen = {t: [n for n in layers if n == t or n.endswith(f".{t}")] for t in targets}
    if unknown := [target for target, names in chosen.items() if not names]:
        endings = sorted({name.split(".", 2)[-1] for name in layers})
        raise UserError(
            f"lora_targets {', '.join(unknown)} name no linear layer; its names end in "
            f"{', '.join(endings)}"
        )
    for name in dict.fromkeys(name for names in chosen.values() for name in names):
        parent, _, child = name.rpartition(".")
        setattr(
            network.get_submodule(parent), child, LowRankLinear(layers[name], rank, alpha / rank)
        )
    for name, parameter in network.named_parameters():
        ours = name.endswith((_DOWN, _UP)) or name.startswith(WHOLE)
        parameter.requires_grad_(ours)


def merged(
    weights: Mapping[str, Tensor], trained: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """A transformer's `weights` with what was `trained` beside or instead of them, in float32."""
    result = {name: value.float() for name, value in weights.items()}
    for name, value in trained.items():
        layer, _, part = name.rpartition(".")
        if part == _UP:
            down = trained[f"{layer}.{_DOWN}"]
            result[f"{layer}.weight"] = result[f"{layer}.weight"] + scale * (value @ down)
        elif part != _DOWN:
            result[name] = value
    return result
