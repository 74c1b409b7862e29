"""What a process that encodes pairs does: read, VAE, text encoder.

B batch, f pixel frames, F latent frames, H x W pixels, h x w latent cells.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.manifest import Shard, read_dataset_info
from data.sample import EncodedPair, Pair
from data.shard_reader import ShardFolder
from data.store import open_store
from modeling.model_dir import load_model
from modeling.pixels import from_uint8
from modeling.text.build import build_text_encoder
from modeling.vae.streaming import StreamingVae
from modeling.vae.wan import WanVae


@dataclass(frozen=True)
class EncodeJob:
    """What a process that encodes shards is told."""

    pairs: str
    model_dir: str
    batch_size: int
    threads: int
    gpus: bool | None  # null: if there is one
    precision: Literal["bf16", "fp32"]  # of the VAE on a GPU

    @property
    def on_gpu(self) -> bool:
        return self.gpus is not False and torch.cuda.is_available()

    @torch.no_grad()
    def run(self, shards: Iterable[int], skipped: int = 0) -> Iterator[EncodedPair]:
        """The pairs of these shards but the first `skipped` of the first, encoded, in order."""
        device = "cuda" if self.on_gpu else "cpu"
        model = load_model(self.model_dir, device=device, dtype=torch.float32)
        model.transformer = None
        assert model.vae is not None, f"{self.model_dir} has no VAE"
        vae = model.vae
        mean, std = vae.mean.clone(), vae.std.clone()  # in float32, like what is made of them
        if self.on_gpu and self.precision == "bf16":
            vae = _fast(vae)
        text = build_text_encoder(model.config.text).to(torch.device(device))
        for batch in self._batches(shards, skipped):
            clips = np.stack([clip for pair in batch for clip in (pair.source, pair.target)])
            raw, _ = vae.encode_raw(to_pixels(torch.from_numpy(clips), device))
            latents = (raw.float() - mean) / std  # [2 B, F, 16, h, w]
            embedded = text.encode([pair.instruction for pair in batch])  # [B, L, D]
            for n, pair in enumerate(batch):
                yield EncodedPair(
                    source=_half(latents[2 * n]),
                    target=_half(latents[2 * n + 1]),
                    text=_half(embedded[n]),
                    instruction=pair.instruction,
                    fps=pair.fps,
                    video_shape=pair.video_shape,
                    origin=pair.origin,
                )

    def _batches(self, shards: Iterable[int], skipped: int) -> Iterator[list[Pair]]:
        info = read_dataset_info(self.pairs)
        with (
            tempfile.TemporaryDirectory() as scratch,
            ThreadPoolExecutor(self.threads) as pool,  # decoding leaves the interpreter free
        ):
            folder = ShardFolder(open_store(self.pairs), Path(scratch), keep_all=False)
            for number in shards:
                shard = info.shards[number]
                folder.keep({shard.name})
                folder.read(shard, 0)  # fetched and checked once, before the threads come
                read = partial(self._read, folder, shard)
                rows, skipped = range(skipped, shard.count), 0
                pairs = _ahead(pool, read, rows, self.threads + self.batch_size)
                while batch := list(islice(pairs, self.batch_size)):
                    yield batch

    def _read(self, folder: ShardFolder, shard: Shard, row: int) -> Pair:
        _, sample = folder.read(shard, row)
        assert isinstance(sample, Pair), f"{self.pairs} holds encoded samples"
        return sample


def _ahead(
    pool: Executor, work: Callable[[int], Pair], items: Iterable[int], most: int
) -> Iterator[Pair]:
    """`map` in order, with at most `most` results waiting: videos are large."""
    waiting: deque[Future[Pair]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _fast(vae: StreamingVae) -> StreamingVae:
    """In bf16, and Wan's on the kernels that streams run on."""
    vae = vae.to(torch.bfloat16)
    if isinstance(vae, WanVae):
        from modeling.gpu.vae import fuse  # Triton exists only where there is a GPU

        fuse(vae)
    return vae


def to_pixels(clips: Tensor, device: torch.device | str) -> Tensor:
    """uint8 [B, f, H, W, 3] -> float [B, f, 3, H, W] in [-1, 1]"""
    return from_uint8(clips.to(device).permute(0, 1, 4, 2, 3))


def _half(tensor: Tensor) -> Any:
    return tensor.to("cpu", torch.float16).numpy()
