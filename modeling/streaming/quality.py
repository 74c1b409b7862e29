"""How much a stream is worth: at which size, with how many steps and tokens it is edited.

All of it may change between two chunks, so that a server under pressure edits everybody a little
less well instead of somebody not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from modeling.config import MaskCacheConfig, StreamConfig

SPARED = 0.5  # of a mask cache's usual budget is left when it is sparing
FEWEST = 4  # steps that a model needs to go without half of them


@dataclass(frozen=True)
class Quality:
    work: tuple[int, int]  # height and width at which the networks see the frames
    sparing: bool = False  # the mask cache keeps fewer tokens; without one this changes nothing
    halved: bool = False  # every second step is left out, of a model that has `FEWEST`


def kept_steps(settings: StreamConfig, quality: Quality) -> list[int]:
    """Indices of the model's steps that are done: the first, which finds the edit, is one."""
    steps = list(range(len(settings.timesteps)))
    return steps[::2] if quality.halved and len(steps) >= FEWEST else steps


def mask_cache_of(
    usual: MaskCacheConfig | None, settings: StreamConfig, quality: Quality
) -> MaskCacheConfig | None:
    """The mask cache of a stream of this quality, of a model that has the `usual` one.

    The last step stays whole if it was.
    """
    if usual is None:
        return None
    kept, last = kept_steps(settings, quality), len(settings.timesteps) - 1
    pruned = [n for n, step in enumerate(kept) if step in usual.pruned_steps]
    if last not in usual.pruned_steps:
        pruned = [n for n in pruned if n < len(kept) - 1]
    config = replace(usual, pruned_steps=tuple(pruned))
    if not quality.sparing:
        return config
    return replace(config, keep_ratio=SPARED * usual.keep_ratio, threshold=usual.threshold / SPARED)


def at_size(chunk: Tensor, height: int, width: int) -> Tensor:
    """Latents [2, F, C, h, w] of a history, float16, as if they had been seen at another size.

    Interpolated as they are. Decoding, resizing and encoding them again takes four times as long
    and comes no nearer to a stream that was edited at the new size from the start.
    """
    size, flat = (height, width), chunk.flatten(0, 1).float()
    new = F.interpolate(flat, size=size, mode="bilinear", antialias=True).half()
    return new.unflatten(0, chunk.shape[:2])
