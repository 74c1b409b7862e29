from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.chain import Chain
from tests.pipelines.stages.told import Runner


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    made = PipelineConfig(output=str(tmp_path / "out"))
    made.tracking.uri = "sqlite:///"
    made.data.footage = None
    made.compute.gpus = False
    return made


@pytest.fixture
def chain(config: PipelineConfig, tmp_path: Path) -> Iterator[Chain]:
    runner: Any = Runner()
    with contextlib.ExitStack() as resources:
        yield Chain(config, tmp_path, runner, resources)
