"""How much arithmetic the networks do, by counting matrix products: 2 FLOPs a multiplication.

Norms, activations and the like are left out, and so is whatever is computed a second time in a
backward pass: these are the model's FLOPs, which MFU is defined by.
"""

from __future__ import annotations

from modeling.config import TransformerConfig

FORWARD_AND_BACKWARD = 3  # a backward pass is two products for every one of the forward


def forward_flops(
    config: TransformerConfig,
    *,
    frames: float,
    pairs: float,
    height: int,
    width: int,
    attending: float = 1.0,
) -> float:
    """One forward of the transformer over a clip.

    `frames` latents of height x width cells are computed, and `pairs` (query latent, key latent)
    see each other in self-attention, which a share of the tokens, `attending`, takes part in.
    """
    dim, latent_tokens = config.dim, height * width // 4
    tokens = frames * latent_tokens
    self_attention = 4 * dim * pairs * latent_tokens**2
    cross_attention = 4 * dim * tokens * config.text_tokens
    # q k v o, q o, feed-forward
    products = tokens * ((4 * attending + 2) * dim**2 + 2 * dim * config.ffn_dim)
    text_products = config.text_tokens * 2 * dim**2  # k and v
    layer = self_attention + cross_attention + 2 * (products + text_products)
    channels = 2 * config.latent_channels + config.source_channels  # patches in, and out
    ends = 2 * tokens * dim * 4 * channels
    text = 2 * config.text_tokens * (config.text_dim + dim) * dim
    return float(config.num_layers * layer + ends + text)
