"""The one place that chooses what only a GPU runs: fused networks and CUDA graphs.

`accelerate` prepares an editor's networks once and says what runs a stream's forwards. The plain
path (`PlainForward`) computes the same function and is what CPUs run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from modeling.diffusion.transformer import TextKV, Transformer
from modeling.streaming.kv_cache import Cached, KVCache
from modeling.streaming.mask_cache import Reuse
from modeling.vae.build import StreamingVae
from modeling.vae.wan import WanVae


class StreamForward(Protocol):
    """The transformer on one stream's cache."""

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        """Velocity [1, F, C, H, W], valid until the next call. `text` is one object for all calls,
        changed in place.
        """

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        """Make the clean chunk history: its keys at timestep 0, as in training."""


class PlainForward:
    """`StreamForward` on any device."""

    def __init__(self, transformer: Transformer, cache: KVCache) -> None:
        self._transformer = transformer
        self._cache = cache

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        velocity: Tensor = self._transformer(
            noisy, source, timestep, text, Cached(self._cache, reuse)
        )
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self(edited, source, edited.new_zeros(1), text, None)
        self._cache.commit()


ForwardOn = Callable[[KVCache], StreamForward]  # what runs the forwards of one stream


def accelerate(transformer: Transformer, vae: StreamingVae, *, fp8: bool) -> ForwardOn:
    """Make an editor's networks fast on their GPU, for inference only.

    Parameters are laid out anew, and the VAE's passes are replaced. `fp8` computes most of the
    transformer's linear layers in 8 bits; ValueError if the GPU cannot.
    """
    # Here, because Triton exists only where there is a GPU.
    from modeling.gpu.graphs import GraphedForward
    from modeling.gpu.transformer import FusedTransformer
    from modeling.gpu.vae import fuse

    capability = torch.cuda.get_device_capability()
    if fp8 and capability < (8, 9):
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada) or newer, "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; leave it out"
        )
    if isinstance(vae, WanVae):
        fuse(vae)
    return partial(GraphedForward, FusedTransformer(transformer, fp8=fp8))
