"""What commands that measure for hours write while they do, and refuse before they begin; what
they run is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from infra.runtime.errors import UserError
from modeling.config import StreamConfig
from pipelines.cli import app
from pipelines.commands import run as commands
from pipelines.commands.measure import benchmark, detail
from pipelines.config.benchmark import BenchConfig
from pipelines.config.pipeline import PipelineConfig
from tests.pipelines.commands.bench_cases import BLURRED, GUIDES, LOADED, VAE
from tests.pipelines.commands.calls import Arrived

ABLATION = "pipelines.evaluation.ablation"


def called(*words: str) -> Any:
    return CliRunner().invoke(app, words, standalone_mode=False)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_ablation_that_is_cut_off_leaves_the_variants_that_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    def ablate(place: Path, grid: Any, judge: Any, *, on_clip: Any, on_variant: Any) -> None:
        on_clip("a clip")
        for name in ("first", "second"):
            on_variant({"variant": name, "made": "now"})
            said.append(json.loads(Path("o/ablation.json").read_text())["reports"][-1]["variant"])
        raise Arrived

    for name, answer in (
        (f"{ABLATION}.ablate", ablate),
        (f"{ABLATION}.fitting", lambda place, variants: (variants, [])),
        (f"{ABLATION}.markdown", lambda reports: f"{len(reports)} variants"),
        ("pipelines.commands.measure.ablate._judge", lambda *_: SimpleNamespace(clips=2)),
        ("pipelines.tracking.registry.locate", lambda model: Path(model)),
    ):
        monkeypatch.setattr(name, answer)
    result = called("ablate", "m", "bench", "steps=1,2", "--out", "o")
    assert isinstance(result.exception, Arrived), result.exception
    assert said == ["first", "second"]
    text = Path("o/ablation.md").read_text()
    assert text == "`liveedit ablate m bench steps=1,2`: now\n\n2 variants"
    assert result.output.splitlines()[-2:] == ["done: first", "done: second"]


def test_stages_are_looked_for_in_a_folder_and_one_model_where_it_is_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places: list[Path] = []

    def fitting(place: Path, variants: Any) -> None:
        places.append(place)
        raise Arrived

    monkeypatch.setattr(f"{ABLATION}.fitting", fitting)
    monkeypatch.setattr("pipelines.tracking.registry.locate", lambda model: "located")
    called("ablate", "m", "bench", "steps=1,2")
    called("ablate", "m", "bench", "stages=causal,distill")
    assert places == [Path("located"), Path("m")]


def test_a_training_benchmark_that_is_cut_off_leaves_the_cases_that_were_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one of other work than the stored is refused by what it is asked before it begins."""

    def measure(options: Any, check: Any, note: Any) -> Iterator[dict[str, Any]]:
        check({"hardware": {"device": "cpu"}, "config": {"steps": 5}})
        for number in (1, 2):
            yield {"cases": [number]}
        raise Arrived

    monkeypatch.setattr("pipelines.bench.train.measure", measure)
    stored = {"schema": 1, "hardware": {"device": "cpu"}, "config": {"steps": 5}}
    Path("s.json").write_text(json.dumps(stored))
    words = ("bench", "train", "demo", "--json", "r.json", "--check", "s.json")
    assert isinstance(called(*words).exception, Arrived)
    assert json.loads(Path("r.json").read_text())["cases"] == [2]
    Path("s.json").write_text(json.dumps(stored | {"config": {"steps": 7}}))
    refused = called(*words).exception
    assert isinstance(refused, UserError)
    assert "steps 7 there, 5 here" in str(refused)


@pytest.mark.parametrize("cuda", [True, False])
def test_what_is_timed_where_nothing_is_said_is_what_the_machine_can(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def measure(options: Any, *_: Any) -> Any:
        found.append(options)
        raise Arrived

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr("pipelines.bench.stream.measure", measure)
    monkeypatch.setattr("pipelines.bench.train.measure", measure)
    for words in (["stream"], ["stream", "--device", "cpu"], ["train"]):
        assert isinstance(called("bench", *words).exception, Arrived)
    auto, cpu, training = found
    small = ("demo", "cpu", 8)
    assert (cpu.model, cpu.device, cpu.chunks) == small
    assert (auto.model, auto.device, auto.chunks) == (("wan-1.3b", "cuda", 40) if cuda else small)
    assert training.cuda is cuda
    assert training.config.name == ("wan-1.3b" if cuda else "demo")


@pytest.mark.parametrize(
    ("asked", "cuda", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_a_guide_is_looked_for_on_the_device_that_was_meant(
    asked: str, cuda: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without a VAE has none to be found."""
    loads: list[Any] = []

    def load(path: Path, *, device: str) -> Any:
        loads.append(device)
        return SimpleNamespace(vae=None, config=SimpleNamespace(stream=StreamConfig(16, 32)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(LOADED, load)
    with pytest.raises(UserError, match=r"m holds no vae.safetensors; import one"):
        detail._guides(iter([]), Path("m"), (16, 32), "1/2", asked, False)
    assert loads == [device]


@pytest.mark.parametrize("write", [True, False])
def test_a_guide_is_recorded_with_what_the_registry_says_of_the_model(
    write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    @contextmanager
    def along(path: Path) -> Iterator[None]:
        events.append(path)
        yield
        events.append("taken along")

    monkeypatch.setattr(LOADED, lambda *_, **__: VAE)
    monkeypatch.setattr(GUIDES, lambda *_: BLURRED)
    monkeypatch.setattr("pipelines.tracking.records.taken_along", along)
    monkeypatch.setattr("modeling.model_dir.set_guide", lambda *given: events.append(given))
    _, said = detail._guides(iter([]), Path("m"), (32, 64), "1/2", "cpu", write)
    assert "guide_blur 0.5" in said
    assert ("recorded in m" in said) == write
    told = BLURRED.told() | {"work_size": "32x16"}
    assert events == ([Path("m"), (Path("m"), 0.5, told), "taken along"] if write else [])


def test_videos_of_another_system_are_looked_at_before_any_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Any] = []

    class Videos:
        def __init__(self, name: str, folder: Path) -> None:
            self.given = name, folder

        def check(self, cases: Any, shape: Any) -> None:
            looked.append((self.given, cases, shape))

    monkeypatch.setattr("pipelines.evaluation.bench.systems.Videos", Videos)
    monkeypatch.setattr("pipelines.evaluation.bench.run.chosen", lambda config: "cases")
    config = BenchConfig()
    benchmark._system("theirs", Path("v"), config)
    assert looked == [(("theirs", Path("v")), "cases", config.shape)]


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_only_clips_that_are_published_are_compared_with_their_checksums(
    published: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    run = "pipelines.evaluation.bench.run"
    monkeypatch.setattr(f"{run}.has_checksums", lambda config: known)
    monkeypatch.setattr(f"{run}.chosen", lambda config: "ab")
    monkeypatch.setattr(f"{run}.check_clips", lambda config, on_clip: checked.append(config))
    config: Any = SimpleNamespace(published=published)
    benchmark.check_published(config)
    assert checked == [config] * (published and known)


def test_the_demo_serves_from_the_registry_that_it_wrote_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[Any] = []

    def application(settings: Any, **given: Any) -> Any:
        served.append((settings, given))
        return nullcontext(SimpleNamespace(stream_url="ws://h:1"))

    monkeypatch.setattr("pipelines.commands.serve.application", application)
    monkeypatch.setattr("pipelines.commands.serve.serve_settings", list)
    config = PipelineConfig()
    config.tracking.uri = "http://m"
    with commands.serving_demo(config, "models:/a@b") as url:
        assert url == "ws://h:1"
    assert served == [(["models:/a@b"], {"registry": "http://m"})]
