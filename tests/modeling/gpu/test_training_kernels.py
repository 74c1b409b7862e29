"""The blocks of training on a GPU, in Triton's interpreter at tiny sizes, against the plain blocks:
outputs and every gradient. On a GPU the same tests run the kernels themselves.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from modeling.config import Scope, StreamConfig, TransformerConfig
from modeling.diffusion.attention import Visibility, bidirectional, teacher_forcing
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import Transformer
from modeling.streaming.forward import ForwardOn, PlainForward
from modeling.streaming.history import History, Remembered
from modeling.streaming.kv_cache import Cached, KVCache

pytest.importorskip("triton", reason="Triton exists for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRAMES, CHUNK, HEIGHT, WIDTH = 2, 2, 4, 6  # 6 tokens a frame
CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=1, freq_dim=16, text_dim=20, text_tokens=8
)


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that tokens share are summed up in parts, the last of which is not full."""
    from modeling.gpu.kernels import training as training_kernels

    monkeypatch.setattr(training_kernels, "_ROWS", 4)


def network() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.to(DEVICE)


def fused(plain: Transformer) -> Transformer:
    from modeling.gpu.training import fuse_blocks

    copy = deepcopy(plain)
    fuse_blocks(copy)
    return copy


def inputs(clips: int, frames: int, levels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy, source, timestep (one a frame if `levels`) and text."""
    torch.manual_seed(1)
    noisy, source = torch.randn(2, clips, frames, 16, HEIGHT, WIDTH, device=DEVICE)
    shape = (clips, frames) if levels else (clips,)
    timestep = torch.rand(shape, device=DEVICE) * 1000
    return noisy, source, timestep, torch.randn(clips, 5, 20, device=DEVICE)


def gradients(
    net: Transformer, given: tuple[Tensor, ...], visible: Visibility
) -> dict[str, Tensor]:
    noisy = given[0].clone().requires_grad_()
    out = net(noisy, *given[1:], visible)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weight).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {"out": out.detach(), "noisy": noisy.grad} | found  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("clips", "levels", "checkpointing"),
    [  # every pair of them; one level of noise, or one a frame
        (1, False, False),
        (2, False, True),
        (1, True, True),
        (2, True, False),
    ],
)
def test_outputs_and_gradients_are_the_plain_blocks(
    clips: int, levels: bool, checkpointing: bool
) -> None:
    plain = network()
    ours = fused(plain)
    plain.gradient_checkpointing = ours.gradient_checkpointing = checkpointing
    visible = teacher_forcing(FRAMES // 2, 1) if levels else bidirectional(FRAMES)
    given = inputs(clips, FRAMES, levels)
    wanted, found = gradients(plain, given, visible), gradients(ours, given, visible)
    for name, value in wanted.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, atol=2e-5 * scale, rtol=1e-4, msg=name)


def test_a_streams_chunks_without_gradient_are_the_plain_blocks() -> None:
    plain = network()
    ours = fused(plain)
    caches = [
        KVCache(
            CONFIG, batch=1, latent_height=HEIGHT, latent_width=WIDTH, chunk_latents=CHUNK,
            window_latents=4, sink_latents=0, device=DEVICE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for _ in range(3):
        given = inputs(1, CHUNK, levels=False)
        with torch.no_grad():
            wanted, found = (
                net(*given, Cached(cache)) for net, cache in zip((plain, ours), caches, strict=True)
            )
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        for cache in caches:
            cache.commit()
    torch.testing.assert_close(caches[1].k, caches[0].k, atol=1e-4, rtol=1e-4)


SMALL = TransformerConfig(
    dim=32, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4,
    latent_channels=4, source_channels=4,
)  # fmt: skip


@torch.no_grad()
def two_chunks(net: Transformer, on: ForwardOn) -> Tensor:
    """Velocity of the second of two chunks, which sees the first."""
    cache = KVCache(
        SMALL, batch=1, latent_height=2, latent_width=2, chunk_latents=1, window_latents=2,
        device=DEVICE,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    noisy, source = torch.randn(2, 1, 1, 4, 2, 2, generator=draw).to(DEVICE)
    text = net.prepare_text(torch.randn(1, 4, 8, generator=draw).to(DEVICE))
    forward = on(cache)
    forward.refresh(noisy, source, text)
    return forward(source, noisy, torch.tensor([500.0], device=DEVICE), text, None)


def test_rollouts_run_on_the_weights_of_the_last_update_once_they_are_renewed() -> None:
    """And the parameters that are trained stay the network's own."""
    from modeling.gpu.training import RolloutForward

    torch.manual_seed(0)
    net = Transformer(SMALL).to(DEVICE)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for block in net.layers():
        block.ffn[1] = torch.nn.GELU()  # the kernels' is another on a CPU
    own = dict(net.named_parameters())
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    on = RolloutForward(net)
    for _ in range(2):
        for parameter in own.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        before = two_chunks(net, on)
        on.renew()
        found = two_chunks(net, on)
        wanted = two_chunks(net, lambda cache: PlainForward(net, cache))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert (before - wanted).abs().max() > 1e-2
    for name, parameter in net.named_parameters():
        assert parameter is own[name]
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, "a view of a joined one"


@pytest.mark.parametrize("scope", ["attention", "feedforward"])
def test_pruned_chunks_of_a_rollout_are_the_plain_blocks(scope: Scope) -> None:
    """Of two kinds of tokens, those that are recomputed and those for which outputs of the step
    before stand in; with the outputs that are stored and gradients of both."""
    plain = network()
    ours = fused(plain)
    stream = StreamConfig(
        height=32, width=48, chunk_latents=CHUNK, window_latents=2 * CHUNK, sink_latents=0
    )
    place = {"latent_height": HEIGHT, "latent_width": WIDTH, "device": DEVICE}
    given = inputs(1, CHUNK, levels=False)
    seen = torch.randn(2, 1, 1, CHUNK * 6, 2, 12, device=DEVICE)
    kept = torch.tensor([0, 3, 4, 9, 11], device=DEVICE)
    found = []
    for net in (plain, ours):
        history = History(CONFIG, stream, batch=1, **place)  # type: ignore[arg-type]
        history.commit(*seen)
        outputs = torch.zeros(1, 1, CHUNK * 6, CONFIG.dim, device=DEVICE)
        with torch.no_grad():
            stored = Reuse(scope, outputs, None, fixed_size=True)
            net(*given, Remembered(history, stored))
        pruned = Remembered(history, Reuse(scope, outputs, kept, fixed_size=True))
        net.gradient_checkpointing = True
        found.append(gradients(net, given, pruned) | {"outputs": outputs})
    wanted, made = found
    for name, value in wanted.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(made[name], value, atol=2e-5 * scale, rtol=1e-4, msg=name)


def test_parameters_stay_where_they_are() -> None:
    plain = network()
    ours = fused(plain)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
