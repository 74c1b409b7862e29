"""The published figures, written down a second time."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from modeling.config import MaskCacheConfig, StreamConfig, TransformerConfig, VaeConfig
from modeling.detail.work_size import in_words
from modeling.model_dir import read_card, read_config
from modeling.presets import PRESETS

SHIPPED = Path(__file__).parents[2] / "pipelines/start"


def test_a_stream() -> None:
    assert asdict(StreamConfig(height=480, width=832)) == {
        "height": 480,
        "width": 832,
        "fps": 16,
        "chunk_latents": 3,
        "window_latents": 12,
        "sink_latents": 3,
        "window_positions": True,
        "timesteps": (1000, 750, 500, 250),
        "shift": 5.0,
        "mask_cache": None,
        "guide_blur": None,
    }


@pytest.mark.parametrize(("latents", "frames", "first"), [(1, 4, 1), (3, 12, 9), (7, 28, 25)])
def test_frames_of_a_chunk(latents: int, frames: int, first: int) -> None:
    stream = StreamConfig(
        height=16, width=16, chunk_latents=latents, window_latents=2 * latents, sink_latents=0
    )
    assert (stream.chunk_frames, stream.first_chunk_frames) == (frames, first)


def test_a_mask_cache() -> None:
    assert asdict(MaskCacheConfig()) == {
        "policy": "budget",
        "keep_ratio": 0.3,
        "pruned_steps": (1, 2),
        "scope": "attention",
        "threshold": 0.02,
        "dilate": 1,
    }


def test_wan() -> None:
    small, large = PRESETS["wan-1.3b"], PRESETS["wan-14b"]
    sizes = {
        "dim": 1536,
        "ffn_dim": 8960,
        "num_heads": 12,
        "num_layers": 30,
        "freq_dim": 256,
        "text_dim": 4096,
        "text_tokens": 512,
        "latent_channels": 16,
        "source_channels": 16,
        "eps": 1e-6,
    }
    assert asdict(small.transformer) == sizes
    assert asdict(large.transformer) == sizes | {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
    }
    for config in (small, large):
        assert config.transformer.head_dim == 128
        assert (config.stream.height, config.stream.width) == (480, 832)
        assert config.stream.mask_cache == MaskCacheConfig(policy="published")
        assert (config.text.kind, config.text.dim, config.text.tokens) == ("umt5", 4096, 512)
        assert config.vae == VaeConfig("wan", base_dim=96)


def test_statistics_of_wans_latents() -> None:
    published = """
        -0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508
        0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921
        2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743
        3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160
    """
    config = VaeConfig("wan")
    assert (*config.mean, *config.std) == tuple(float(number) for number in published.split())


def test_the_demo_is_small_and_its_tiny_vae_standard() -> None:
    demo = PRESETS["demo"]
    assert demo.transformer == TransformerConfig(
        dim=192, ffn_dim=512, num_heads=6, num_layers=4, text_dim=64, text_tokens=24
    )
    assert (demo.vae.kind, set(demo.vae.mean), set(demo.vae.std)) == ("tiny", {0.0}, {1.0})
    assert (demo.stream.height, demo.stream.width) == (128, 192)
    assert demo.stream.mask_cache == MaskCacheConfig()


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_a_preset_goes_on_from_the_model_that_ships_under_its_name(name: str) -> None:
    """Whose VAE has measured its latents, and which may have learned to take fewer steps."""
    preset, shipped = PRESETS[name], read_config(SHIPPED / name)
    assert shipped == replace(
        preset,
        vae=replace(preset.vae, mean=shipped.vae.mean, std=shipped.vae.std),
        stream=replace(preset.stream, timesteps=shipped.stream.timesteps),
    )


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_a_shipped_model_says_the_sizes_it_was_trained_at(name: str) -> None:
    stream = read_config(SHIPPED / name).stream
    assert read_card(SHIPPED / name)["trained_at"] == [in_words((stream.height, stream.width))]
