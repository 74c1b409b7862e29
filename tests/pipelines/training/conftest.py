"""Trainings in the test's own process: of the real stages, and of one that does as it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.training import loop
from pipelines.training.export import Exported
from tests.pipelines.training.benches import Bench, Scripted, write
from tests.pipelines.training.plain import use_plain_engines


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("loop") / "encoded")


@pytest.fixture
def plain_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_engines(monkeypatch)


@pytest.fixture
def bench(tiny_model: Path, encoded: str, heldout: str, tmp_path: Path) -> Callable[..., Bench]:
    def make(stage: str = "foundation", name: str = "run") -> Bench:
        dataset = heldout if stage == "vae" else encoded
        made = Bench(stage, dataset, tiny_model, tmp_path / name)
        if stage == "vae":
            made.set(batch_size=1, crop=16, statistics_clips=1)
        return made

    return make


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def use(script: Callable[[int, int], dict[str, float]], *exported: Exported) -> Scripted:
        stage = Scripted(script, *exported)
        monkeypatch.setattr(loop, "build_stage", stage.build)
        return stage

    return use
