"""The training loop that all stages share; it runs in every Ray Train worker."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.loader import loader
from infra.runtime.environment import set_default
from infra.runtime.errors import UserError
from modeling.model_dir import Model, load_model, save_model
from pipelines.config.load import from_plain
from pipelines.training import checkpoint
from pipelines.training.engines import learning_rate_at, set_learning_rate
from pipelines.training.methods.base import Setting, Stage
from pipelines.training.methods.table import build_stage
from pipelines.training.run_folder import Progress, RunFolder, TrainingError
from pipelines.training.speed import Speed
from pipelines.training.system import system_metrics
from pipelines.training.validation import Validation


def train_loop(job: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; `job` is made by `trainer.train_stage`.

    Returns {"metrics", "steps"}, {"stopped": steps} after the driver asked for it and the state was
    saved, or {"refused": message} where an earlier try found that going on
    is of no use: Ray restarts workers after any error, this is how a restart learns that it must
    not repeat one.
    """
    folder = RunFolder(Path(job["folder"]))
    if (message := folder.refusal()) is not None:
        return {"refused": message}
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    setting = make_setting(
        job, context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )

    folder.clear_part(context.get_world_rank())

    def keep(part: Path, step: int) -> None:
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(part))
        # The report is only queued. Until Ray's controller has taken it, the end of this training
        # would lose a checkpoint that lies whole on the disk.
        ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)

    def is_leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    # A Ray of our own is on this machine alone, which tells nobody before it goes.
    leaving = is_leaving if setting.config.compute.address else None
    try:
        return Training(setting, folder).run(job, keep, leaving)
    except torch.OutOfMemoryError as error:
        message = (
            f"stage {setting.stage} ran out of GPU memory ({str(error).splitlines()[0]}); lower "
            f"{setting.stage}.batch_size, set compute.activation_checkpointing=true, or raise "
            "compute.zero_stage"
        )
        folder.refuse(message)
        raise TrainingError(message) from error
    except UserError as error:
        folder.refuse(str(error))
        raise


class Training:
    """One worker's part of a stage's training, from the last whole checkpoint in `folder`."""

    def __init__(self, setting: Setting, folder: RunFolder) -> None:
        _prepare(setting)
        self.setting, self.folder = setting, folder
        saved, wrong = checkpoint.choose(folder, setting)
        self.model = load_model(setting.start, device=setting.device, dtype=torch.float32)
        self.stage = build_stage(setting, self.model)
        self.batches = loader(
            setting.dataset,
            batch_size=setting.section.batch_size,
            rank=setting.data_rank,
            world_size=setting.data_workers,
            seed=setting.seed,
            workers=setting.config.compute.loader_workers,
            cache=setting.config.compute.shard_cache,
        )
        self.done = 0  # steps
        self.epochs = 0.0  # how often the data was read
        if saved is not None:
            self.done, self.epochs = checkpoint.load(saved, setting, self.stage, self.batches)
            self._say_where(saved, wrong)

    def run(
        self,
        job: dict[str, Any],
        keep: Callable[[Path, int], None],
        leaving: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Train to the end and export; `keep` takes a folder with this rank's checkpoint, and
        `leaving` says whether a worker's machine is about to be taken away: a collective."""
        validation = self._validation(job)
        metrics = self.train(keep, validation, leaving)
        if metrics is None:
            return {"stopped": self.done}
        metrics = metrics | validation.last
        output = Path(job["output"])
        _export(self.setting, self.stage, self.model, job, metrics, self.done, output)
        if self.setting.rank == 0 and (best := validation.take_best(output)) is not None:
            metrics |= best["metrics"]
        return {"metrics": metrics, "steps": self.done}

    def train(
        self,
        keep: Callable[[Path, int], None],
        validation: Validation | None = None,
        leaving: Callable[[], bool] | None = None,
    ) -> dict[str, float] | None:
        """All steps, or until `validation` has enough; the last metrics, or None if it was asked to
        stop and has saved its state."""
        section, stage = self.setting.section, self.stage
        meter = Meter(self.setting, self.folder, resumed=self.done > 0)
        calls = Calls(self.setting, self.folder, leaving)
        stream = iter(self.batches)
        for step in range(self.done, section.steps):
            for name, engine in stage.engines.items():
                rate = learning_rate_at(step, section, stage.learning_rates[name])
                set_learning_rate(engine, rate)
                meter.rates[f"learning_rate_{name}"] = rate
            for micro in range(section.grad_accumulation):
                with meter.speed.waiting():
                    batch = next(stream)
                with _stepping(self.setting):
                    metrics = stage.step(batch, self.setting.draw(step, micro))
                meter.add(metrics, step)
                meter.speed.work(stage.flops(batch, step), self.setting.sharing)
            self.done = step + 1
            self.epochs += section.batch_size * section.grad_accumulation / self._samples
            last = self.done == section.steps
            call = calls.after_step()
            saves = (self.done % section.checkpoint_every == 0 or call > 0) and not last
            if self.done % section.log_every == 0 or last or saves:
                meter.report(self.done, learning_rate_at(step, section, section.learning_rate))
            if saves:
                self._save(keep)
                calls.saved()
                if call & STOP:
                    return None
            if validation is not None and validation.is_due(self.done):
                with meter.not_counted():
                    enough = validation(self.done)
                if enough:
                    break
        return meter.last

    def _validation(self, job: dict[str, Any]) -> Validation:
        def export(target: Path) -> None:
            _export(self.setting, self.stage, self.model, job, {}, self.done, target)

        return Validation(self.setting, self.stage, self.model, self.folder, export)

    @property
    def _samples(self) -> int:
        """Of this rank, an epoch."""
        return self.batches.info.samples // self.setting.data_workers

    def _say_where(self, saved: Path, wrong: list[str]) -> None:
        if self.setting.rank != 0:
            return
        for damage in wrong:
            self.folder.say(f"a checkpoint is damaged and passed over: {damage}")
        changed = checkpoint.changed_settings(saved, self.setting)
        with_others = f", with other settings: {', '.join(changed)}" if changed else ""
        self.folder.say(f"goes on from its checkpoint at step {self.done}{with_others}")

    def _save(self, keep: Callable[[Path, int], None]) -> None:
        setting, place = self.setting, self.batches.state_dict()
        with self.folder.part(setting.rank) as part:
            checkpoint.save(part, setting, self.stage, self.done, place, self.epochs)
            try:
                keep(part, self.done)
            except OSError as error:
                raise checkpoint.writing_failed(error, part, setting.stage, self.done) from error


SAVE, STOP, ASK = 1, 2, 4  # bits
ASK_SECONDS = 10.0  # between two questions whether a machine is about to leave, which take a while
_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Calls:
    """Between two steps: must the state be saved, by the clock, because the driver is stopped, or
    because a machine is about to be taken away?

    All workers get the same answer at the same step, one step after the call, so that none waits
    for a device that is busy with the step just begun.
    """

    def __init__(
        self, setting: Setting, folder: RunFolder, leaving: Callable[[], bool] | None = None
    ) -> None:
        self.setting, self.folder, self.leaving = setting, folder, leaving
        self.seconds = 60 * setting.section.checkpoint_minutes
        self._last = torch.zeros((), dtype=torch.int64, device=setting.device)
        self._asked = time.monotonic()
        self._left = False  # saved for that: the machine goes, this process with it or without
        self.saved()

    def saved(self) -> None:
        self._since = time.monotonic()
        self._last.zero_()

    def after_step(self) -> int:
        """SAVE, STOP or 0, the same on all workers; a collective."""
        call = 0
        if self.setting.rank == 0:
            now = time.monotonic()
            due = self.seconds > 0 and now - self._since >= self.seconds
            call = STOP if self.folder.is_to_stop() else SAVE if due else 0
            if self.leaving and not self._left and now - self._asked >= ASK_SECONDS:
                call, self._asked = call | ASK, now
        last, self._last = self._last, torch.full_like(self._last, call)
        distributed.all_reduce(self._last, op=distributed.ReduceOp.MAX)
        answer = int(last)
        if answer & ASK and self.leaving and self.leaving():
            self._left = True
            answer |= SAVE
        return answer & ~ASK


class Meter:
    """Means of metrics over steps and workers, and the guard against losses that are not finite.

    Everything stays on the device until a report, so a step never waits for the host. A report
    also says how fast it goes (`speed`).
    """

    def __init__(self, setting: Setting, folder: RunFolder, resumed: bool) -> None:
        self.setting = setting
        self.folder = folder
        self.last: dict[str, float] = {}
        self.rates: dict[str, float] = {}  # of every network
        self.speed = Speed(setting.device)
        self._resumed = resumed
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=setting.device)
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self.speed.clear()
        self._steps: set[int] = set()

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """For what is done between two steps and is no part of either."""
        began = time.monotonic()
        yield
        self.speed.began += time.monotonic() - began

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        self._steps.add(step)
        for name, value in metrics.items():
            self._values[name].append(value.detach().float())
            bad = ~torch.isfinite(value).all() & (self._first_bad < 0)
            self._first_bad = torch.where(bad, step, self._first_bad)

    def report(self, done: int, learning_rate: float) -> None:
        """Average, check and write down; a collective.

        Raises TrainingError if any loss or gradient norm since the last report was not finite, so
        that no such state is ever saved.
        """
        speed, steps = self.speed, max(1, len(self._steps))
        told = torch.tensor([speed.waited / steps, speed.held_gib()], dtype=torch.float64)
        worst = torch.cat([self._first_bad[None].double(), told.to(self._first_bad.device)])
        distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
        first_bad, waited, held = worst.tolist()
        if first_bad >= 0:
            stage = self.setting.stage
            raise TrainingError(
                f"stage {stage}: the loss or gradient norm is not finite at step "
                f"{int(first_bad) + 1} on at least one worker; lower {stage}.learning_rate or "
                f"{stage}.grad_clip, or look for broken pairs in the dataset"
            )
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        distributed.all_reduce(means)
        means = means / self.setting.world_size
        self.last |= dict(zip(self._values, means.tolist(), strict=True))
        seconds = speed.seconds(steps)
        if self.setting.rank == 0:
            metrics = {
                **self.last,
                "learning_rate": learning_rate,
                **(self.rates if len(self.rates) > 1 else {}),
                "seconds_per_step": seconds,
                "data_seconds_per_step": waited,
                **speed.figures(steps, seconds),
                **({"gpu_memory_gib": held} if held else {}),
            }
            all_steps = self.setting.section.steps
            self.folder.report(
                Progress(
                    done,
                    all_steps,
                    metrics,
                    seconds,
                    pid=os.getpid(),
                    resumed=self._resumed,
                    system=system_metrics(self.setting.device, self.folder.path),
                )
            )
        self._resumed = False
        self._clear()


def make_setting(job: dict[str, Any], rank: int, world_size: int, device: torch.device) -> Setting:
    return Setting(
        config=from_plain(job["config"]),
        stage=job["stage"],
        start=Path(job["start"]),
        dataset=job["dataset"],
        models={name: Path(path) for name, path in job["models"].items()},
        rank=rank,
        world_size=world_size,
        device=device,
        heldout=job["heldout"],
    )


@contextmanager
def _stepping(setting: Setting) -> Iterator[None]:
    """Which kernel attends in a step on a GPU: cuDNN's, or where `compute.deterministic` asks for
    the same bits in every run others, since the gradient of cuDNN's differs from run to run."""
    if setting.device.type != "cuda":
        yield
    elif setting.config.compute.deterministic:
        # Only while to vary is an error and no mere warning, the gradient of flash attention does
        # not. A VAE attends to nothing, and may have layers that know no other way.
        torch.use_deterministic_algorithms(True, warn_only=setting.stage == "vae")
        with sdpa_kernel(_REPEATABLE):
            yield
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        from modeling.gpu.transformer import fast_attention

        with fast_attention():
            yield


def _prepare(setting: Setting) -> None:
    compute = setting.config.compute
    if setting.device.type == "cpu":
        torch.set_num_threads(compute.threads_per_worker)
    elif compute.deterministic:
        set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Or every torch.empty is filled, DeepSpeed's buckets of gigabytes at every step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(setting.seed)


def _export(
    setting: Setting,
    stage: Stage,
    model: Model,
    job: dict[str, Any],
    metrics: dict[str, float],
    steps: int,
    output: Path,
) -> None:
    """Rank 0 writes the model directory; parts that the stage did not train are the start's."""
    made = stage.export()
    if setting.rank != 0:
        return
    config = model.config
    if made.vae_config is not None:
        config = replace(config, vae=made.vae_config)
    transformer = made.transformer
    if transformer is None and model.transformer is not None:
        transformer = model.transformer.state_dict()
    if transformer is not None:  # the VAE stays float32: it is small, and latents depend on it
        transformer = {name: value.to(setting.dtype) for name, value in transformer.items()}
    text = Path(setting.start) / "text"
    save_model(
        output,
        config,
        transformer=transformer,
        vae=made.vae or model.vae,
        text=text if text.is_dir() else None,
        card={**job["card"], **made.card, "steps": steps, "metrics": metrics},
    )
