"""The training loop that all stages share; it runs in every Ray Train worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.loader import Split, loader
from infra.runtime.errors import UserError
from pipelines.exits import TryAgainError
from pipelines.training import checkpoint
from pipelines.training.calls import LEAVE, STOP, Calls
from pipelines.training.export import export_model
from pipelines.training.job import Job
from pipelines.training.kernels import prepare, stepping
from pipelines.training.methods.base import Setting, load_start, starting
from pipelines.training.methods.table import build_stage
from pipelines.training.run_folder import RunFolder, TrainingError
from pipelines.training.saver import Keep, Saver, Write
from pipelines.training.validation import Validation
from pipelines.training.watch.meter import Meter
from pipelines.training.watch.profiler import Profiler
from pipelines.training.watch.watchdog import (
    COMPUTES,
    EXPORTS,
    READS,
    REPORTS,
    SAVES,
    VALIDATES,
    Watchdog,
)
from pipelines.training.zero.engines import learning_rate_at, set_learning_rate


def train_loop(told: dict[str, Job]) -> dict[str, Any]:
    """What every Ray Train worker runs; `told` is {"job": the job}, since Ray hands over a dict.

    Returns {"metrics", "steps"}, {"stopped": steps} after the driver asked for it and the state was
    saved, or {"refused": message} where an earlier try found that going on
    is of no use: Ray restarts workers after any error, this is how a restart learns that it must
    not repeat one.
    """
    job = told["job"]
    folder = RunFolder(job.folder)
    if (message := folder.refusal()) is not None:
        return {"refused": message}
    import ray.train
    import ray.train.torch

    from pipelines.training.told import is_told_to_end

    context = ray.train.get_context()
    setting = Setting(
        job, context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )

    folder.clear_part(context.get_world_rank())

    def keep(write: Write, step: int) -> None:
        def upload(part: Any, name: str) -> Any:
            try:
                write(folder.path / name)
            except UserError as error:
                folder.refuse(str(error))
                raise
            return ray.train.Checkpoint.from_directory(folder.path / name)

        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(folder.path),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=upload,
        )

    def is_leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    # A Ray of our own is on this machine alone, which tells nobody before it goes.
    leaving = is_leaving if job.config.compute.address else None

    def wait_for_ray() -> None:
        # A report is only queued. Until Ray's controller has taken it, the end of this training
        # would lose a checkpoint that lies whole on the disk.
        ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)

    try:
        seconds = 60 * setting.config.compute.hang_minutes
        with Watchdog(folder, setting.rank, setting.world_size, seconds) as watchdog:
            made = Training(setting, folder, watchdog.at).run(keep, leaving, is_told_to_end)
        wait_for_ray()
        return made
    except TryAgainError:
        wait_for_ray()
        raise
    except torch.OutOfMemoryError as error:
        message = (
            f"stage {setting.stage} ran out of GPU memory ({str(error).splitlines()[0]}); lower "
            f"{setting.stage}.batch_size, set compute.activation_checkpointing=true, raise "
            "compute.zero_stage, or set compute.offload=optimizer"
        )
        folder.refuse(message)
        raise TrainingError(message) from error
    except UserError as error:
        folder.refuse(str(error))
        raise


class Training:
    """One worker's part of a stage's training, from the last whole checkpoint in `folder`."""

    def __init__(
        self,
        setting: Setting,
        folder: RunFolder,
        note: Callable[[int, int, int], None] = lambda step, doing, batch: None,
    ) -> None:
        """`note` is told what comes now, see `Watchdog.at`."""
        prepare(setting)
        self.note = note
        self.setting, self.folder = setting, folder
        saved, wrong = checkpoint.choose(folder, setting)
        with starting(setting, "reading the model"):
            self.model = load_start(setting)
        with starting(setting, "all networks and optimizers"):
            self.stage = build_stage(setting, self.model)
        self.batches = loader(
            setting.job.dataset,
            Split(
                batch_size=setting.section.batch_size,
                rank=setting.data_rank,
                world_size=setting.data_workers,
                seed=setting.seed,
                workers=setting.config.compute.loader_workers,
            ),
            cache=setting.config.compute.shard_cache,
            clip_frames=setting.clip_frames,
        )
        self.done = 0  # steps
        self.epochs = 0.0  # how often the data was read
        self.metrics: dict[str, float] = {}  # the last
        if saved is not None:
            with starting(setting, "loading the checkpoint"):
                self.done, self.epochs, self.metrics = checkpoint.load(
                    saved, setting, self.stage, self.batches
                )
            self._say_where(saved, wrong)

    def run(
        self,
        keep: Keep,
        leaving: Callable[[], bool] | None = None,
        told: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Train to the end and export.

        `leaving` says whether a worker's machine is about to be taken away, a collective; `told`
        whether this process was told to end. Raises TryAgainError for that, when all is saved.
        """
        validation = self._validation()
        metrics = self.train(keep, validation, leaving, told)
        if metrics is None:
            return {"stopped": self.done}
        metrics = metrics | validation.last
        output = self.setting.job.output
        self.note(self.done, EXPORTS, 0)
        self._export(output, metrics)
        if self.setting.rank == 0 and (best := validation.take_best(output)) is not None:
            metrics |= best["metrics"]
        return {"metrics": metrics, "steps": self.done}

    def train(
        self,
        keep: Keep,
        validation: Validation | None = None,
        leaving: Callable[[], bool] | None = None,
        told: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """All steps, or until `validation` has enough; the last metrics, or None if it was asked to
        stop and has saved its state."""
        section, stage = self.setting.section, self.stage
        meter = Meter(self.setting, self.folder, resumed=self.done > 0)
        meter.last = self.metrics
        calls = Calls(self.setting, self.folder, leaving, told)
        saver = Saver(self.setting, self.folder, stage, keep)
        profiler = Profiler(self.setting, self.folder, self.done)
        stream = iter(self.batches)
        for step in range(self.done, section.steps):
            for name, engine in stage.engines.items():
                rate = learning_rate_at(step, section, stage.learning_rates[name])
                set_learning_rate(engine, rate)
                meter.rates[f"learning_rate_{name}"] = rate
            for micro in range(section.grad_accumulation):
                self.note(step, READS, micro)
                with meter.speed.waiting():
                    batch = next(stream)
                self.note(step, COMPUTES, micro)
                with stepping(self.setting):
                    metrics = stage.step(batch, self.setting.draw(step, micro))
                meter.add(metrics, step)
                meter.speed.work(
                    stage.flops(batch, step), stage.tokens(batch), self.setting.sharing
                )
            self.done = step + 1
            profiler.step()
            self.note(step, REPORTS, section.grad_accumulation)
            self.epochs += section.batch_size * section.grad_accumulation / self._samples
            last = self.done == section.steps
            call = calls.after_step()
            saves = self.done % section.checkpoint_every == 0 or call > 0
            saves = self.setting.config.compute.keep_finished if last else saves
            if self.done % section.log_every == 0 or last or saves:
                meter.report(self.done, learning_rate_at(step, section, section.learning_rate))
            saver.check()
            if saves:
                self.note(step, SAVES, section.grad_accumulation)
                with meter.speed.saving():
                    saver.save(self.done, self.batches.state_dict(), self.epochs, meter.last)
                    if call & (STOP | LEAVE):  # what comes next may be the end of this process
                        saver.wait()
                calls.saved()
                if call & STOP and not last:
                    profiler.close()
                    return None
                if call & LEAVE and told() and not last:
                    raise TryAgainError(
                        f"worker {self.setting.rank} (told to end by SIGTERM; the state after step "
                        f"{self.done} was saved)"
                    )
            if validation is not None and validation.is_due(self.done):
                self.note(step, VALIDATES, section.grad_accumulation)
                with meter.not_counted():
                    enough = validation(self.done)
                if enough:
                    break
        profiler.close()
        saver.wait()
        return meter.last

    def _validation(self) -> Validation:
        export = partial(self._export, metrics={}, text=False)
        return Validation(self.setting, self.stage, self.model, self.folder, export)

    def _export(self, output: Path, metrics: dict[str, float], text: bool = True) -> None:
        """Rank 0 writes the model directory, with a copy of its `text` or without; a collective."""
        made, job = self.stage.export(), self.setting.job
        if self.setting.rank == 0:
            told = {"steps": self.done, "metrics": metrics}
            export_model(
                made, self.model, output, text=job.start / "text" if text else None,
                dtype=self.setting.dtype, card={**job.card, **told},
            )  # fmt: skip

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
