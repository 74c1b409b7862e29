"""CLIP text alignment: how near an edit is to its instruction, for users who have CLIP's weights.

Of the frames of every second, with CLIP's own size, crop and normalisation:

    clip_text       mean cosine of the edit's picture and the instruction's text
    clip_text_gain  that less the same of the source: what the edit moved towards the words

An instruction is not a description of the result, so only systems on the same clips compare.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infra.runtime.errors import UserError

BATCH = 32  # pictures


class Alignment:
    """A CLIP model from a folder in the layout of transformers; nothing is downloaded."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoProcessor, CLIPModel

        wanted = (
            "give the folder of config.json, model.safetensors, preprocessor_config.json and the "
            "tokenizer's files"
        )
        if not (Path(folder) / "config.json").is_file():  # else taken for a name on a hub
            raise UserError(f"clip={folder} holds no CLIP model: no config.json is there; {wanted}")
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"clip={folder} holds no CLIP model in the layout of transformers "
                f"({str(error).splitlines()[0]}); {wanted}"
            ) from error

    @torch.no_grad()
    def measure(
        self, instruction: str, source: np.ndarray, edit: np.ndarray, fps: int
    ) -> dict[str, float]:
        """The metrics above of a clip, uint8 [F, H, W, 3] at `fps` frames a second."""
        words = self._processor(text=[instruction], return_tensors="pt", truncation=True)
        text = F.normalize(_features(self._model.get_text_features(**words)), dim=-1)[0]
        edited, unedited = (self._toward(text, video[fps // 2 :: fps]) for video in (edit, source))
        return {"clip_text": edited, "clip_text_gain": edited - unedited}

    def _toward(self, text: Tensor, frames: np.ndarray) -> float:
        """Mean cosine of frames uint8 [n, H, W, 3] and a text of length 1, [dim]."""
        cosines = []
        for first in range(0, len(frames), BATCH):
            pictures = list(frames[first : first + BATCH])
            pixels = self._processor(images=pictures, return_tensors="pt")
            found = _features(self._model.get_image_features(**pixels))
            cosines.append(F.normalize(found, dim=-1) @ text)
        return float(torch.cat(cosines).mean())


def _features(found: Tensor | object) -> Tensor:
    """[n, dim], which versions of transformers hand out bare or as an output's pooled part."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output  # type: ignore[attr-defined]
    return features
