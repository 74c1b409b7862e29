"""Runs a stage as a Ray Train job: start, follow, restart, stop, hand over the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from infra.runtime.environment import environment, unless_set
from infra.runtime.errors import UserError
from infra.runtime.ray_private import start_fewer
from modeling.model_dir import read_card
from pipelines.config.stages import ComputeConfig
from pipelines.exits import TryAgainError
from pipelines.tracking.tracker import root_cause
from pipelines.training.follower import Follower
from pipelines.training.job import Job
from pipelines.training.run_folder import RunFolder, TrainingError, TrainingReport

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
    job: Job,
    *,
    on_progress: Callable[[TrainingReport], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> StageOutcome:
    """Train, and write the model directory `job.output`.

    A stage that was interrupted goes on from its last whole checkpoint when it is called with the
    same networks, data and losses; steps, learning rates, batches and workers may be others.

    Args:
        on_progress: called every `log_every` steps; None prints a line to stderr.
        say: called with a line that is worth telling; None prints it to stderr.

    Raises:
        UserError: what the user can mend: a loss that is not finite, a full disk, a broken
            dataset, too few GPUs.
    """
    began = time.monotonic()
    stage, folder = job.stage, RunFolder(job.folder)
    with _ray(job.config.compute):
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
        made = _fit(job, folder, follow)
    if "refused" in made:
        raise TrainingError(made["refused"])
    if not job.config.compute.keep_finished:
        folder.remove()
    return StageOutcome(job.output, made["metrics"], made["steps"], time.monotonic() - began)


def _finished(job: Job) -> int | None:
    """How many steps the same training had when it was finished, if it asks for more now."""
    if not (job.output / "card.json").is_file():
        return None
    card, wanted = read_card(job.output), getattr(job.config, job.stage).steps
    same = card.get("same") == job.card["same"] and card["steps"] < wanted
    return int(card["steps"]) if same else None


def _fit(job: Job, folder: RunFolder, follow: Follower) -> dict[str, Any]:
    """What the first worker's `train_loop` returned."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.training.loop import train_loop
    from pipelines.training.told import ListeningTorch

    compute = job.config.compute
    workers, use_gpu = _workers(compute)
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    trainer = TorchTrainer(
        cast(Any, train_loop),  # Ray's annotation leaves out that a value may be returned
        train_loop_config={"job": job},
        torch_config=ListeningTorch(),
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
    start_fewer(trainer, alone=compute.address is None)
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

    from pipelines.training.cluster import ray_session

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
    lost = []
    for failure in failures.values():
        for cause in (failure, getattr(failure, "cause", None), failure.__cause__):
            if isinstance(cause, UserError):
                return TrainingError(str(cause))
            if isinstance(cause, TryAgainError):
                lost.append(str(cause))
    # A worker's own exceptions come as they were raised; what Ray says itself is of their end.
    lost += [
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
