"""Adapters beside linear layers: nothing at the start, merged without a trace at the end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from infra.runtime.errors import UserError
from modeling.config import TransformerConfig
from modeling.diffusion.attention import bidirectional
from modeling.diffusion.lora import adapt, merged
from modeling.diffusion.transformer import Transformer
from pipelines.config.stages import FoundationStage
from tests.modeling.networks import random_transformer

CONFIG = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4,
    latent_channels=4, source_channels=4,
)  # fmt: skip
RANK, ALPHA = 3, 6.0


def network() -> Transformer:
    return random_transformer(CONFIG, std=0.2)


def answer(net: Transformer) -> Tensor:
    latents = torch.randn(2, 3, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    text = torch.ones(2, 4, 8)
    out: Tensor = net(
        latents, latents.flip(1), torch.tensor([900.0, 100.0]), text, bidirectional(3)
    )
    return out


def test_what_was_trained_is_merged_into_a_transformer_like_any_other() -> None:
    start = network()
    net = copy.deepcopy(start)
    adapt(net, RANK, ALPHA, FoundationStage().lora_targets)
    assert torch.equal(answer(net), answer(start))  # nothing yet
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    layers = {name.rpartition(".")[0] for name in trained if "lora" in name}
    ends = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"]
    ends += ["ffn.0", "ffn.2"]
    assert layers == {f"blocks.{block}.{end}" for block in (0, 1) for end in ends}
    others = {name for name in trained if "lora" not in name}
    assert others == {"patch_embedding.weight", "patch_embedding.bias"}
    begun = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        answer(net).square().mean().backward()
        optimizer.step()
    # Both sides of all learn, but where it is asked which of a text's words: here they are alike.
    still = {name for name, p in trained.items() if torch.equal(p, begun[name])}
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in still} <= {
        "cross_attn.q", "cross_attn.k",
    }  # fmt: skip
    for name, value in start.state_dict().items():
        assert torch.equal(net.state_dict()[name], value) is (name not in others), name
    whole = network()
    values = {name: p.detach() for name, p in trained.items()}
    whole.load_state_dict(merged(start.state_dict(), values, ALPHA / RANK))
    assert (answer(net) - answer(start)).abs().max() > 1e-2
    torch.testing.assert_close(answer(whole), answer(net), atol=1e-5, rtol=1e-5)


def test_a_change_begins_at_nothing_and_looks_at_all_inputs_alike() -> None:
    """Uniform up to one over the root of their number, as in the published code."""
    alone = torch.nn.ModuleDict({"v": torch.nn.Linear(400, 3)})
    adapt(alone, 8, ALPHA, ("v",))
    weights = dict(alone.named_parameters())
    assert not weights["v.lora_up"].any()
    assert 0.99 / 20 < weights["v.lora_down"].abs().max() <= 1 / 20


def test_weights_of_less_precision_are_merged_in_float32() -> None:
    """What is added is smaller than a step of bfloat16."""
    weights = {name: torch.ones(2, 2, dtype=torch.bfloat16) for name in ("a.weight", "b.weight")}
    trained = {
        "a.lora_down": torch.tensor([[0.25, 0.0]]),
        "a.lora_up": torch.tensor([[2**-9], [0.0]]),
    }
    found = merged(weights, trained, 0.5)
    assert found.keys() == weights.keys()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["a.weight"].tolist() == [[1 + 2**-12, 1], [1, 1]]


def test_targets_are_ends_of_names() -> None:
    net = network()
    adapt(net, RANK, ALPHA, ("self_attn.v", "head.head"))
    layers = {n.rpartition(".")[0] for n, _ in net.named_parameters() if "lora" in n}
    assert layers == {"blocks.0.self_attn.v", "blocks.1.self_attn.v", "head.head"}
    with pytest.raises(
        UserError, match=r"lora_targets w, ead, q\.k name no linear layer; .* self_attn"
    ):
        adapt(network(), RANK, ALPHA, ("w", "v", "ead", "q.k"))
    alone = torch.nn.ModuleDict({"v": torch.nn.Linear(2, 3, bias=False)})
    adapt(alone, RANK, ALPHA, ("v",))
    assert {n for n, _ in alone.named_parameters()} == {"v.weight", "v.lora_down", "v.lora_up"}
