"""What every stage of a pipeline is given: the settings, the folder, and how it runs only once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.running.runner import RunOptions, StageRunner, StageWork
from pipelines.tracking.records import StageRecord
from pipelines.training.cluster import check_folder_is_shared, ray_session

# In the order in which they run. Raise a stage's number when its code gives another result for the
# same inputs.
VERSIONS = {
    "data": 1,
    "heldout": 1,
    "start": 2,
    "vae": 1,
    "encode": 1,
    "foundation": 1,
    "causal": 1,
    "distill": 1,
    "evaluate": 1,
    "register": 2,
}
STAGES = tuple(VERSIONS)


class Chain:
    """`resources` end with what the stages start together."""

    def __init__(
        self, config: PipelineConfig, output: Path, runner: StageRunner, resources: ExitStack
    ) -> None:
        assert config.tracking.uri is not None
        self.config, self.output, self.runner = config, output, runner
        self.uri = config.tracking.uri
        self.model = config.model.resolve()
        self.view, self.parent = runner.view, runner.parent
        self._resources = resources
        self._ray = False

    def run(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        output: str | Path,
        work: StageWork,
        **options: Unpack[RunOptions],
    ) -> StageRecord:
        """See `StageRunner.run`."""
        return self.runner.run(stage, VERSIONS[stage], inputs, output, work, **options)

    def start_ray(self) -> None:
        """One Ray for all stages that train, started when the first of them needs it."""
        if not self._ray:
            self._resources.enter_context(ray_session(self.config.compute))
            check_folder_is_shared(self.output, self.config.compute)
            self._ray = True
