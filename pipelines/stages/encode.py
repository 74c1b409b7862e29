"""A dataset of pairs as a dataset of latents and text embeddings, ready to train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.manifest import DatasetInfo, dataset_hash, read_dataset_info
from data.sample import EncodedPair
from data.shards import ShardWriter, finished_dataset
from data.shards import encode as to_shard
from data.store import open_store
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import read_config
from modeling.text.build import build_text_encoder
from pipelines.stages.chain import Chain
from pipelines.stages.encoding.job import EncodeJob, Precision
from pipelines.stages.encoding.journal import Journal
from pipelines.stages.running.own_process import from_own_process
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import fingerprint_of
from pipelines.training.taught import summary

LAST_PLACE = 2**-10  # of a number in float16, in which latents are stored


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
            say=lambda line: chain.view.warn(f"encode: {line}"),
        )
        made = {"pairs": float(info.samples), "fp16": float(info.made_by["precision"] == "fp16")}
        error = info.made_by.get("fp16_error")
        return made if error is None else made | {"fp16_error": error}

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
    precision: Precision = "fp16",
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> DatasetInfo:
    """Encode the dataset at `pairs` with the VAE and text encoder of `model_dir` into `encoded`.

    `tasks` Ray tasks share the shards, each with a GPU unless `gpus` is false; 0 does it here, or
    in a process that ends where there is a GPU. There `precision` "fp16" lets the VAE run in
    float16 if that changes the latents of the first pair by no more than `LAST_PLACE`, which
    `say` is told; else it runs in float32, as it does on a CPU. A pair on which float16 overflows
    after all is encoded in float32; `say` hears of the first.
    `threads` read and decode videos. The samples' order is that of `pairs` in any case. The new
    dataset's `made_by` names the pairs, the model and the text encoder by their hashes, the
    precision, and what is asked for in it (`pipelines.training.taught`).

    What an interrupted call with the same arguments has written is kept: it goes on after the last
    whole shard.
    """
    info = read_dataset_info(pairs)
    job = EncodeJob(pairs, str(model_dir), batch_size, threads, gpus, precision)
    error = _fp16_error(job, tasks)
    taken: Precision = "fp16" if error is not None and error <= LAST_PLACE else "fp32"
    if error is not None and not math.isfinite(error):
        say("latents are made in fp32; those of the first pair are too large for fp16")
        error = None
    elif error is not None:
        say(
            f"latents are made in {taken}; fp16 changes those of the first pair by {error:.1e} of "
            f"their size (RMS), its last place is {LAST_PLACE:.1e}"
        )
    job = replace(job, precision=taken)
    made_by: dict[str, Any] = {
        "tool": "liveedit",
        "pairs": pairs,
        "pairs_hash": dataset_hash(info),
        "model": str(model_dir),
        "model_hash": model_fingerprint(model_dir),
        "text_hash": build_text_encoder(read_config(model_dir).text).fingerprint(),
        "precision": taken,
    }
    store = open_store(encoded)
    finished_dataset(store, encoded, overwrite=True)
    journal = Journal(store, made_by | {"samples_per_shard": samples_per_shard})
    with store.scratch() as scratch:
        writer = ShardWriter(
            encoded, store, scratch, samples_per_shard, shards=journal.shards, like=journal.like
        )
        samples, said = _samples(job, info, tasks, writer.total), False
        for done, (sample, overflowed) in enumerate(samples, writer.total + 1):
            if overflowed and not said:
                say(
                    f"latents of pair {done} are too large for fp16; it, and whatever pair comes "
                    "that is like it, is encoded in fp32"
                )
                said = True
            journal.asked[sample.instruction] += 1
            if writer.add(to_shard(sample)):
                journal.keep(scratch, writer)
            on_sample(done, info.samples)
        measured = {} if error is None else {"fp16_error": error}
        made = writer.finish(made_by | measured | {"taught": summary(journal.asked)})
    journal.remove()
    return made


def _fp16_error(job: EncodeJob, tasks: int) -> float | None:
    """See `EncodeJob.fp16_error`; None where fp16 is not asked for, or there is no GPU."""
    if job.precision == "fp32" or job.gpus is False or not (tasks or job.on_gpu):
        return None
    if tasks:
        import ray

        return float(ray.get(next(_on_ray(job, EncodeJob.fp16_error, 1).remote(job))))
    (error,) = from_own_process(job.fp16_error)
    return error


def _samples(
    job: EncodeJob, info: DatasetInfo, tasks: int, done: int
) -> Iterator[tuple[EncodedPair, bool]]:
    """All after the first `done`, see `EncodeJob.run`."""
    first = 0
    while first < len(info.shards) and done >= info.shards[first].count:
        done -= info.shards[first].count
        first += 1
    shards = range(first, len(info.shards))
    if tasks:
        return _encode_on_ray(job, info, shards, done, tasks)
    work = partial(job.run, shards, done)
    return from_own_process(work) if job.on_gpu else work()


def _encode_on_ray(
    job: EncodeJob, info: DatasetInfo, shards: range, skipped: int, tasks: int
) -> Iterator[tuple[EncodedPair, bool]]:
    """Task i encodes `shards` i, i + tasks, ...; they are taken back in the dataset's order. So
    each may have a whole shard waiting for us, or it would stand still until its turn."""
    import ray

    run = _on_ray(job, EncodeJob.run, max((info.shards[n].count for n in shards), default=1))
    left = {shard: info.shards[shard].count for shard in shards}
    left[shards.start] = left.get(shards.start, skipped) - skipped  # pairs of each
    parts = [shards[task::tasks] for task in range(tasks)]
    streams = [run.remote(job, part, 0 if task else skipped) for task, part in enumerate(parts)]
    for place, shard in enumerate(shards):
        for _ in range(left[shard]):
            yield ray.get(next(streams[place % tasks]))


def _on_ray(job: EncodeJob, work: Callable[..., Iterator[Any]], ahead: int) -> Any:
    """A Ray task of `work`, which pauses when `ahead` of its results wait to be asked for."""
    import ray

    return ray.remote(work).options(
        num_cpus=1,
        num_gpus=0 if job.gpus is False else 1,
        _generator_backpressure_num_objects=ahead,
    )


def _tasks(chain: Chain) -> int:
    """A task a GPU of the cluster or of this machine; 0, none on Ray, if there are not two."""
    compute = chain.config.compute
    if compute.gpus is False or (compute.address is None and torch.cuda.device_count() < 2):
        return 0
    chain.start_ray()
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    return min(gpus, compute.workers or gpus)
