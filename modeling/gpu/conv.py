"""The convolution of conv.cu on tensors: Wan's VAE at 96 and 192 channels, on Hopper GPUs.

Compiled by NVRTC, which PyTorch brings along, so that no compiler has to be installed.

B batch, F frames, H x W size, C channels, C' output channels; channels innermost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SOURCE = Path(__file__).with_name("conv.cu")
_CHANNELS = {(96, 96), (96, 192), (192, 192), (96, 3)}  # in and out, of what is faster than cuDNN
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}  # as PTX names them
_PIXELS = 8  # output channels that stand for three: the fewest of an instruction
_TILE_HEIGHT = 16
_THREADS = 384
_SHARED_MEMORY = 226 << 10  # bytes of a multiprocessor's 227 KiB; barriers take the rest


class CausalConvolution:
    """`conv` without its bias. It must be one that `takes` names; its weights are copied."""

    @staticmethod
    def takes(conv: nn.Conv3d) -> bool:
        return (
            (conv.in_channels, conv.out_channels) in _CHANNELS
            and conv.kernel_size == (3, 3, 3)
            and conv.weight.dtype in _TYPES
            and torch.cuda.get_device_capability(conv.weight.device) == (9, 0)
        )

    def __init__(self, conv: nn.Conv3d) -> None:
        self._out_channels = conv.out_channels
        columns = _PIXELS if conv.out_channels == 3 else conv.out_channels
        self._blocks = 2 if columns == 192 else 4  # as many as registers hold sums of
        self._weights = _ordered(conv.weight.detach(), columns)
        kind = _TYPES[conv.weight.dtype]
        self._launch = _compiled(kind, conv.in_channels, columns, self._blocks)

    def __call__(self, x: Tensor, past: Tensor | None) -> Tensor:
        """x [B, F, H, W, C] behind `past` [B, 2, H, W, C] (None is zeros) to [B, F, H, W, C'].

        Both are contiguous and of the weights' type; float16 beyond 65504 is infinite. Of three
        output channels the result is the view of [B, F, 3, H, W].
        """
        clips, frames, height, width, _ = x.shape
        if self._out_channels == 3:
            y = x.new_empty(clips, frames, 3, height, width).permute(0, 1, 3, 4, 2)
        else:
            y = x.new_empty(clips, frames, height, width, self._out_channels)
        assert x.dtype == self._weights.dtype
        assert x.is_contiguous()
        assert past is None or past.is_contiguous()
        across = -(-width // (8 * self._blocks))
        tiles = clips * frames * across * -(-height // _TILE_HEIGHT)
        pointers = (None if t is None else t.data_ptr() for t in (x, past, self._weights, y))
        self._launch(_Problem(*pointers, clips, frames, height, width, tiles, across))
        return y


class _Problem(ctypes.Structure):
    """`Problem` of conv.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "past", "weights", "y")),
        *((name, ctypes.c_int) for name in ("clips", "frames", "height", "width")),
        *((name, ctypes.c_int) for name in ("tiles", "across")),
    )


def _ordered(weight: Tensor, columns: int) -> Tensor:
    """[C', C, 3, 3, 3] -> [3, C / 16, 9, 2, columns, 8], as the kernel reads it."""
    padded = F.pad(weight, (0, 0) * 4 + (0, columns - weight.shape[0]))
    parts = padded.reshape(columns, -1, 2, 8, 3, 9)  # columns, slices, halves, 8, frames, taps
    return parts.permute(4, 1, 5, 2, 0, 3).contiguous()


def _instructions(kind: str, columns: int) -> str:
    """What of the kernel depends on the type: acc [64, columns] += pixels @ weights; rounding."""
    held = columns // 2  # sums of a thread
    names = ", ".join(f"%{i}" for i in range(held))
    sums = ", ".join(f'"+f"(acc[{i}])' for i in range(held))
    return f"""
__device__ __forceinline__ void wgmma(
    float (&acc)[{held}], unsigned long long pixels, unsigned long long weights) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
      "{{{names}}}, %{held}, %{held + 1}, 1, 1, 1, 0, 0;"
      : {sums} : "l"(pixels), "l"(weights));
}}

__device__ __forceinline__ unsigned pack(float low, float high) {{
  unsigned pair;
  asm("cvt.rn.{kind}x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}}
"""


def _steps(columns: int, blocks: int) -> tuple[int, int]:
    """How many steps lie ready in shared memory, and its bytes with the sums of 64 pixels."""
    step = 2 * 16 * (_TILE_HEIGHT + 2) * (8 * blocks + 2) + 9 * 32 * columns
    staged = 64 * (2 * columns + 16)
    count = (_SHARED_MEMORY - staged) // step
    return count, count * step + staged


@cache
def _compiled(kind: str, channels: int, columns: int, blocks: int) -> Callable[[_Problem], None]:
    """What launches the kernel for so many channels; RuntimeError if it cannot be built."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise RuntimeError(
            f"{_SOURCE.name} is compiled through cuda-bindings, without which this PyTorch came "
            f"({error}); pip install cuda-bindings"
        ) from error

    def checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise RuntimeError(
                f"{_SOURCE.name} for {channels} to {columns} channels in {kind}: {result[0]!r}"
            )
        return result[1] if len(result) > 1 else None

    stages, memory = _steps(columns, blocks)
    defined = {"CIN": channels, "COUT": columns, "BLOCKS": blocks, "STAGES": stages}
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    options += [f"-D{name}={value}".encode() for name, value in defined.items()]
    source = (_instructions(kind, columns) + _SOURCE.read_text()).encode()

    program = checked(nvrtc.nvrtcCreateProgram(source, _SOURCE.name.encode(), 0, [], []))
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result[0]) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{_SOURCE} cannot be compiled:\n{log.decode(errors='replace')}")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    checked(nvrtc.nvrtcDestroyProgram(program))

    torch.cuda.current_stream()  # the kernel is loaded into the context that PyTorch makes
    function = checked(
        driver.cuModuleGetFunction(checked(driver.cuModuleLoadData(binary)), b"convolve")
    )
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, most, memory))
    processors = torch.cuda.get_device_properties().multi_processor_count

    def launch(problem: _Problem) -> None:
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
        stream = torch.cuda.current_stream().cuda_stream
        blocks = min(problem.tiles, processors)
        size = (blocks, 1, 1, _THREADS, 1, 1, memory, stream)
        checked(driver.cuLaunchKernel(function, *size, ctypes.addressof(arguments), 0))

    return launch
