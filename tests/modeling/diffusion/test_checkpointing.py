"""What is computed a second time in the backward pass, that nothing changes by it, and that a
block's layers work in the block's own forward alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.config import TransformerConfig
from modeling.diffusion import recompute
from modeling.diffusion.attention import Spans, bidirectional, teacher_forcing
from modeling.diffusion.recompute import KeptLinear, keeping
from modeling.diffusion.transformer import Block, Transformer

FRAMES, CHUNK, LAYERS = 4, 2, 3
CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=LAYERS, freq_dim=16, text_dim=20, text_tokens=8
)


def test_a_tape_within_a_tape_ends_where_it_began() -> None:
    layer = KeptLinear(3, 2)
    row = torch.ones(1, 3, requires_grad=True)
    (outer, again), (inner, _) = keeping(products=True), keeping(products=True)
    with outer:
        with inner:
            layer(row)
        result = layer(2 * row)
    with torch.no_grad():
        layer.weight.zero_()
    with again:  # what was kept, and of the outer one
        assert layer(row).equal(result)
    assert not layer(row).equal(result)


class Computed(TorchDispatchMode):
    """Notes queries and keys of every attention that is really computed, and how often a forward's
    product from feed-forward width is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.wide = self.products = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op)
        if "scaled_dot_product" in name and "backward" not in name:
            self.seen.append((args[0].shape[2], args[1].shape[2]))
        if "addmm" in name and args[1].shape[1] == CONFIG.ffn_dim:
            self.wide += 1
        if "addmm" in name and args[1].shape[1] == CONFIG.dim == args[2].shape[1]:
            self.products += 1
        return op(*args, **(kwargs or {}))


def run(
    visible: Spans, recomputes: bool, attention_too: bool, products: int = 0
) -> tuple[dict[str, Tensor], Computed]:
    torch.manual_seed(0)
    network = Transformer(CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.gradient_checkpointing = recomputes
    network.recompute_attention = attention_too
    network.keep_products = products
    noisy, source = torch.randn(2, 1, len(visible.positions), 16, 8, 12)
    with Computed() as computed:
        out = network(noisy, source, torch.tensor([500.0]), torch.randn(1, 8, 20), visible)
        out.square().mean().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    return {"out": out.detach()} | grads, computed  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("visible", "spans"),
    [(bidirectional(FRAMES), 1), (teacher_forcing(FRAMES, CHUNK), 4)],
    ids=["bidirectional", "teacher_forcing"],
)
def test_what_is_kept_is_not_computed_again(visible: Spans, spans: int) -> None:
    """Self-attention and the last linear layer; the text's attention is."""
    plain, once = run(visible, recomputes=False, attention_too=False)
    tokens = len(visible.positions) * 24
    text = (tokens, 8)
    assert len(once.seen) == LAYERS * (spans + 1)
    assert once.wide == LAYERS
    whole, all_again = run(visible, recomputes=True, attention_too=True)
    assert sorted(all_again.seen) == sorted(2 * once.seen)
    assert all_again.wide == 2 * LAYERS
    kept, again = run(visible, recomputes=True, attention_too=False)
    assert sorted(again.seen) == sorted(once.seen + LAYERS * [text])
    assert again.wide == LAYERS
    more, least = run(visible, recomputes=True, attention_too=False, products=LAYERS)
    assert again.products - once.products == LAYERS * 8  # q k v o of clip and text
    assert run(visible, True, False, products=1)[1].products - least.products == (LAYERS - 1) * 8
    assert least.products == once.products
    for name, value in plain.items():
        for other in (whole, kept, more):
            assert torch.equal(other[name], value), name


def test_a_blocks_layers_are_used_within_its_forward_alone() -> None:
    """ZeRO-3, which gathers a block's weights for its forward and lets them go after it, ended in
    the first backward pass of a training that went on from a checkpoint: the text's keys were made
    before the blocks."""
    network = Transformer(CONFIG)
    within: list[nn.Module] = []
    used: list[tuple[nn.Module, bool]] = []
    for block in network.layers():
        block.register_forward_pre_hook(lambda block, _: within.append(block))
        block.register_forward_hook(lambda block, *_: within.remove(block))
        for layer in block.modules():
            if not isinstance(layer, Block) and list(layer.parameters(recurse=False)):
                own = set(block.modules())
                layer.register_forward_pre_hook(
                    lambda layer, _, own=own: used.append((layer, any(b in own for b in within)))
                )
    noisy, source = torch.randn(2, 1, FRAMES, 16, 8, 12)
    network(noisy, source, torch.tensor([500.0]), torch.randn(1, 8, 20), bidirectional(FRAMES))
    assert len({layer for layer, _ in used}) == LAYERS * 15
    assert all(inside for _, inside in used)


@pytest.mark.parametrize(
    ("device", "chosen", "size", "kept"),
    [
        ("cpu", "FLASH_ATTENTION", 12, "_CPU"),
        ("cpu", "MATH", 16, None),
        ("cuda", "CUDNN_ATTENTION", 16, "_CUDNN"),
        ("cuda", "FLASH_ATTENTION", 16, "_FLASH"),
        ("cuda", "FLASH_ATTENTION", 12, None),  # PyTorch pads what it hands on
        ("cuda", "EFFICIENT_ATTENTION", 16, None),
        ("cuda", "MATH", 16, None),
    ],
)
def test_what_is_kept_is_what_pytorch_would_have_computed(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: str, size: int, kept: str | None
) -> None:
    backend = getattr(SDPBackend, chosen)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v: backend.value)
    q: Any = SimpleNamespace(device=SimpleNamespace(type=device), shape=(2, 6, 8, size))
    assert recompute._kernel(q, q, q) is (None if kept is None else getattr(recompute, kept))
