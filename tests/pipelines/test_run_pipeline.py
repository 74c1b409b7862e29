"""What `run_pipeline` does around its stages: lock, MLflow's run, Ray's end, what comes after."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipelines import pipeline
from pipelines.config.load import load_config
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.chain import Chain
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import Enough
from pipelines.tracking import outbox
from tests.pipelines.tracking.stand_in import Server


class Pipeline:
    """`run_pipeline` with stages that only say what happens around them."""

    def __init__(self, output: Path, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.servers: list[Server] = []
        self.error: BaseException | None = None
        self.config = PipelineConfig(output=str(output))
        self.config.name, self.config.tracking.experiment = "mine", "theirs"
        self.config.tracking.uri = "http://mlflow"
        patch.setattr(pipeline.preflight, "check", lambda config: None)
        patch.setattr(pipeline, "run_stages", self.stages)
        patch.setattr(outbox, "Sender", self.server)

    def server(self, uri: str, experiment: str) -> Server:
        assert (uri, experiment) == ("http://mlflow", "theirs")
        self.servers.append(Server(uri, experiment))
        return self.servers[-1]

    def stages(self, chain: Chain, source: Path | None) -> Any:
        chain._resources.callback(self.events.append, "resources ended")
        self.events.append("stages")
        if self.events.count("stages") > 1:
            raise AssertionError("two pipelines in one output")
        with pytest.raises(ConfigError, match="in use by another pipeline"):
            self.run()
        if self.error is not None:
            raise self.error
        return SimpleNamespace(metrics={"gain": 4.5})

    def run(self) -> Any:
        view = StageView(Console(file=StringIO()), ())
        return pipeline.run_pipeline(self.config, view, then=self.then)

    def then(self, runner: Any, result: Any) -> None:
        self.events.append("then")


def test_a_pipeline_ends_what_it_started_before_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Pipeline(tmp_path, monkeypatch)
    assert asked.run().metrics == {"gain": 4.5}
    assert asked.events == ["stages", "resources ended", "then"]
    (server,) = asked.servers
    assert server.order == ["start", "artifact", "metrics", "end"]
    begun = server.taken[0]
    assert (begun["name"], begun["params"]["tracking.experiment"]) == ("mine", "theirs")
    assert load_config(tmp_path / "config.yaml") == asked.config
    assert server.taken[2]["values"] == {"gain": 4.5}
    assert server.taken[3]["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("disk full"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_pipeline_that_fails_ends_its_run(
    error: BaseException, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Pipeline(tmp_path, monkeypatch)
    asked.error = error
    with pytest.raises(type(error)):
        asked.run()
    assert asked.events == ["stages", "resources ended"]
    (server,) = asked.servers
    assert server.order == ["start", "artifact", "end"]
    assert server.taken[-1]["status"] == status


def test_a_plan_writes_nothing_and_is_made_for_its_card_and_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[dict[str, bool]] = []
    walked: list[tuple[Any, Any]] = []

    def walk(chain: Chain, source: Path | None) -> None:
        walked.append((chain.runner, source))
        raise Enough

    def check(config: PipelineConfig, **named: bool) -> Path:
        checked.append(named)
        return tmp_path / "source"

    monkeypatch.setattr(pipeline.preflight, "check", check)
    monkeypatch.setattr(pipeline, "run_stages", walk)
    config = PipelineConfig(output=str(tmp_path / "out"))
    config.tracking.uri = "http://mlflow"
    choice = Choice(("vae", "causal"), only="vae")
    assert (
        pipeline.plan_pipeline(config, StageView(Console(file=StringIO()), ()), choice, "H100")
        == []
    )
    ((planner, source),) = walked
    assert (checked, source) == ([{"writes": False}], tmp_path / "source")
    assert (planner.card, planner.choice, planner.output) == ("H100", choice, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [None, "a teacher"])
def test_each_stage_is_handed_what_those_before_it_made(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stages that say what they were handed: each answer is of its own."""
    handed: list[tuple[str, Any]] = []

    def stage(name: str) -> Any:
        def stand_in(chain: Any, *inputs: Any, **more: Any) -> str:
            named = inputs[0] if name in ("pairs", "train") else name
            handed.append((named, (*inputs, *more.items())))
            return f"{named} made"

        return stand_in

    for name in ("pairs", "start", "train", "encode", "evaluate", "register"):
        monkeypatch.setattr(pipeline, name, stage(name))
    monkeypatch.setattr(pipeline, "teacher_source", lambda config: given)
    chain: Any = SimpleNamespace(config=None)
    result: Any = pipeline.run_stages(chain, Path("source"))
    pairs, latents, teacher = "train made", "encode made", given or "foundation made"
    assert handed == [
        ("train", ("train",)),
        ("heldout", ("heldout",)),
        ("start", (Path("source"),)),
        ("vae", ("vae", "start made", pairs, "heldout made")),
        ("encode", ("vae made", pairs)),
        ("foundation", ("foundation", "vae made", latents, "heldout made")),
        ("causal", ("causal", "foundation made", latents, "heldout made")),
        ("distill", ("distill", "causal made", latents, "heldout made", ("teacher", teacher))),
        ("evaluate", ("distill made", "heldout made")),
        ("register", ("distill made", "heldout made", "evaluate made")),
    ]
    assert result == "register made"
