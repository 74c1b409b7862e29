"""A trace of a few steps by PyTorch's profiler, for the stage's run (`profile=STEPS`)."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile, schedule

from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder, TrainingReport

SKIPPED = 2  # steps: kernels are compiled, memory and buffers laid out
WARM_UP = 1  # steps with the profiler on whose record is thrown away


class Profiler:
    """Of the first worker; the others' `step` does nothing. A trace opens in Perfetto
    (https://ui.perfetto.dev) or chrome://tracing."""

    def __init__(self, setting: Setting, folder: RunFolder, done: int) -> None:
        self.setting, self.folder, self.done = setting, folder, done
        steps = setting.section.profile if setting.rank == 0 else 0
        self._profile = None
        if not steps:
            return
        activities = [ProfilerActivity.CPU]
        if setting.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._keep,
            record_shapes=True,
        )
        self._profile.start()

    def step(self) -> None:
        """After every step."""
        self.done += 1
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """After the last step, or a stop: what was recorded until then is the trace."""
        if self._profile is not None:
            self._profile.stop()

    def _keep(self, made: profile) -> None:
        place = self.folder.path / "profile"
        place.mkdir(exist_ok=True)
        file = place / f"to-step-{self.done:06d}.json.gz"
        made.export_chrome_trace(str(file))
        steps = self.setting.section.steps
        self.folder.report(TrainingReport(self.done, steps, {}, 0.0, files={str(file): "profile"}))
