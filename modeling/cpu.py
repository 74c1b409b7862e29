"""What makes an editor's networks fast on a CPU; `modeling.gpu.accelerate` is the GPU's."""

from __future__ import annotations

import torch

from modeling.vae.folded import FoldedVae
from modeling.vae.streaming import StreamingVae

# Instructions that multiply bfloat16 at twice the rate of float32, by PyTorch's names.
BFLOAT16 = ("avx512_bf16", "amx_bf16")


def multiplies_bfloat16() -> bool:
    """Whether this CPU does; one that does not is slower with bfloat16 than with float32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in BFLOAT16)


def accelerate(vae: StreamingVae) -> None:
    """Put the weights of a `FoldedVae` in bfloat16, for inference only.

    Nearly all of its time is in convolutions, which then take half of it, for a third of a grey
    level. Its statistics stay in float32, so that latents do. The transformer stays as it is: its
    attention, which is most of it, is slower in bfloat16.
    """
    if isinstance(vae, FoldedVae):
        for weight in vae.parameters():
            weight.data = weight.data.bfloat16()
