"""A stream's forwards as CUDA graphs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .gpu_kernels import turn
from .gpu_transformer import FusedTransformer
from .kv_cache import KVCache
from .mask_cache import Reuse
from .transformer import TextKV


class GraphedForward:
    """`accelerate.StreamForward` as CUDA graphs, captured when first needed.

    There is one graph for every length of the visible window and every kind of step (plain, one
    whose outputs are stored, pruned, refresh). Whatever changes from chunk to chunk is read from
    memory at a fixed place: inputs are copied in, and the caches and the text keep their places. A
    pruned step whose number of kept tokens changes with every chunk runs without a graph.
    """

    def __init__(self, network: FusedTransformer, cache: KVCache) -> None:
        self._network = network
        self._cache = cache
        cache.turn = turn
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._text: TextKV | None = None
        self._graphs: dict[tuple[int, str], tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        if reuse is not None and not reuse.fixed_size:
            return self._network(noisy, source, timestep, text, self._cache, reuse)
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
            self._text = text
        assert text is self._text, "a stream's text has one place; copy another into it"
        for static, new in zip(self._inputs, inputs, strict=True):
            static.copy_(new)
        key = (self._cache.start, kind)
        if key not in self._graphs:
            self._graphs[key] = self._capture(kind, reuse)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(
        self, kind: str, reuse: Reuse | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        pool, side = _shared()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate; writes are the same
            self._run(kind, reuse)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool.id, stream=side):  # type: ignore[arg-type]
            output = self._run(kind, reuse)
        return graph, output

    def _run(self, kind: str, reuse: Reuse | None) -> Tensor | None:
        assert self._inputs is not None
        assert self._text is not None
        noisy, source, timestep = self._inputs
        if kind == "refresh":
            self._network.refresh(noisy, source, self._text, self._cache)
            return None
        return self._network(noisy, source, timestep, self._text, self._cache, reuse)


@cache
def _shared() -> tuple[torch.cuda.MemPool, torch.cuda.Stream]:
    """Memory and queue of all captures of a process, whose streams replay one after the other.

    A pool, because a mere handle dies with the last graph that uses it. One queue, because cuBLAS
    keeps a workspace for every queue that it was ever called on.
    """
    return torch.cuda.MemPool(), torch.cuda.Stream()
