"""Everything that only a GPU needs: compiled networks, named attention, CUDA graphs.

`accelerate` and `accelerate_vae` prepare networks once; `GraphedForward` replays the transformer
for one stream. The plain path computes the same function and is what CPUs run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kv_cache import Cached, KVCache
from .mask_cache import Reuse
from .transformer import TextKV, Transformer
from .vae import StreamingVae

# cuDNN's kernel is 1.8 times as fast as PyTorch's flash kernel on Hopper at a window's size.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def fast_attention() -> Iterator[None]:
    with sdpa_kernel(_BACKENDS, set_priority=True):
        yield


def accelerate(transformer: Transformer) -> None:
    """Compile the halves of every block and join the q, k and v projections.

    The halves are compiled once for all layers. Only for inference: parameters of the joined
    projections become views of one matrix.
    """
    _raise_recompile_limit()
    for block in transformer.layers():
        block.self_attn.join_projections()
        block.ffn = FusedFeedForward(*block.ffn)
        for half in ("project", "finish"):
            compiled = torch.compile(getattr(block, half), fullgraph=True, dynamic=False)
            setattr(block, half, compiled)


def accelerate_vae(vae: StreamingVae) -> None:
    """Channels innermost, which cuDNN's tensor-core convolutions want, and compiled passes."""
    _raise_recompile_limit()
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            _lay_out(module, torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            _lay_out(module, torch.channels_last)
    for name in ("_encode_pass", "_decode_pass"):
        setattr(vae, name, torch.compile(getattr(vae, name), dynamic=False))


def _lay_out(convolution: torch.nn.Module, layout: torch.memory_format) -> None:
    weight = convolution.weight
    assert isinstance(weight, torch.nn.Parameter)
    weight.data = weight.data.contiguous(memory_format=layout)


def _raise_recompile_limit() -> None:
    """One entry a shape: dense and pruned chunks, first and later chunks, at each size streamed."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


class FusedFeedForward(torch.nn.Sequential):
    """Linear, GELU, linear, with the GELU inside the first matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self
        assert isinstance(first, torch.nn.Linear)
        return last(linear_gelu(x, first.weight, first.bias))


@torch.library.custom_op("liveedit::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of x @ weight.T + bias; one kernel on a GPU.

    A custom operator, because torch.compile takes the fused one apart again and then writes the
    hidden layer to memory twice.
    """
    rows = x.flatten(0, -2)
    out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class GraphedForward:
    """The transformer's forwards of one stream as CUDA graphs, captured when first needed.

    There is one graph for every length of the visible window and every kind of step (plain, one
    whose outputs are stored, pruned). Whatever changes from chunk to chunk is read from memory at
    a fixed place: inputs are copied in, and the caches keep their places.
    """

    _pool: Any = None  # graph memory, shared: streams of a process replay one after the other

    def __init__(self, transformer: Transformer, cache: KVCache) -> None:
        self._transformer = transformer
        self._cache = cache
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._text: TextKV | None = None
        self._graphs: dict[tuple[int, str], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @staticmethod
    def fits(reuse: Reuse | None) -> bool:
        """Whether a graph serves: not if the number of kept tokens changes with every chunk."""
        return reuse is None or reuse.fixed_size

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        """`Transformer.forward` on this stream's cache; the result is valid until the next call."""
        if self._inputs is None or self._text is None:
            self._inputs = (noisy.clone(), source.clone(), timestep.clone())
            self._text = TextKV(text.k.clone(), text.v.clone())
        for static, new in zip(
            (*self._inputs, *self._text), (noisy, source, timestep, *text), strict=True
        ):
            if static is not new:
                static.copy_(new)
        kind = "plain" if reuse is None else "store" if reuse.tokens is None else "pruned"
        key = (self._cache.start, kind)
        if key not in self._graphs:
            self._graphs[key] = self._capture(reuse)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(self, reuse: Reuse | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        assert self._inputs is not None
        assert self._text is not None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate; writes are the same
            self._run(reuse)
        torch.cuda.current_stream().wait_stream(side)
        if GraphedForward._pool is None:
            GraphedForward._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=GraphedForward._pool):
            output = self._run(reuse)
        return graph, output

    def _run(self, reuse: Reuse | None) -> Tensor:
        assert self._inputs is not None
        assert self._text is not None
        with fast_attention():
            return self._transformer(*self._inputs, self._text, Cached(self._cache, reuse))
