"""A stream's work as CUDA graphs, which all streams of an editor share.

A graph reads and writes fixed places. So what a stream has is laid there before its work, and what
it is to keep is taken from there: copies of a hundredth of a chunk's time, for which a stream finds
all graphs ready that another one of its size has met. Nothing there is read that the stream whose
turn it is has not laid.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import TextKV
from modeling.geometry import SPATIAL_STRIDE
from modeling.gpu.kernels.heads import turn
from modeling.streaming.kv_cache import KVCache
from modeling.vae.streaming import StreamingVae

Inputs = tuple[Tensor, Tensor, Tensor]  # noisy (or edited), source, timestep
Pass = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]

KEPT = 16  # sizes whose graphs are kept: clients choose them
# Pixels of a frame from which on a GPU takes longer for a VAE's pass than a host to launch it.
LARGE = 512 * 512
ALIGNED = 256  # numbers, which is more than any kernel asks of where a tensor begins

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class FusedForwards(Protocol):
    """`gpu.transformer.FusedTransformer` is it."""

    def __call__(
        self,
        noisy: Tensor,
        source: Tensor,
        timestep: Tensor,
        text: TextKV,
        cache: KVCache,
        reuse: Reuse | None,
    ) -> Tensor: ...

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV, cache: KVCache) -> None: ...


class Room:
    """Memory that all sizes share, since what lies there is one stream's."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def like(self, *tensors: Tensor) -> list[Tensor]:
        """Places beside each other for what has these shapes, strides and type."""
        firsts = [0, *accumulate(-(-each.numel() // ALIGNED) * ALIGNED for each in tensors)]
        if self._held is None or self._held.numel() < firsts[-1]:
            self._held = tensors[0].new_empty(firsts[-1])
        return [
            self._held.as_strided(each.shape, torch.empty_like(each, device="meta").stride(), first)
            for each, first in zip(tensors, firsts, strict=False)
        ]


class Desk:
    """Where all streams of a network run their forwards, one after the other."""

    def __init__(self, network: FusedForwards) -> None:
        self.network = network
        self.laid: tuple[KVCache, TextKV] | None = None  # whose history and prompt lie here
        self.room, self.outputs = Room(), Room()
        self._places: dict[Hashable, SizedDesk] = {}

    def lay(self, cache: KVCache, text: TextKV, inputs: Inputs) -> SizedDesk:
        """The place of this size, with what the stream has laid there."""
        size = (cache.grid, cache.k.shape, text.k.shape)
        place = _known(self._places, size, lambda: SizedDesk(self, cache, text, inputs))
        if self.laid is None or self.laid[0] is not cache or self.laid[1] is not text:
            place.lay(cache, text)
            self.laid = cache, text
        for mine, new in zip(place.inputs, inputs, strict=True):
            mine.copy_(new)
        return place


class SizedDesk:
    """The desk at one size, and the graphs of what is run there."""

    def __init__(self, desk: Desk, cache: KVCache, text: TextKV, inputs: Inputs) -> None:
        self._desk = desk
        k, v, text_k, text_v = desk.room.like(cache.k, cache.v, *text)
        self.cache, self.text = cache.elsewhere(k, v), TextKV(text_k, text_v)
        noisy, source, timestep = map(torch.empty_like, inputs)
        self.inputs = (noisy, source, timestep)
        self._reuses: dict[Hashable, Reuse] = {}
        self._graphs: dict[Hashable, Callable[[], Tensor | None]] = {}

    def lay(self, cache: KVCache, text: TextKV) -> None:
        self.cache.copy_(cache)
        for mine, theirs in zip(self.text, text, strict=True):
            mine.copy_(theirs)

    def lay_reuse(self, reuse: Reuse) -> tuple[Hashable, Reuse]:
        """What stands for `reuse` here, and what it is known by."""
        kind = (reuse.scope, None if reuse.tokens is None else len(reuse.tokens))
        laid = self._reuses.get(kind)
        if laid is None:
            (outputs,) = self._desk.outputs.like(reuse.outputs)
            tokens = None if reuse.tokens is None else torch.empty_like(reuse.tokens)
            laid = self._reuses[kind] = Reuse(reuse.scope, outputs, tokens, fixed_size=True)
        if laid.tokens is not None and reuse.tokens is not None:
            laid.tokens.copy_(reuse.tokens)
            laid.outputs.copy_(reuse.outputs)
        return kind, laid

    def run(self, work: Hashable, function: Callable[[], Tensor | None]) -> Tensor | None:
        """What `function` gives, of what lies here; valid until the next graph runs."""
        if work not in self._graphs:
            self._graphs[work] = captured(function)
        return self._graphs[work]()


class GraphedForward:
    """`streaming.forward.StreamForward` of one stream at the desk.

    There is one graph for every kind of step (plain, one whose outputs are stored, pruned, refresh)
    and every length of the window. Without a graph run pruned steps whose number of kept tokens
    changes with every chunk.
    """

    def __init__(self, desk: Desk, cache: KVCache) -> None:
        self._desk, self._cache = desk, cache
        cache.turn = turn

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        network = self._desk.network
        if reuse is not None and not reuse.fixed_size:
            return network(noisy, source, timestep, text, self._cache, reuse)
        place = self._desk.lay(self._cache, text, (noisy, source, timestep))
        kind, laid = (None, None) if reuse is None else place.lay_reuse(reuse)
        velocity = place.run(
            (self._cache.start, kind),
            lambda: network(*place.inputs, place.text, place.cache, laid),
        )
        if reuse is not None and laid is not None and reuse.tokens is None:
            reuse.outputs.copy_(laid.outputs)
        assert velocity is not None
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        network = self._desk.network
        place = self._desk.lay(self._cache, text, (edited, source, edited.new_zeros(1)))
        place.run(
            (self._cache.start, "refresh"),
            lambda: network.refresh(*place.inputs[:2], place.text, place.cache),
        )
        self._cache.take(place.cache)
        self._cache.commit()
        self._desk.laid = None  # the stream's history is another now


class GraphedPass:
    """A pass of a streaming VAE, as a graph for every size and number of frames.

    For frames of less than `LARGE` pixels, of which an input has `pixels` at each of its places,
    and not for a stream's first pass, which remembers nothing.
    """

    def __init__(self, run: Pass, pixels: int) -> None:
        self._run, self._pixels = run, pixels
        self._room = Room()
        self._laid: tuple[torch.Size, list[Tensor]] | None = None  # whose caches lie there
        self._graphs: dict[torch.Size, tuple[Tensor, list[Tensor], Callable[[], Tensor]]] = {}

    def __call__(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not caches or x.shape[-2] * x.shape[-1] * self._pixels >= LARGE:
            return self._run(x, caches)
        place, states, replay = _known(self._graphs, x.shape, lambda: self._capture(x, caches))
        place.copy_(x)
        if self._laid is None or self._laid[0] != x.shape or self._laid[1] is not caches:
            torch._foreach_copy_(states, caches)
        out = replay().clone()
        # Not in place: who has a state may go on from it twice.
        remembered = [torch.empty_like(state) for state in states]
        torch._foreach_copy_(remembered, states)
        self._laid = x.shape, remembered
        return out, remembered

    def _capture(
        self, x: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Callable[[], Tensor]]:
        place, states = x.clone(), self._room.like(*caches)
        self._laid = None  # the memory is another size's now

        def run() -> Tensor:
            out, remembered = self._run(place, states)
            torch._foreach_copy_(states, remembered)
            return out

        return place, states, captured(run)


def graph_passes(vae: StreamingVae) -> None:
    """Make `vae` run its passes as graphs from now on."""
    encode: Pass = GraphedPass(vae._encode_pass, 1)
    decode: Pass = GraphedPass(vae._decode_pass, SPATIAL_STRIDE**2)
    vae._encode_pass, vae._decode_pass = encode, decode  # type: ignore[method-assign,assignment]


def captured(function: Callable[[], T]) -> Callable[[], T]:
    """Runs what `function` does once more, on the same places; what it returns is overwritten when
    any graph of the process runs."""
    pool, side = _shared()
    # Compiles, and lets libraries allocate. What it writes is what the graph will write.
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.id, stream=side):  # type: ignore[arg-type]
        made = function()

    def replay() -> T:
        graph.replay()
        return made

    return replay


@cache
def _shared() -> tuple[torch.cuda.MemPool, torch.cuda.Stream]:
    """Memory and queue of all captures of a process, whose graphs run one after the other.

    A pool, because a mere handle dies with the last graph that uses it. One queue, because cuBLAS
    keeps a workspace for every queue that it was ever called on.
    """
    return torch.cuda.MemPool(), torch.cuda.Stream()


def _known(known: dict[K, T], key: K, make: Callable[[], T]) -> T:
    """What is `known` by `key`, made where it is not; the longest unused of too many is let go."""
    found = known.pop(key) if key in known else make()
    known[key] = found
    if len(known) > KEPT:
        del known[next(iter(known))]
    return found
