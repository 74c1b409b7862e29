"""The video VAEs behind one interface: `build_vae` makes the one that a config names."""

from __future__ import annotations

from modeling.folded_vae import FoldedVae
from modeling.presets import VaeConfig
from modeling.vae.streaming import StreamingVae, VaeState
from modeling.vae.tiny import TinyVae
from modeling.vae.wan import WanVae

__all__ = ["FoldedVae", "StreamingVae", "TinyVae", "VaeState", "WanVae", "build_vae"]

KINDS: dict[str, type[StreamingVae]] = {"wan": WanVae, "tiny": TinyVae, "folded": FoldedVae}


def build_vae(config: VaeConfig) -> StreamingVae:
    """A VAE with random weights, of `config`'s kind and sizes."""
    return KINDS[config.kind](config)
