"""A dataset of pairs as a dataset of latents and text embeddings, ready to train on.

B batch, f pixel frames, F latent frames, H x W pixels, h x w latent cells.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
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

from data.manifest import DatasetInfo, Shard, dataset_hash, read_dataset_info
from data.sample import EncodedPair, Pair
from data.shard_reader import ShardFolder
from data.shards import write_dataset
from data.store import open_store
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import load_model, read_config
from modeling.pixels import from_uint8
from modeling.text.build import build_text_encoder
from modeling.vae.streaming import StreamingVae
from modeling.vae.wan import WanVae
from pipelines.stages.chain import Chain
from pipelines.stages.running.own_process import from_own_process
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import fingerprint_of
from pipelines.training.taught import summary

_AHEAD = 2  # encoded pairs that a Ray task may have waiting for us


def encode(chain: Chain, model: Path, pairs: str) -> str:
    """The training pairs in `model`'s latents; "" if no stage reads them, as making them can take
    longer than training a VAE."""
    config = chain.config
    if not any(getattr(config, stage).steps for stage in ("foundation", "causal", "distill")):
        chain.runner.pass_over("encode", "no stage trains on latents")
        return ""
    target = str(chain.output / "data" / "encoded")

    def make(run: Run, key: str) -> dict[str, float]:
        run.log_input("pairs", pairs, "encoding")
        run.used({"model": model})
        info = encode_dataset(
            pairs,
            target,
            model,
            batch_size=config.data.encode_batch,
            samples_per_shard=config.data.samples_per_shard,
            threads=max(1, config.compute.loader_workers),
            tasks=_tasks(chain),
            gpus=config.compute.gpus,
            precision=config.data.encode_precision,
            on_sample=lambda n, of: chain.view.update("encode", n, of, f"{n}/{of} pairs"),
        )
        return {"pairs": float(info.samples)}

    inputs = {
        "model": fingerprint_of(model),
        "pairs": fingerprint_of(pairs),
        "samples_per_shard": config.data.samples_per_shard,
        "precision": config.data.encode_precision,
    }
    return chain.run("encode", inputs, target, make).output


def encode_dataset(
    pairs: str,
    encoded: str,
    model_dir: Path,
    *,
    batch_size: int,
    samples_per_shard: int,
    threads: int = 1,
    tasks: int = 0,
    gpus: bool | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetInfo:
    """Encode the dataset at `pairs` with the VAE and text encoder of `model_dir` into `encoded`.

    `tasks` Ray tasks share the shards, each with a GPU unless `gpus` is false; 0 does it here, or
    in a process that ends where there is a GPU. `precision` is the VAE's on a GPU.
    `threads` read and decode videos. The samples' order is that of `pairs` in any case. The new
    dataset's `made_by` names the pairs, the model and the text encoder by their hashes, and what
    is asked for in it (`pipelines.training.taught`).
    """
    info = read_dataset_info(pairs)
    job = EncodeJob(pairs, str(model_dir), batch_size, threads, gpus, precision)
    work = partial(job.run, range(len(info.shards)))
    if tasks:
        samples = _encode_on_ray(job, info, tasks)
    else:
        samples = from_own_process(work) if job.on_gpu else work()

    asked: Counter[str] = Counter()

    def counted() -> Iterator[EncodedPair]:
        for done, sample in enumerate(samples, start=1):
            asked[sample.instruction] += 1
            yield sample
            on_sample(done, info.samples)
        made_by["taught"] = summary(asked)  # before it is written: all samples are

    made_by: dict[str, Any] = {
        "tool": "liveedit",
        "pairs": pairs,
        "pairs_hash": dataset_hash(info),
        "model": str(model_dir),
        "model_hash": model_fingerprint(model_dir),
        "text_hash": build_text_encoder(read_config(model_dir).text).fingerprint(),
    }
    return write_dataset(
        encoded, counted(), made_by=made_by, samples_per_shard=samples_per_shard, overwrite=True
    )


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
    def run(self, shards: Iterable[int]) -> Iterator[EncodedPair]:
        """The pairs of these shards, encoded, in their order."""
        device = "cuda" if self.on_gpu else "cpu"
        model = load_model(self.model_dir, device=device, dtype=torch.float32)
        model.transformer = None
        assert model.vae is not None, f"{self.model_dir} has no VAE"
        vae = model.vae
        mean, std = vae.mean.clone(), vae.std.clone()  # in float32, like what is made of them
        if self.on_gpu and self.precision == "bf16":
            vae = _fast(vae)
        text = build_text_encoder(model.config.text).to(torch.device(device))
        for batch in self._batches(shards):
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

    def _batches(self, shards: Iterable[int]) -> Iterator[list[Pair]]:
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
                pairs = _ahead(pool, read, range(shard.count), self.threads + self.batch_size)
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


def _encode_on_ray(job: EncodeJob, info: DatasetInfo, tasks: int) -> Iterator[EncodedPair]:
    """Task i encodes shards i, i + tasks, ...; they are taken back in the dataset's order."""
    import ray

    run: Any = ray.remote(EncodeJob.run).options(
        num_cpus=1,
        num_gpus=0 if job.gpus is False else 1,
        _generator_backpressure_num_objects=_AHEAD,
    )
    everything = range(len(info.shards))
    streams = [run.remote(job, everything[task::tasks]) for task in range(tasks)]
    for number, shard in enumerate(info.shards):
        for _ in range(shard.count):
            yield ray.get(next(streams[number % tasks]))


def _tasks(chain: Chain) -> int:
    """A task a GPU of the cluster or of this machine; 0, none on Ray, if there are not two."""
    compute = chain.config.compute
    if compute.gpus is False or (compute.address is None and torch.cuda.device_count() < 2):
        return 0
    chain.start_ray()
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    return min(gpus, compute.workers or gpus)


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
