"""Runs a stage as a Ray Train job: start, follow, restart, stop, hand over the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data.manifest import DatasetInfo, dataset_hash, read_dataset_info
from infra.runtime.environment import environment, unless_set
from infra.runtime.errors import UserError
from modeling.detail.work_size import in_words
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import read_card
from pipelines.config.load import section_plain, to_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.exits import TryAgainError
from pipelines.tracking.records import training_key
from pipelines.tracking.tracker import code_commit, root_cause
from pipelines.training.follower import Follower
from pipelines.training.run_folder import Progress, RunFolder, TrainingError
from pipelines.training.taught import taught

POLL_SECONDS = 0.5
SAVE_SECONDS = 120.0  # how long Ctrl-C and SIGTERM wait for the state to be saved
_RAY_TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the controller sees that workers ended
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine, or an image to pull
}
# A Ray on this machine alone is never preempted; the watcher is one more process to start.
_PRIVATE_RAY_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@dataclass(frozen=True)
class StageOutcome:
    """A finished stage."""

    model_dir: Path
    metrics: dict[str, float]
    steps: int
    seconds: float


def train_stage(
    stage: str,
    config: PipelineConfig,
    *,
    start: Path,
    dataset: str,
    output: Path,
    extra: Mapping[str, Any],
    on_progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> StageOutcome:
    """Train `stage` from the model directory `start` and write the model directory `output`.

    A stage that was interrupted goes on from its last whole checkpoint when it is called with the
    same networks, data and losses; steps, learning rates, batches and workers may be others.

    Args:
        dataset: URI of pairs (vae) or encoded pairs (all others).
        extra: "teacher", the model directory of the scores (distill); "heldout", the pairs to
            validate on, if the stage does; if the caller has them,
            "key", the hash of everything that decides the result, and "same", the `training_key`.
        on_progress: called every `log_every` steps; None prints a line to stderr.
        say: called with a line that is worth telling; None prints it to stderr.

    Raises:
        UserError: what the user can mend: a loss that is not finite, a full disk, a broken
            dataset, too few GPUs.
    """
    began = time.monotonic()
    job = make_job(stage, config, start, dataset, output, extra)
    folder = RunFolder(Path(job["folder"]))
    with _ray(config.compute):
        folder.open()
        follow = Follower(stage, folder, on_progress, say)
        if not folder.checkpoints():
            for other in folder.others():
                follow.say(
                    f"{stage}: begins anew; what was interrupted in {other} had another start, "
                    "other data, losses or seed, and its checkpoints stay there"
                )
            if (before := _finished(job)) is not None:
                follow.say(
                    f"{stage}: begins anew; of its {before} steps the model is there, the state is "
                    "not (compute.keep_finished=true keeps it for more steps)"
                )
        made = _fit(job, folder, config.compute, follow)
    if "refused" in made:
        raise TrainingError(made["refused"])
    if not config.compute.keep_finished:
        folder.remove()
    return StageOutcome(Path(output), made["metrics"], made["steps"], time.monotonic() - began)


def _finished(job: dict[str, Any]) -> int | None:
    """How many steps the same training had when it was finished, if it asks for more now."""
    output = Path(job["output"])
    if not (output / "card.json").is_file():
        return None
    card, wanted = read_card(output), job["config"][job["stage"]]["steps"]
    same = card.get("same") == job["card"]["same"] and card["steps"] < wanted
    return int(card["steps"]) if same else None


def make_job(
    stage: str,
    config: PipelineConfig,
    start: Path,
    dataset: str,
    output: Path,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """What the workers are told: plain values, absolute paths (each works in a folder of its own).

    `folder` is named by what a training must have in common with one that it goes on from: start,
    data, teacher, losses and draws.
    """
    info = read_dataset_info(dataset)
    parent, data = model_fingerprint(start), dataset_hash(info)
    section = section_plain(getattr(config, stage))
    card = {
        "stage": stage,
        "key": extra.get("key"),
        "parent": {"path": str(start), "fingerprint": parent},
        "dataset": {"uri": dataset, "hash": data},
        "teacher": str(extra["teacher"]) if "teacher" in extra else None,
        **taught(read_card(start), info),
        "config": section,
        "compute": section_plain(config.compute),
        "seed": config.seed,
        "trained_at": trained_at(read_card(start), stage, info),
    }
    same = extra.get("same") or training_key(
        stage, section, seed=config.seed, start=parent, dataset=data, teacher=card["teacher"]
    )
    return {
        "stage": stage,
        "config": to_plain(config),
        "start": str(Path(start).absolute()),
        "dataset": _absolute(dataset),
        "output": str(Path(output).absolute()),
        "heldout": _absolute(extra["heldout"]) if extra.get("heldout") else None,
        "models": {"teacher": str(Path(extra["teacher"]).absolute())} if "teacher" in extra else {},
        "folder": str(Path(config.output).absolute() / "checkpoints" / f"{stage}-{same[:12]}"),
        "card": {**card, "same": same, "commit": code_commit()},
    }


def trained_at(card: dict[str, Any], stage: str, info: DatasetInfo) -> list[str]:
    """Sizes that a model's transformer has seen after this stage, WIDTHxHEIGHT, the newest last."""
    before: list[str] = card.get("trained_at", [])
    if stage == "vae":
        return before
    here = in_words((info.height, info.width))
    return [*(size for size in before if size != here), here]


def _absolute(dataset: str) -> str:
    return dataset if "://" in dataset else str(Path(dataset).absolute())


def _fit(
    job: dict[str, Any], folder: RunFolder, compute: ComputeConfig, follow: Follower
) -> dict[str, Any]:
    """What the first worker's `train_loop` returned."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.training.loop import train_loop

    workers, use_gpu = _workers(compute)
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    trainer = TorchTrainer(
        cast(Any, train_loop),  # Ray's annotation leaves out that a value may be returned
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=folder.path.name,
            storage_path=str(folder.path.parent),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=compute.keep_checkpoints),
        ),
    )
    defaults = _RAY_TRAIN_ENV | ({} if compute.address else _PRIVATE_RAY_ENV)
    with environment(unless_set(defaults)):
        return _in_thread(trainer.fit, follow)


def _in_thread(fit: Callable[[], Any], follow: Follower) -> dict[str, Any]:
    """Run `fit` beside us. On the main thread Ray Train would replace the handler of Ctrl-C for
    good; here Ctrl-C is an ordinary KeyboardInterrupt, which ends Ray (or leaves the cluster) and
    with it the job: Ray Train has no other way to stop one from outside."""
    import ray

    # Not the thread itself: Python 3.11 takes one for ended when Ctrl-C comes while it is joined.
    ended = threading.Event()
    results: list[Any] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(fit())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=target, daemon=True).start()
    try:
        while not ended.wait(POLL_SECONDS):
            follow()
    except KeyboardInterrupt as interrupt:
        if follow.has_begun():
            follow.folder.ask_to_stop()
            follow.say("the state is being saved; Ctrl-C again leaves it")
            with suppress(KeyboardInterrupt):
                ended.wait(SAVE_SECONDS)
        ray.shutdown()
        interrupt.add_note(follow.where_it_goes_on())
        raise
    follow()
    if errors:
        raise _plain_error(errors[0], follow) from errors[0]
    made: dict[str, Any] = results[0].return_value
    return made


def _workers(compute: ComputeConfig) -> tuple[int, bool]:
    """How many workers, and whether each has a GPU. Raises if the cluster has less."""
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = gpus > 0 if compute.gpus is None else compute.gpus
    workers = compute.workers or (gpus if use_gpu else 2)
    if use_gpu and workers > gpus:
        raise TrainingError(
            f"compute.workers={workers} with a GPU each, but the Ray cluster has {gpus} GPUs; "
            f"set compute.workers={gpus}, or compute.gpus=false"
        )
    compute.check_sharing(workers)
    cpus = resources.get("CPU", 0)
    if workers * compute.cpus_per_worker > cpus:
        raise TrainingError(
            f"compute.workers={workers} with {compute.cpus_per_worker:g} CPUs each, but the Ray "
            f"cluster has {cpus:g}; lower compute.workers or compute.cpus_per_worker"
        )
    return workers, use_gpu


@contextmanager
def _ray(compute: ComputeConfig) -> Iterator[None]:
    """The caller's Ray, or one of our own for this stage."""
    import ray

    from pipelines.training.session import ray_session

    if ray.is_initialized():
        yield
    else:
        with ray_session(compute):
            yield


def _plain_error(error: BaseException, follow: Follower) -> BaseException:
    """The worker's own error if it is one that a user can mend, a TryAgainError if a worker or its
    node was lost, and else, for a mistake in the code, Ray's."""
    from ray.train import ControllerError, PreemptionError

    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        for cause in (failure, getattr(failure, "cause", None), failure.__cause__):
            if isinstance(cause, UserError):
                return TrainingError(str(cause))
    # A worker's own exceptions come as they were raised; what Ray says itself is of their end.
    lost = [
        f"worker {rank} ({root_cause(failure)})"
        for rank, failure in sorted(failures.items())
        if type(failure).__module__.partition(".")[0] == "ray"
    ]
    if isinstance(error, (ControllerError, PreemptionError)):
        lost.append(root_cause(error))
    if not lost:
        return error
    if (hang := follow.folder.hang()) is not None:
        return TryAgainError(
            f"stage {follow.stage} stood still more often than compute.max_failures allows: "
            f"{hang}. {follow.where_it_goes_on()}"
        )
    return TryAgainError(
        f"stage {follow.stage} lost {lost[0]} more often than compute.max_failures allows. "
        f"{follow.where_it_goes_on()}"
    )
