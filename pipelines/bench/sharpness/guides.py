"""Which guide of detail serves a model: `liveedit bench detail FOLDER --model DIR`.

The source decoded again is the guide that is always right and costs a decoding; the source blurred
as the VAE blurs it (`modeling.detail.guide`) costs next to nothing. An editor that makes the exact
edit at its working size and sends it through the model's own VAE is compared with the truth under
both, and so is one that edits nothing. Frames are uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.sample import Pair
from infra.runtime.errors import UserError
from modeling.config import WIDEST_BLUR
from modeling.detail.guide import blurred, following
from modeling.detail.noise_gate import only_edited
from modeling.detail.resample import resize
from modeling.detail.transfer import transfer
from modeling.detail.work_size import in_words
from modeling.geometry import TEMPORAL_STRIDE, TOKEN_PIXELS
from modeling.pixels import from_uint8, to_uint8
from modeling.vae.streaming import StreamingVae
from pipelines.bench.sharpness.detail import figures, psnr

BLURS = [pixels / 10 for pixels in range(round(10 * WIDEST_BLUR) + 1)]
# What a blurred guide must keep: so many dB of an unedited background, as an edit's own has to, and
# of what a decoded one reaches all but this.
BACKGROUND, LOSS = 45.0, 1.0


@dataclass(frozen=True)
class Guides:
    """Both guides of one model, by kind of edit."""

    blur: float  # pixels, the best of `BLURS`
    near: float  # dB of the blurred to the decoded source, the mean of all pairs
    rows: dict[str, dict[str, Any]]  # kind -> way -> figures

    @property
    def loss(self) -> float:
        """dB that the mean of all kinds is below the decoded guide's."""
        return self._mean("decoded", "psnr") - self._mean("blurred", "psnr")

    @property
    def background(self) -> float:
        """dB of what the blurred guide makes of a source that was not edited, mean of all pairs."""
        return self._mean("nothing edited, blurred", "psnr")

    @property
    def serves(self) -> bool:
        """Whether the blurred one does."""
        return self.background >= BACKGROUND and self.loss <= LOSS

    def told(self) -> dict[str, Any]:
        """What a model's card says of it."""
        kinds = sorted(self.rows)
        return {
            "blur": self.blur, "background_db": round(self.background, 1),
            "loss_db": round(self.loss, 1), "near_db": round(self.near, 1), "kinds": kinds,
        }  # fmt: skip

    def _mean(self, way: str, figure: str) -> float:
        return float(np.mean([found[way][figure] for found in self.rows.values()]))


def compare_guides(
    vae: StreamingVae, made: Iterable[tuple[str, Pair]], work: tuple[int, int]
) -> Guides:
    """Of pairs by kind, edited at `work` (height, width)."""
    if any(side % TOKEN_PIXELS for side in work):
        raise UserError(
            f"{in_words(work)} is no whole number of {TOKEN_PIXELS} pixels; give another work size"
        )
    cases = [_Case(kind, pair, vae, work) for kind, pair in made]
    near = {pixels: np.mean([case.near(pixels) for case in cases]) for pixels in BLURS}
    blur = max(near, key=lambda pixels: near[pixels])
    return Guides(blur, float(near[blur]), {case.kind: case.rows(blur) for case in cases})


class _Case:
    """One pair, and what the VAE makes of its source and of its edit at the working size."""

    def __init__(self, kind: str, pair: Pair, vae: StreamingVae, work: tuple[int, int]) -> None:
        self.kind = kind
        self.source, self.truth = torch.from_numpy(pair.source), torch.from_numpy(pair.target)
        self.changed = None if pair.mask is None else torch.from_numpy(np.asarray(pair.mask))
        self.small = resize(self.source, *work).contiguous()
        self.seen = round_trip(vae, self.small)
        self.edit = round_trip(vae, resize(self.truth, *work))

    def near(self, pixels: float) -> float:
        return psnr((blurred(self.small, pixels).double() - self.seen).square())

    def rows(self, pixels: float) -> dict[str, Any]:
        guide = blurred(self.small, pixels)
        ways = {
            "enlarged": resize(self.edit, *self.source.shape[1:3]),
            "decoded": transfer(self.source, self.seen, only_edited(self.seen, self.edit)),
            "blurred": self._by(guide, self.edit),
        }
        rows: dict[str, Any] = {
            way: figures(frames, self.truth, self.changed) for way, frames in ways.items()
        }
        untouched = figures(self._by(guide, self.seen), self.source, None)
        return rows | {"nothing edited, blurred": untouched}

    def _by(self, guide: Tensor, edit: Tensor) -> Tensor:
        return transfer(self.source, guide, following(guide, only_edited(guide, edit)))


@torch.no_grad()
def round_trip(vae: StreamingVae, frames: Tensor) -> Tensor:
    """Frames of whole tokens as the VAE makes them; the last one is repeated up to a latent."""
    spare = -(len(frames) - 1) % TEMPORAL_STRIDE
    whole = torch.cat([frames, frames[-1:].expand(spare, -1, -1, -1)])
    device = next(vae.parameters()).device
    latents, _ = vae.encode(from_uint8(whole.to(device).permute(0, 3, 1, 2))[None])
    pixels, _ = vae.decode(latents)
    return to_uint8(pixels[0, : len(frames)]).permute(0, 2, 3, 1).contiguous().cpu()
