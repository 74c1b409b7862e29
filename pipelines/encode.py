"""A dataset of pairs as a dataset of latents and text embeddings, ready to train on.

B batch, f pixel frames, F latent frames, H x W pixels, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from data.loader import loader
from data.manifest import DatasetInfo, dataset_hash, read_dataset_info
from data.sample import EncodedPair
from data.shards import write_dataset
from modeling.model_dir import load_model
from modeling.text import build_text_encoder
from pipelines.records import model_fingerprint


@torch.no_grad()
def encode_dataset(
    pairs: str,
    encoded: str,
    model_dir: Path,
    *,
    batch_size: int,
    samples_per_shard: int,
    loader_workers: int = 0,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetInfo:
    """Encode the dataset at `pairs` with the VAE and text encoder of `model_dir` into `encoded`.

    The new dataset's `made_by` names the pairs, the model and the text encoder by their hashes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    info = read_dataset_info(pairs)
    model = load_model(model_dir, device=device, dtype=torch.float32)
    assert model.vae is not None, f"{model_dir} has no VAE"
    vae: Any = model.vae
    text = build_text_encoder(model.config.text).to(torch.device(device))
    fps = float(info.fps)
    shape = (info.frames, info.height, info.width)

    def samples() -> Iterator[EncodedPair]:
        done = 0
        batches = loader(
            pairs,
            batch_size=batch_size,
            rank=0,
            world_size=1,
            seed=0,
            shuffle=False,
            epochs=1,
            workers=loader_workers,
        )
        for batch in batches:
            source, _ = vae.encode(to_pixels(batch["source"], device))  # [B, F, 16, h, w]
            target, _ = vae.encode(to_pixels(batch["target"], device))
            embedded = text.encode(batch["instruction"])  # [B, L, D]
            mask = cell_share(torch.as_tensor(batch["mask"]))
            for n, instruction in enumerate(batch["instruction"]):
                yield EncodedPair(
                    source=_half(source[n]),
                    target=_half(target[n]),
                    text=_half(embedded[n]),
                    mask=_half(mask[n]),
                    instruction=instruction,
                    fps=fps,
                    video_shape=shape,
                )
                done += 1
                on_sample(done, info.samples)

    made_by = {
        "tool": "liveedit encode",
        "pairs": pairs,
        "pairs_hash": dataset_hash(info),
        "model": str(model_dir),
        "model_hash": model_fingerprint(model_dir),
        "text_hash": text.fingerprint(),
    }
    return write_dataset(
        encoded,
        samples(),
        made_by=made_by,
        samples_per_shard=samples_per_shard,
        overwrite=True,
    )


def to_pixels(clips: Any, device: torch.device | str) -> Tensor:
    """uint8 [B, f, H, W, 3] -> float [B, f, 3, H, W] in [-1, 1]"""
    return torch.as_tensor(clips).to(device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def cell_share(mask: Tensor) -> Tensor:
    """bool [B, f, H, W] -> float [B, F, H/8, W/8]: the share of edited pixels in a latent cell.

    The first latent covers one frame, every other four.
    """
    first = mask[:, :1].float().repeat(1, 4, 1, 1)
    return avg_pool3d(torch.cat([first, mask[:, 1:].float()], dim=1), (4, 8, 8))


def _half(tensor: Tensor) -> Any:
    return tensor.to("cpu", torch.float16).numpy()
