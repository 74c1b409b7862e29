from __future__ import annotations

import pytest

from pipelines.config.load import load_config
from pipelines.config.pipeline import PipelineConfig
from tests.pipelines.config.passing import BASE


@pytest.fixture(scope="package")
def demo() -> PipelineConfig:
    return load_config("demo", BASE)
