"""The video VAEs by name; a new one is a `StreamingVae` and a line in `VAES`."""

from __future__ import annotations

from modeling.config import VaeConfig
from modeling.tables import Table
from modeling.vae.folded import FoldedVae
from modeling.vae.streaming import StreamingVae
from modeling.vae.tiny import TinyVae
from modeling.vae.wan import WanVae

VAES: Table[type[StreamingVae]] = Table(
    "VAE", {"wan": WanVae, "tiny": TinyVae, "folded": FoldedVae}
)


def build_vae(config: VaeConfig) -> StreamingVae:
    """A VAE with random weights, of `config`'s kind and sizes."""
    return VAES[config.kind](config)
