"""The one place that chooses what only a GPU runs: fused networks and CUDA graphs.

`accelerate` prepares an editor's networks once; `GraphedForward` replays the transformer for one
stream. The plain path (`PlainForward`) computes the same function and is what CPUs run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .kv_cache import Cached, KVCache
from .mask_cache import Reuse
from .transformer import TextKV, Transformer
from .vae import StreamingVae
from .wan_vae import WanVae


class StreamForward(Protocol):
    """The transformer on one stream's cache."""

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        """Velocity [1, F, C, H, W], valid until the next call."""

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
    from .gpu_transformer import FusedTransformer  # Triton exists only where there is a GPU

    capability = torch.cuda.get_device_capability()
    if fp8 and capability < (8, 9):
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada) or newer, "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; leave it out"
        )
    if isinstance(vae, WanVae):
        from .gpu_vae import FusedWanVae

        fused = FusedWanVae(vae)
        vae._encode_pass, vae._decode_pass = fused.encode_pass, fused.decode_pass  # type: ignore[method-assign]
    return partial(GraphedForward, FusedTransformer(transformer, fp8=fp8))


class GraphedForward:
    """`StreamForward` as CUDA graphs, captured when first needed.

    There is one graph for every length of the visible window and every kind of step (plain, one
    whose outputs are stored, pruned, refresh). Whatever changes from chunk to chunk is read from
    memory at a fixed place: inputs are copied in, and the caches keep their places. A pruned step
    whose number of kept tokens changes with every chunk runs without a graph.
    """

    # Graph memory, shared: streams of a process replay one after the other. An object, because a
    # mere handle dies with the last graph that uses it.
    _pool: torch.cuda.MemPool | None = None

    def __init__(self, network: Any, cache: KVCache) -> None:
        from .gpu_kernels import turn

        self._network = network
        self._cache = cache
        cache.turn = turn
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._text: TextKV | None = None
        self._text_given: TextKV | None = None
        self._graphs: dict[tuple[int, str], tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        if reuse is not None and not reuse.fixed_size:
            from .gpu_transformer import fast_attention

            with fast_attention():
                return cast(
                    Tensor, self._network(noisy, source, timestep, text, self._cache, reuse)
                )
        kind = "plain" if reuse is None else "store" if reuse.tokens is None else "pruned"
        velocity = self._replay(kind, (noisy, source, timestep), text, reuse)
        assert velocity is not None
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self._replay("refresh", (edited, source, edited.new_zeros(1)), text, None)
        self._cache.commit()

    def _replay(
        self, kind: str, inputs: tuple[Tensor, Tensor, Tensor], text: TextKV, reuse: Reuse | None
    ) -> Tensor | None:
        if self._inputs is None or self._text is None:
            self._inputs = (inputs[0].clone(), inputs[1].clone(), inputs[2].clone())
            self._text = TextKV(text.k.clone(), text.v.clone())
            self._text_given = text
        for static, new in zip(self._inputs, inputs, strict=True):
            static.copy_(new)
        if text is not self._text_given:
            self._text.k.copy_(text.k)
            self._text.v.copy_(text.v)
            self._text_given = text
        key = (self._cache.start, kind)
        if key not in self._graphs:
            self._graphs[key] = self._capture(kind, reuse)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(
        self, kind: str, reuse: Reuse | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate; writes are the same
            self._run(kind, reuse)
        torch.cuda.current_stream().wait_stream(side)
        if GraphedForward._pool is None:
            GraphedForward._pool = torch.cuda.MemPool()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=GraphedForward._pool.id):  # type: ignore[arg-type]
            output = self._run(kind, reuse)
        return graph, output

    def _run(self, kind: str, reuse: Reuse | None) -> Tensor | None:
        from .gpu_transformer import fast_attention

        assert self._inputs is not None
        assert self._text is not None
        noisy, source, timestep = self._inputs
        with fast_attention():
            if kind == "refresh":
                self._network.refresh(noisy, source, self._text, self._cache)
                return None
            return cast(
                Tensor,
                self._network(noisy, source, timestep, self._text, self._cache, reuse),
            )
