"""The one place that chooses what only a GPU runs: fused networks and CUDA graphs.

`accelerate` prepares an editor's networks once and says what runs a stream's forwards. The plain
path (`streaming.forward.PlainForward`) computes the same function and is what CPUs run.
"""

from __future__ import annotations

from functools import partial

import torch

from infra.runtime.errors import UserError
from modeling.detail.guide import Follow
from modeling.detail.resample import Resize
from modeling.detail.transfer import Transfer
from modeling.diffusion.transformer import Transformer
from modeling.streaming.forward import ForwardOn
from modeling.vae.streaming import StreamingVae
from modeling.vae.wan import WanVae


def accelerate(transformer: Transformer, vae: StreamingVae, *, fp8: bool) -> ForwardOn:
    """Make an editor's networks fast on their GPU, for inference only.

    Parameters are laid out anew, the VAE's passes are replaced, and all kernels are compiled. `fp8`
    computes most of the transformer's linear layers in 8 bits; UserError if the GPU cannot.
    """
    # Here, because Triton exists only where there is a GPU.
    from modeling.gpu.graphs import Desk, GraphedForward, graph_passes
    from modeling.gpu.rehearsal import rehearse
    from modeling.gpu.transformer import FusedTransformer
    from modeling.gpu.vae import fuse

    capability = torch.cuda.get_device_capability()
    if fp8 and capability < (8, 9):
        raise UserError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada) or newer, "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; leave it out"
        )
    if isinstance(vae, WanVae):
        fuse(vae)
    fused = FusedTransformer(transformer, fp8=fp8)
    rehearse(transformer, fused, vae)
    graph_passes(vae)
    return partial(GraphedForward, Desk(fused))


def fast_detail() -> tuple[Resize, Follow, Transfer]:
    """`modeling.detail`'s `resize`, `following` and `transfer`, fused."""
    from modeling.gpu.kernels.guide import following
    from modeling.gpu.kernels.resize import resize
    from modeling.gpu.kernels.transfer import transfer

    return resize, following, transfer
