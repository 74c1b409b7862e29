"""Published sizes, and what one editor of full size holds, computed without memory or weights."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling.diffusion.transformer import Transformer
from modeling.presets import PRESETS
from modeling.streaming.kv_cache import KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.vae.build import build_vae
from modeling.vae.streaming import VaeState

MODEL = PRESETS["wan-1.3b"]
GRID = (MODEL.stream.height // 8, MODEL.stream.width // 8)
OPTIONS = {"device": "meta", "dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    with torch.device("meta"):
        return Transformer(MODEL.transformer).bfloat16()


@pytest.fixture(scope="module")
def kv() -> KVCache:
    return KVCache(
        MODEL.transformer,
        batch=1,
        latent_height=GRID[0],
        latent_width=GRID[1],
        chunk_latents=MODEL.stream.chunk_latents,
        window_latents=MODEL.stream.window_latents,
        sink_latents=MODEL.stream.sink_latents,
        **OPTIONS,  # type: ignore[arg-type]
    )


def test_published_sizes(transformer: Transformer, kv: KVCache) -> None:
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_419_095_104
    assert kv.slot_tokens == 4680
    assert MODEL.stream.window_latents == 12
    assert (kv.k.nbytes + kv.v.nbytes) / 12 == 287_539_200


@torch.no_grad()
def test_what_one_editor_holds(transformer: Transformer, kv: KVCache) -> None:
    """Between two chunks of a stream; the table in docs/checkpoints.md."""
    assert MODEL.stream.mask_cache is not None
    mask = MaskCache(
        MODEL.stream.mask_cache,
        MODEL.transformer,
        chunk_latents=MODEL.stream.chunk_latents,
        latent_height=GRID[0],
        latent_width=GRID[1],
        **OPTIONS,  # type: ignore[arg-type]
    )
    text = transformer.prepare_text(torch.empty(1, MODEL.text.tokens, MODEL.text.dim, **OPTIONS))
    with torch.device("meta"):
        vae = build_vae(MODEL.vae).bfloat16()
    pixels = torch.empty(1, 9, 3, MODEL.stream.height, MODEL.stream.width, **OPTIONS)
    latents, encoder = vae.encode(pixels)
    _, decoder = vae.decode(latents)

    held = {
        "transformer": weights(transformer),
        "VAE": weights(vae),
        "KV": kv.k.nbytes + kv.v.nbytes,
        "sinks' first keys": kv.sink_k.nbytes,
        "mask cache": mask._outputs.nbytes,
        "text": text.k.nbytes + text.v.nbytes,
        "encoder": state(encoder),
        "decoder": state(decoder),
    }
    assert held == {
        "transformer": 2_838_190_208,
        "VAE": 253_785_062,
        "KV": 12 * 287_539_200,
        "sinks' first keys": 431_308_800,
        "mask cache": 431_308_800,
        "text": 94_371_840,
        "encoder": 1_121_402_880,
        "decoder": 1_888_573_440,
    }
    assert sum(held.values()) < 10 << 30

    peaks = {}
    for name, push in (
        ("encode", lambda: vae.encode(pixels.repeat(1, 2, 1, 1, 1)[:, :12], encoder)),
        ("decode", lambda: vae.decode(latents, decoder)),
    ):
        with LiveBytes() as live:
            push()
        peaks[name] = live.peak
    assert 3.5e9 < peaks["encode"] < 4.0e9
    assert 7.5e9 < peaks["decode"] < 8.5e9


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside occupied at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._counted and key not in given:  # no view
                self._counted.add(key)
                self._now += size
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._forget, key, size)
        return out

    def _forget(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self._now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def weights(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def state(vae_state: VaeState) -> int:
    return sum(cache.nbytes for cache in vae_state.caches)
