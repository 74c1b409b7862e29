"""A stream's forwards as CUDA graphs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import TextKV
from modeling.gpu.kernels.heads import turn
from modeling.gpu.transformer import FusedTransformer
from modeling.streaming.kv_cache import KVCache

Inputs = tuple[Tensor, Tensor, Tensor]  # noisy (or edited), source, timestep


class GraphedForward:
    """`accelerate.StreamForward` as CUDA graphs, captured when first needed.

    There is one graph for every kind of step (plain, one whose outputs are stored, pruned,
    refresh). Whatever changes from chunk to chunk is read from memory at a fixed place: inputs are
    copied in, and the caches and the text keep their places. Without a graph run a stream's first
    chunks, since no other sees a window of their length, and pruned steps whose number of kept
    tokens changes with every chunk.
    """

    def __init__(self, network: FusedTransformer, cache: KVCache) -> None:
        self._network = network
        self._cache = cache
        cache.turn = turn
        self._inputs: Inputs | None = None
        self._text: TextKV | None = None
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        kind = "plain" if reuse is None else "store" if reuse.tokens is None else "pruned"
        inputs = (noisy, source, timestep)
        fixed = self._cache.full and (reuse is None or reuse.fixed_size)
        velocity = (self._replay if fixed else self._run)(kind, inputs, text, reuse)
        assert velocity is not None
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        inputs = (edited, source, edited.new_zeros(1))
        (self._replay if self._cache.full else self._run)("refresh", inputs, text, None)
        self._cache.commit()

    def _replay(
        self, kind: str, inputs: Inputs, text: TextKV, reuse: Reuse | None
    ) -> Tensor | None:
        if self._inputs is None:
            self._inputs = (inputs[0].clone(), inputs[1].clone(), inputs[2].clone())
            self._text = text
        assert text is self._text, "a stream's text has one place; copy another into it"
        for static, new in zip(self._inputs, inputs, strict=True):
            static.copy_(new)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind, self._inputs, text, reuse)
        graph, output = self._graphs[kind]
        graph.replay()
        return output

    def _capture(
        self, kind: str, inputs: Inputs, text: TextKV, reuse: Reuse | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        pool, side = _shared()
        kept = None if reuse is None or reuse.tokens is None else (reuse.scope, len(reuse.tokens))
        work = (kind, self._cache.grid, self._cache.start, kept)
        if work not in self._network.known:
            # Compiles, and lets libraries allocate. What it writes is what the graph will write.
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(kind, inputs, text, reuse)
            torch.cuda.current_stream().wait_stream(side)
            self._network.known.add(work)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool.id, stream=side):  # type: ignore[arg-type]
            output = self._run(kind, inputs, text, reuse)
        return graph, output

    def _run(self, kind: str, inputs: Inputs, text: TextKV, reuse: Reuse | None) -> Tensor | None:
        if kind == "refresh":
            self._network.refresh(inputs[0], inputs[1], text, self._cache)
            return None
        return self._network(*inputs, text, self._cache, reuse)


@cache
def _shared() -> tuple[torch.cuda.MemPool, torch.cuda.Stream]:
    """Memory and queue of all captures of a process, whose streams replay one after the other.

    A pool, because a mere handle dies with the last graph that uses it. One queue, because cuBLAS
    keeps a workspace for every queue that it was ever called on.
    """
    return torch.cuda.MemPool(), torch.cuda.Stream()
