"""The presets that users name."""

from __future__ import annotations

from dataclasses import replace

from modeling.config import (
    MaskCacheConfig,
    ModelConfig,
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
)
from modeling.tables import Table

_WAN_VAE = VaeConfig(kind="wan")
_UMT5 = TextConfig(kind="umt5", dim=4096, tokens=512)
_WAN_STREAM = StreamConfig(height=480, width=832, mask_cache=MaskCacheConfig(policy="published"))
_WAN_1_3B = ModelConfig(
    transformer=TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    vae=_WAN_VAE,
    text=_UMT5,
    stream=_WAN_STREAM,
)

PRESETS: Table[ModelConfig] = Table(
    "preset",
    {
        "demo": ModelConfig(
            transformer=TransformerConfig(
                dim=192, ffn_dim=512, num_heads=6, num_layers=4, text_dim=64, text_tokens=24
            ),
            vae=VaeConfig(kind="tiny", widths=(64, 48, 32, 32), mean=(0.0,) * 16, std=(1.0,) * 16),
            text=TextConfig(kind="words", dim=64, tokens=24),
            stream=StreamConfig(height=128, width=192, mask_cache=MaskCacheConfig()),
        ),
        "natural": ModelConfig(
            transformer=TransformerConfig(
                dim=224, ffn_dim=640, num_heads=7, num_layers=5, text_dim=64, text_tokens=24
            ),
            vae=VaeConfig(
                kind="folded",
                widths=(128, 160),
                depths=(2, 4, 5, 4),
                mean=(0.0,) * 16,
                std=(1.0,) * 16,
            ),
            text=TextConfig(kind="words", dim=64, tokens=24),
            stream=StreamConfig(height=128, width=224),
        ),
        "wan-1.3b": _WAN_1_3B,
        "wan-14b": replace(
            _WAN_1_3B,
            transformer=TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
        ),
    },
)
