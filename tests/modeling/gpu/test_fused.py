"""The fused networks against the plain ones, in Triton's interpreter at tiny sizes, and what is
rehearsed of them before a stream. The kernels that they are made of are in `test_kernels`.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from modeling.config import MaskCacheConfig, Scope, TransformerConfig, VaeConfig
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.streaming.forward import PlainForward
from modeling.streaming.kv_cache import KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.vae.build import build_vae
from modeling.vae.wan import WanVae

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run here", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

pytestmark = pytest.mark.usefixtures("no_gradients")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # of float32; sums are made in another order
SIZES = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4
)
CHUNK, HEIGHT, WIDTH = 2, 2, 6


class FusedForward:
    """What `GraphedForward` runs, without a graph."""

    def __init__(self, network: Any, cache: KVCache) -> None:
        from modeling.gpu.kernels.heads import turn

        self._network, self._cache = network, cache
        cache.turn = turn

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        velocity: Tensor = self._network(noisy, source, timestep, text, self._cache, reuse)
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self._network.refresh(edited, source, text, self._cache)
        self._cache.commit()


@pytest.mark.parametrize(
    ("scope", "policy"),
    [("attention", "published"), ("feedforward", "budget"), ("block", "budget")],
)
def test_transformer(scope: Scope, policy: Literal["budget", "published"]) -> None:
    """Dense, storing, pruned and refresh forwards while the window fills, is full and rolls."""
    from modeling.gpu.transformer import FusedTransformer

    plain_network = Transformer(SIZES)
    for parameter in plain_network.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5)
    for block in plain_network.layers():
        block.ffn[1] = nn.GELU()  # what the fused product computes on a CPU; on a GPU it is tanh's
    plain_network.requires_grad_(False)
    shape = {"chunk_latents": CHUNK, "latent_height": HEIGHT, "latent_width": WIDTH}
    caches = [
        KVCache(SIZES, batch=1, window_latents=2 * CHUNK, sink_latents=CHUNK, **shape)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    plain = PlainForward(plain_network, caches[0])
    fused = FusedForward(FusedTransformer(deepcopy(plain_network)), caches[1])
    config = MaskCacheConfig(policy=policy, scope=scope, keep_ratio=0.5, pruned_steps=(1,))
    masks = [MaskCache(config, SIZES, **shape) for _ in range(2)]  # type: ignore[arg-type]
    text = plain_network.prepare_text(torch.randn(1, 3, 8))
    for _ in range(3):
        noisy, source = torch.randn(2, 1, CHUNK, 16, HEIGHT, WIDTH)
        for step, t in enumerate((1000.0, 700.0)):
            wanted, found = (
                forward(noisy, source, torch.tensor([t]), text, mask.reuse(step))
                for forward, mask in zip((plain, fused), masks, strict=True)
            )
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)
        for forward in (plain, fused):
            forward.refresh(noisy, source, text)
        for mask in masks:
            mask.observe(noisy, source)
        used = caches[0].start
        for ours, theirs in ((caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
            torch.testing.assert_close(ours[:, :, :used], theirs[:, :, :used], **CLOSE)


def test_wan_vae() -> None:
    """Whole clips and pieces, with the states of the plain passes."""
    from modeling.gpu.vae import fuse

    plain = build_vae(VaeConfig("wan", base_dim=4))
    for name, parameter in plain.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_(std=0.2)
    plain.requires_grad_(False)
    fused = deepcopy(plain)
    assert isinstance(fused, WanVae)
    fuse(fused)
    pixels, latents = torch.rand(1, 5, 3, 8, 16) * 2 - 1, torch.randn(1, 2, 16, 1, 2)
    for name, x in (("encode", pixels), ("decode", latents)):
        wanted, state = getattr(plain, name)(x)
        found, found_state = getattr(fused, name)(x)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(found_state.caches, state.caches, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source_channels", [0, 16])
def test_a_model_is_rehearsed_with_a_source_if_it_has_one(source_channels: int) -> None:
    from modeling.gpu.rehearsal import parts

    network = Transformer(replace(SIZES, source_channels=source_channels))
    sources: list[bool] = []

    def fused(noisy: Tensor, source: Tensor | None, *rest: object) -> None:
        sources.append(source is not None)

    nothing: Any = None
    parts(network, fused, nothing)[2]()  # type: ignore[arg-type]
    assert sources == 2 * [source_channels > 0]


def test_a_rehearsal_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling.gpu import rehearsal

    ran: list[bool] = []

    def works() -> None:
        ran.append(torch.is_grad_enabled())

    def fails() -> None:
        raise RuntimeError("no compiler is here")

    nothing: Any = None
    monkeypatch.setattr(rehearsal, "parts", lambda *_: [fails, works])
    for name in ("device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="no compiler is here"):
        rehearsal.rehearse(Transformer(SIZES), nothing, nothing)
    assert ran == [False]


def test_a_stream_launches_no_kernel_that_was_not_rehearsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By name, compile-time constants and what is absent: Triton compiles each of these anew."""
    from triton.runtime.interpreter import InterpretedFunction

    from modeling.gpu.kernels.resize import resize
    from modeling.gpu.kernels.transfer import transfer
    from modeling.gpu.rehearsal import parts
    from modeling.gpu.transformer import FusedTransformer
    from modeling.gpu.vae import fuse

    launched: set[tuple[object, ...]] = set()

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:  # and not run: that takes long
        absent = tuple(arg is None for arg in args)
        names = sorted((k, v) for k, v in kwargs.items() if k.isupper() or k == "num_warps")
        launched.add((self.fn.__name__, *names, *absent))
        assert kwargs.get("num_warps", 4) in (1, 2, 4, 8, 16, 32)  # as GPUs want it
        if self.fn.__name__ == "_transfer":  # which reads the one where the other has pixels
            assert args[1].shape == args[2].shape

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    network, vae = Transformer(SIZES), build_vae(VaeConfig("wan", base_dim=4))
    assert isinstance(vae, WanVae)
    fuse(vae)
    fused = FusedTransformer(network)
    for part in parts(network, fused, vae):
        part()
    rehearsed = set(launched)
    assert {name for name, *_ in rehearsed} == {
        "_norm_silu", "_add_bias_residual", "_norm_rotate", "_add_norm", "_turn", "_resize",
        "_slopes", "_means", "_lines", "_news", "_transfer",
        "_merge",  # of attention in two halves, which a large picture alone is worth
    }  # fmt: skip

    launched.clear()
    _, state = vae.encode(torch.rand(1, 9, 3, 16, 24))
    vae.encode(torch.rand(1, 8, 3, 16, 24), state)
    _, state = vae.decode(torch.randn(1, 3, 16, 2, 3))
    vae.decode(torch.randn(1, 3, 16, 2, 3), state)
    cache = KVCache(
        SIZES, batch=1, latent_height=4, latent_width=6, chunk_latents=3, window_latents=9,
        sink_latents=3,
    )  # fmt: skip
    forward, text = FusedForward(fused, cache), network.prepare_text(torch.randn(1, 4, 8))
    latents = torch.randn(1, 3, 16, 4, 6)
    kept = Reuse("block", torch.zeros(0), torch.arange(7), fixed_size=True)
    for _ in range(5):  # chunks: the window fills, rolls, and its sinks are turned
        for reuse in (None, kept):
            forward(latents, latents, torch.ones(1), text, reuse)
        forward.refresh(latents, latents, text)
    large, small = (torch.zeros(2, *size, 3, dtype=torch.uint8) for size in ((18, 20), (16, 24)))
    transfer(large, resize(large, 16, 24, "bicubic"), small)
    assert launched <= rehearsed, sorted(map(str, launched - rehearsed))
