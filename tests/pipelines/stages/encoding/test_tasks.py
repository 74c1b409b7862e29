"""Where encoding is done: here, in a process of its own, or by tasks on a cluster's GPUs."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.stages import encode
from pipelines.stages.encoding import job as jobs
from pipelines.stages.encoding.job import EncodeJob


@pytest.mark.parametrize("tasks", [0, 1, 2, 3])
@pytest.mark.parametrize("counts", [(3, 2, 4, 1), (1, 1, 1), (5,)])
def test_whoever_encodes_goes_on_after_what_is_done(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], tasks: int
) -> None:
    """Also in the middle of a shard, where the shards are dealt to several tasks on Ray."""

    def work(job: Any, shards: range, skipped: int) -> Iterator[tuple[int, int]]:
        pairs = ((shard, number) for shard in shards for number in range(counts[shard]))
        return islice(pairs, skipped, None)

    job: Any = SimpleNamespace(on_gpu=False, run=partial(work, None))
    info: Any = SimpleNamespace(shards=[SimpleNamespace(count=count) for count in counts])
    # What Ray does with them: the task runs elsewhere, and its results are asked for one by one.
    monkeypatch.setattr(encode, "_on_ray", lambda job, _, ahead: SimpleNamespace(remote=work))
    monkeypatch.setattr("ray.get", lambda result: result)
    everything = list(work(None, range(len(counts)), 0))
    for done in range(len(everything) + 1):
        assert list(encode._samples(job, info, tasks, done)) == everything[done:], done


def test_tasks_encode_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first shard is taken, the others' tasks come to the end of theirs: who had to wait
    for its turn would make many GPUs as slow as one."""
    counts, made, waiting = (3, 5, 4, 5), Counter[int](), threading.Event()

    def on_ray(job: Any, work: Any, ahead: int) -> Any:
        def remote(job: Any, shards: range, skipped: int) -> Iterator[tuple[int, int]]:
            # As Ray does it: `ahead` results may wait, and no more are made until one is asked for.
            results: queue.Queue[tuple[int, int]] = queue.Queue(ahead)

            def produce() -> None:
                for shard in shards:
                    for number in range(counts[shard]):
                        results.put((shard, number))
                        made[shard] += 1
                        if all(made[n] == counts[n] for n in (1, 2)):
                            waiting.set()

            threading.Thread(target=produce, daemon=True).start()
            return (results.get() for _ in range(sum(counts[n] for n in shards)))

        return SimpleNamespace(remote=remote)

    job: Any = SimpleNamespace(on_gpu=False, run=None)
    info: Any = SimpleNamespace(shards=[SimpleNamespace(count=count) for count in counts])
    monkeypatch.setattr(encode, "_on_ray", on_ray)
    monkeypatch.setattr("ray.get", lambda result: result)
    samples: Any = encode._samples(job, info, 3, 0)
    first = next(samples)
    assert waiting.wait(10)
    assert [first, *samples] == [
        (shard, n) for shard, count in enumerate(counts) for n in range(count)
    ]


@pytest.mark.parametrize("cards", [True, False])
@pytest.mark.parametrize(("gpus", "asked"), [(None, 1), (True, 1), (False, 0)])
def test_a_gpu_is_worked_on_where_there_is_one_and_none_was_meant(
    gpus: bool | None, asked: int, cards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this machine, and by a task of a cluster, which has one each to itself."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cards)
    job = EncodeJob("", "", 1, 1, gpus, "fp16")
    here = cards and bool(asked)
    assert (job.on_gpu, job.device) == (here, "cuda" if here else "cpu")
    placed: list[Any] = []
    vae = SimpleNamespace(to=lambda **where: placed.append(where))
    monkeypatch.setattr(jobs, "load_model", lambda path: SimpleNamespace(vae=vae, config="c"))
    assert job._vae()[1] == "c"
    assert placed == [{"device": job.device, "dtype": torch.float32}]
    told: list[Any] = []

    def remote(work: Any) -> Any:
        return SimpleNamespace(options=lambda **how: told.append((work, how)))

    monkeypatch.setattr("ray.remote", remote)
    encode._on_ray(job, EncodeJob.run, 7)
    ((work, how),) = told
    assert (work, how["num_gpus"]) == (EncodeJob.run, asked)
    assert how["_generator_backpressure_num_objects"] == 7


@pytest.mark.parametrize(
    ("precision", "gpus", "here", "tasks", "error"),
    [
        ("fp16", None, True, 0, 0.5),
        ("fp16", None, False, 2, 0.25),  # no GPU is here, but there
        ("fp16", None, True, 2, 0.25),
        ("fp16", None, False, 0, None),
        ("fp32", None, True, 2, None),
        ("fp16", False, False, 2, None),
    ],
)
def test_what_fp16_costs_is_asked_of_whoever_encodes(
    precision: str,
    gpus: bool | None,
    here: bool,
    tasks: int,
    error: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SimpleNamespace(remote=lambda job: iter([0.25]))
    monkeypatch.setattr(encode, "_on_ray", lambda job, work, ahead: there)
    monkeypatch.setattr("ray.get", lambda result: result)
    monkeypatch.setattr(encode, "from_own_process", lambda make: make())
    job: Any = SimpleNamespace(
        precision=precision, gpus=gpus, on_gpu=here, fp16_error=lambda: iter([0.5])
    )
    assert encode._fp16_error(job, tasks) == error
