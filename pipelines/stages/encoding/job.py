"""What a process that encodes pairs does: read, VAE, text encoder.

B batch, f pixel frames, F latent frames, H x W pixels, h x w latent cells.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.manifest import Shard, read_dataset_info
from data.sample import EncodedPair, Pair
from data.shard_reader import ShardFolder
from data.store import open_store
from modeling.config import ModelConfig
from modeling.model_dir import load_model
from modeling.pixels import from_uint8
from modeling.text.build import build_text_encoder
from modeling.vae.streaming import StreamingVae
from modeling.vae.wan import WanVae

Precision = Literal["fp16", "fp32"]
T = TypeVar("T")


# Frames on which float16 is compared with strict float32. Of 81 they have 98 to 99.6 % of the error
# (Wan's encoder with random weights of two kinds, H100), in two fifths of the time.
COMPARED = 33


@dataclass(frozen=True)
class EncodeJob:
    """What a process that encodes shards is told."""

    pairs: str
    model_dir: str
    batch_size: int
    threads: int
    gpus: bool | None  # null: if there is one
    precision: Precision  # of the VAE

    @property
    def on_gpu(self) -> bool:
        return self.gpus is not False and torch.cuda.is_available()

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @torch.no_grad()
    def run(self, shards: Iterable[int], skipped: int = 0) -> Iterator[tuple[EncodedPair, bool]]:
        """The pairs of these shards but the first `skipped` of the first, encoded, in order; each
        with whether float16 overflowed on it, so that it was encoded anew in float32."""
        exact, config = self._vae()
        standard = _Standard(exact)
        vae = _fast(exact) if self.precision == "fp16" else exact
        text = build_text_encoder(config.text).to(torch.device(self.device))
        for batch in self._batches(shards, skipped):
            latents = standard.encode(vae, batch)  # [2 B, F, 16, h, w]
            overflowed = vae is not exact and not bool(latents.isfinite().all())
            if overflowed:
                latents = standard.encode(exact, batch)
            embedded = text.encode([pair.instruction for pair in batch])  # [B, L, D]
            for n, pair in enumerate(batch):
                encoded = EncodedPair(
                    source=_half(latents[2 * n]),
                    target=_half(latents[2 * n + 1]),
                    text=_half(embedded[n]),
                    instruction=pair.instruction,
                    fps=pair.fps,
                    video_shape=pair.video_shape,
                    origin=pair.origin,
                )
                yield encoded, overflowed

    @torch.no_grad()
    def fp16_error(self) -> Iterator[float]:
        """How far the VAE in float16 is from itself in float32, one number: the RMS of the
        difference over the latents of the first `COMPARED` frames of the dataset's first pair, as
        a share of theirs; not finite where float16 overflows. Float32 is meant strictly here,
        without TF32."""
        vae, _ = self._vae()
        standard = _Standard(vae)
        whole = next(replace(self, batch_size=1, threads=1)._batches([0], 0))
        pair = [replace(p, source=p.source[:COMPARED], target=p.target[:COMPARED]) for p in whole]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = standard.encode(vae, pair)
        rough = standard.encode(_fast(vae), pair)
        yield float((rough - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    def _vae(self) -> tuple[StreamingVae, ModelConfig]:
        """In float32, without the rest of the model, which a GPU need not hold."""
        model = load_model(self.model_dir)
        assert model.vae is not None, f"{self.model_dir} has no VAE"
        return model.vae.to(device=self.device, dtype=torch.float32), model.config

    def _batches(self, shards: Iterable[int], skipped: int) -> Iterator[list[Pair]]:
        """Of one shard each; the next shard is fetched and read while one is encoded."""
        info = read_dataset_info(self.pairs)
        coming = [info.shards[number] for number in shards]
        starts = [skipped if place == 0 else 0 for place in range(len(coming))]
        with (
            tempfile.TemporaryDirectory() as scratch,
            ThreadPoolExecutor(self.threads) as pool,  # decoding leaves the interpreter free
        ):
            folder = ShardFolder(open_store(self.pairs), Path(scratch), keep_all=False)
            rows = (
                (shard, row)
                for shard, start in zip(coming, starts, strict=True)
                for row in range(start, shard.count)
            )
            read = partial(self._read, folder, Lock())
            pairs = _ahead(pool, read, rows, self.threads + self.batch_size)
            for place, (shard, start) in enumerate(zip(coming, starts, strict=True)):
                folder.keep({later.name for later in coming[place:]})
                for first in range(start, shard.count, self.batch_size):
                    yield list(islice(pairs, min(self.batch_size, shard.count - first)))

    def _read(self, folder: ShardFolder, fetching: Lock, place: tuple[Shard, int]) -> Pair:
        shard, row = place
        with fetching:  # by the first of the threads that come to a shard; the others wait for it
            folder.fetch(shard)
        _, sample = folder.read(shard, row)
        assert isinstance(sample, Pair), f"{self.pairs} holds encoded samples"
        return sample


def _ahead(
    pool: Executor, work: Callable[[T], Pair], items: Iterable[T], most: int
) -> Iterator[Pair]:
    """`map` in order, with at most `most` results waiting: videos are large."""
    waiting: deque[Future[Pair]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Standard:
    """Encodes with a VAE, and standardises in float32 whatever that computes in."""

    def __init__(self, vae: StreamingVae) -> None:
        self.mean, self.std = vae.mean.clone(), vae.std.clone()

    def encode(self, vae: StreamingVae, pairs: list[Pair]) -> Tensor:
        """[2 B, F, 16, h, w]: of each pair its source, then its target."""
        clips = np.stack([clip for pair in pairs for clip in (pair.source, pair.target)])
        raw, _ = vae.encode_raw(to_pixels(torch.from_numpy(clips), self.mean.device))
        return (raw.float() - self.mean) / self.std


def _fast(exact: StreamingVae) -> StreamingVae:
    """A copy in float16, and of Wan's on the kernels that streams run on; all of them sum up in
    float32, and so do norms."""
    vae = deepcopy(exact).to(torch.float16)
    if isinstance(vae, WanVae) and vae.mean.is_cuda:
        from modeling.gpu.vae import fuse  # Triton exists only where there is a GPU

        fuse(vae)
    return vae


def to_pixels(clips: Tensor, device: torch.device | str) -> Tensor:
    """uint8 [B, f, H, W, 3] -> float [B, f, 3, H, W] in [-1, 1]"""
    return from_uint8(clips.to(device).permute(0, 1, 4, 2, 3))


def _half(tensor: Tensor) -> Any:
    return tensor.to("cpu", torch.float16).numpy()
