"""The video VAEs behind one interface: `build_vae` makes the one that a config names."""

from __future__ import annotations

from modeling.presets import VaeConfig
from modeling.vae.streaming import StreamingVae, VaeState
from modeling.vae.tiny import TinyVae
from modeling.vae.wan import WanVae

__all__ = ["StreamingVae", "TinyVae", "VaeState", "WanVae", "build_vae"]


def build_vae(config: VaeConfig) -> StreamingVae:
    """A VAE with random weights, of `config`'s kind and sizes."""
    return WanVae(config) if config.kind == "wan" else TinyVae(config)
