"""What a recomputed block keeps: the results of its self-attention and of its last linear layer.

Attention is most of a block's time, and the feed-forward's second layer, which takes wide rows to
narrow ones, the most arithmetic for a row that is kept. The results of attention's linear layers
are a sixth of that for as much memory: they are kept where there is room for them.

The forward of a block writes them onto a tape, and its recomputation takes them from there. PyTorch
has a selective checkpoint, whose dispatch of every operation through Python takes four times as
long on the host as the block itself: more than a GPU needs for a chunk of a rollout.

B batch, T tokens, N heads, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

_aten = torch.ops.aten


class Tape:
    """One block's results in the order in which they are made; `products`: of all `KeptLinear`."""

    def __init__(self, products: bool) -> None:
        self.products = products
        self.kept: deque[tuple[Any, ...]] = deque()
        self.replays = False

    def result(self, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        if self.replays:
            return self.kept.popleft()
        made = make()
        self.kept.append(tuple(x.detach() if isinstance(x, Tensor) else x for x in made))
        return made


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


class _Use:
    """Within it the block that runs writes onto `tape`, or takes from it."""

    def __init__(self, tape: Tape, replays: bool) -> None:
        self._tape, self._replays = tape, replays

    def __enter__(self) -> None:
        self._tape.replays = self._replays
        self._before: Token[Tape | None] = _tape.set(self._tape)

    def __exit__(self, *_: object) -> None:
        _tape.reset(self._before)


def keeping(products: bool) -> tuple[_Use, _Use]:
    """For `torch.utils.checkpoint`: contexts of a block's forward and of its recomputation.

    `products` keeps the results of all layers that can be, not of those alone that always are.
    """
    tape = Tape(products)
    return _Use(tape, False), _Use(tape, True)


def kept_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Attention of [B, N, T, D] tensors, from the tape in a recomputation; None where nothing is
    kept: outside of `keeping`, where queries see fewer keys than they are (the text's), or with a
    kernel whose gradient asks for more than its results."""
    tape = _tape.get()
    if tape is None or k.shape[2] < q.shape[2]:
        return None
    kernel = _kernel(q, k, v)
    if kernel is None:
        return None
    out: Tensor = _KeptAttention.apply(tape, kernel, q, k, v)
    return out


class KeptLinear(nn.Linear):
    """A linear layer whose result is kept where a tape runs: `always`, or with `products` alone."""

    def __init__(self, inputs: int, outputs: int, *, always: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        tape = _tape.get()
        if tape is None or not (self.always or tape.products):
            return F.linear(x, self.weight, self.bias)
        out: Tensor = _KeptLinear.apply(tape, x, self.weight, self.bias)
        return out


class _KeptLinear(Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        made: Tensor = tape.result(lambda: (F.linear(x, weight, bias),))[0]
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            None,
            (rows @ weight).view_as(x) if for_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


# A forward of (q, k, v), whose first results are the output and the logarithms of the softmax's
# denominators, and its backward of (gradient, q, k, v, results).
_Kernel = tuple[Callable[..., tuple[Any, ...]], Callable[..., tuple[Tensor, Tensor, Tensor]]]


class _KeptAttention(Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, kernel: _Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = tape.result(lambda: kernel[0](q, k, v))
        ctx.backward_of = kernel[1]
        ctx.tensors = [isinstance(x, Tensor) for x in made]
        ctx.others = [None if isinstance(x, Tensor) else x for x in made]
        ctx.save_for_backward(q, k, v, *(x for x in made if isinstance(x, Tensor)))
        out: Tensor = made[0]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *tensors = ctx.saved_tensors
        left = iter(tensors)
        made = [
            next(left) if is_tensor else x
            for is_tensor, x in zip(ctx.tensors, ctx.others, strict=True)
        ]
        return None, None, *ctx.backward_of(gradient, q, k, v, made)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> _Kernel | None:
    """What PyTorch would take for these; None where its results do not make a gradient."""
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    if q.device.type == "cpu":
        return _CPU if chosen == SDPBackend.FLASH_ATTENTION else None
    if chosen == SDPBackend.CUDNN_ATTENTION:
        return _CUDNN
    # Of a head size that is no multiple of 8 PyTorch gives flash attention a padded copy.
    return _FLASH if chosen == SDPBackend.FLASH_ATTENTION and q.shape[-1] % 8 == 0 else None


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    made: tuple[Any, ...] = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return made


def _on_cpu_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, made: list[Any]) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, *made, 0.0, False
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    made = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
    return tuple(made[:-1])  # the last is a mask for those who look for errors


def _cudnn_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, made: list[Any]) -> Any:
    out, lse, first_q, first_k, most_q, most_k, seed, offset = made
    return _aten._scaled_dot_product_cudnn_attention_backward(
        gradient, q, k, v, out, lse, seed, offset, None, first_q, first_k, most_q, most_k, 0.0,
        False,
    )  # fmt: skip


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    made = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
    return tuple(made[:-1])


def _flash_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, made: list[Any]) -> Any:
    out, lse, first_q, first_k, most_q, most_k, seed, offset = made
    return _aten._scaled_dot_product_flash_attention_backward(
        gradient, q, k, v, out, lse, first_q, first_k, most_q, most_k, 0.0, False, seed, offset
    )


_CPU: _Kernel = (_on_cpu, _on_cpu_backward)
_CUDNN: _Kernel = (_cudnn, _cudnn_backward)
_FLASH: _Kernel = (_flash, _flash_backward)
