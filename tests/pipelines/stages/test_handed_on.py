"""What each stage hands on: to its work, to its key, to MLflow, to whoever looks on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data import synthetic
from modeling.config import StreamConfig
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import read_config
from pipelines.commands import run as commands
from pipelines.config.load import section_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages import chain as chains
from pipelines.stages import data, edit, edit_remote, encode, evaluate, live, register, start
from pipelines.stages.chain import Chain
from pipelines.stages.train import train
from pipelines.tracking.records import StageRecord, digest_of, fingerprint_of
from pipelines.training.run_folder import TrainingReport
from pipelines.training.trainer import StageOutcome
from serve.client.cameras import CameraReport
from tests.pipelines.stages.told import Runner, Told, heard


@pytest.fixture
def runner(chain: Chain) -> Runner:
    made: Any = chain.runner
    assert isinstance(made, Runner)
    return made


def test_a_start_is_drawn_by_the_pipeline_s_seed(
    chain: Chain, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = heard(start, "start_model", monkeypatch)
    chain.config.seed = 7
    target = chain.output / "models" / "start"
    assert start.start(chain, None) == target
    assert calls == [((chain.model, None, target), {"seed": 7})]
    assert runner.inputs == {"model": section_plain(chain.model), "seed": 7, "source": None}


def test_a_given_start_is_copied_where_its_stream_is_another(
    chain: Chain, runner: Runner, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = heard(start, "start_model", monkeypatch)
    chain.model = read_config(tiny_model)
    chain.config.model.start = "the start"
    assert start.start(chain, tiny_model) == tiny_model
    assert (runner.of("pass_over"), calls) == ([("start", "the start")], [])
    chain.model = replace(chain.model, stream=replace(chain.model.stream, fps=99.0))
    target = chain.output / "models" / "start"
    assert start.start(chain, tiny_model) == target
    assert calls == [((chain.model, tiny_model, target), {"seed": chain.config.seed})]
    assert runner.inputs["source"] == model_fingerprint(tiny_model)


@pytest.mark.parametrize(
    ("own", "measured", "chosen"),
    [(None, None, None), (None, 0.5, 0.5), (0.3, 0.5, 0.3), (0.7, None, 0.7)],
)
def test_a_guide_goes_with_the_weights_unless_another_is_named(
    own: Any, measured: Any, chosen: Any
) -> None:
    stream = StreamConfig(32, 48, guide_blur=own)
    source = StreamConfig(64, 96, guide_blur=measured, fps=3.0)
    assert start.with_guide(stream, source) == replace(stream, guide_blur=chosen)


@pytest.mark.parametrize(
    ("split", "stage", "count"), [("train", "data", 5), ("heldout",) * 2 + (3,)]
)
def test_pairs_that_are_made(
    split: str,
    stage: str,
    count: int,
    chain: Chain,
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = heard(data, "make_synthetic", monkeypatch)
    settings, stream = chain.config.data, chain.model.stream
    settings.pairs, settings.heldout_pairs, settings.samples_per_shard = 5, 3, 7
    settings.seed, settings.frames = 11, 21
    data.pairs(chain, split)
    assert runner.inputs == {
        "generator": synthetic.VERSION, "pairs": count, "seed": 11, "split": split,
        "size": [stream.height, stream.width, 21, stream.fps], "samples_per_shard": 7,
    }  # fmt: skip
    ((_, named),) = calls
    named["on_pair"](2)
    assert runner.view.of("update") == [(stage, 2, count, f"2/{count} pairs")]


def test_latents(
    chain: Chain, runner: Runner, tiny_model: Path, heldout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(samples=2, made_by={"precision": "fp16", "fp16_error": 0.25})
    calls = heard(encode, "encode_dataset", monkeypatch, info)
    settings = chain.config.data
    settings.samples_per_shard, settings.encode_precision = 7, "fp32"
    encode.encode(chain, tiny_model, heldout)
    assert runner.inputs == {
        "model": model_fingerprint(tiny_model), "pairs": fingerprint_of(heldout),
        "samples_per_shard": 7, "precision": "fp32",
    }  # fmt: skip
    assert runner.mlflow.of("log_input") == [("pairs", heldout, "encoding")]
    assert runner.mlflow.of("used") == [({"model": tiny_model},)]
    calls[0][1]["on_sample"](1, 2)
    assert runner.view.of("update") == [("encode", 1, 2, "1/2 pairs")]
    assert runner.metrics == {"pairs": 2.0, "fp16": 1.0, "fp16_error": 0.25}


@pytest.mark.parametrize("training", ["foundation", "causal", "distill", None])
def test_latents_are_made_where_a_stage_reads_them(
    training: str | None, chain: Chain, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(samples=2, made_by={"precision": "fp32"})
    calls = heard(encode, "encode_dataset", monkeypatch, info)
    for stage in ("foundation", "causal", "distill"):
        getattr(chain.config, stage).steps = int(stage == training)
    made = encode.encode(chain, Path("model"), "pairs")
    assert made == (str(chain.output / "data" / "encoded") if training else "")
    assert len(calls) == (training is not None)
    assert runner.metrics == ({"pairs": 2.0, "fp16": 0.0} if training else {})
    passed = [] if training else [("encode", "no stage trains on latents")]
    assert runner.of("pass_over") == passed


@pytest.mark.parametrize(
    ("gpus", "address", "here", "there", "workers", "tasks"),
    [
        (False, None, 4, 4, None, 0),
        (False, "ray://h:1", 4, 4, None, 0),
        (None, None, 1, 4, None, 0),
        (None, None, 2, 2, None, 2),
        (None, "ray://h:1", 0, 4, None, 4),
        (None, "ray://h:1", 0, 4, 3, 3),
        (True, "ray://h:1", 0, 2, 3, 2),
        (None, "ray://h:1", 0, 0, None, 0),
    ],
)
def test_a_task_a_gpu_encodes(
    gpus: bool | None,
    address: str | None,
    here: int,
    there: int,
    workers: int | None,
    tasks: int,
    chain: Chain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: here)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(there)} if there else {})
    started = heard(chains, "ray_session", monkeypatch, contextlib.nullcontext())
    looked = heard(chains, "check_folder_is_shared", monkeypatch)
    compute = chain.config.compute
    compute.gpus, compute.address, compute.workers = gpus, address, workers
    assert [encode._tasks(chain) for _ in range(2)] == [tasks, tasks]
    asked = gpus is not False and (address is not None or here > 1)
    assert started == [((compute,), {})] * asked, "once"
    assert looked == [((chain.output, compute), {})] * asked


def test_a_training_s_reports(
    chain: Chain, runner: Runner, tiny_model: Path, heldout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(job: Any, *, on_progress: Any, say: Any) -> StageOutcome:
        on_progress(TrainingReport(3, 9, {"loss": 0.5}, 0.0, system={"cpu": 1.0},
                                   files={"/a.png": "steps", "/b.mp4": ""}))  # fmt: skip
        on_progress(TrainingReport(4, 9, {}, 0.0))
        say("a worker died")
        return StageOutcome(tiny_model, {"loss": 0.25}, steps=9, seconds=1.0)

    monkeypatch.setattr("pipelines.training.trainer.train_stage", stand_in)
    heard(chains, "ray_session", monkeypatch, contextlib.nullcontext())
    gate = {"max_loss": 1.0}
    chain.config.causal.gate = gate
    made = train(chain, "causal", tiny_model, heldout, "held out", teacher=tiny_model)
    assert runner.mlflow.of("log_metrics") == [({"loss": 0.5, "cpu": 1.0}, 3)]
    assert runner.mlflow.of("log_artifact") == [
        (Path("/a.png"), "steps"), (Path("/b.mp4"), ""), (made / "card.json",),
    ]  # fmt: skip
    assert runner.mlflow.of("used") == [({"start": tiny_model, "teacher": tiny_model},)]
    assert runner.view.of("update") == [
        ("causal", 3, 9, "step 3/9  loss 0.5"), ("causal", 4, 9, "step 4/9"),
    ]  # fmt: skip
    assert runner.view.of("warn") == [("a worker died",)]
    assert runner.given["gate"] == gate
    key = model_fingerprint(tiny_model)
    assert runner.inputs["start"] == runner.inputs["teacher"] == key
    assert runner.inputs["dataset"] == fingerprint_of(heldout)
    assert "heldout" not in runner.inputs


def test_a_typical_clip_is_filmed_and_all_are_shown(
    chain: Chain, runner: Runner, tiny_model: Path, heldout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = SimpleNamespace(settings=SimpleNamespace(fps=12))
    heard(evaluate, "load_editor", monkeypatch, editor)

    def judge(*_: Any, on_clip: Any) -> dict[str, Any]:
        for metrics in ({"gain": 2.0}, {}):
            on_clip(SimpleNamespace(metrics=metrics))
        return {"clips": [], "mean": {"gain": 2.0}}

    monkeypatch.setattr(evaluate.evaluation, "evaluate", judge)
    names = {"x": "typical", "y": "best", "z": "worst"}
    heard(evaluate, "chosen", monkeypatch, names)
    heard(evaluate, "edit_again", monkeypatch, ["clip x", "clip y", "clip z"])
    sheets = heard(evaluate, "side_by_side", monkeypatch, Told())
    films = heard(evaluate, "film", monkeypatch)
    evaluate.evaluate(chain, tiny_model, heldout)
    assert films == [((chain.output / "sample.mp4", "clip x", 12), {})]
    assert sheets == [((["clip x", "clip y", "clip z"], ["typical", "best", "worst"]), {})]
    assert [note for *_, note in runner.view.of("update")] == [
        "1/2 clips  gain +2.0 dB", "2/2 clips  gain +0.0 dB",
    ]  # fmt: skip
    for reader in (runner.mlflow, runner.parent):
        assert reader.of("log_input") == [("heldout", heldout, "evaluation")]
    assert runner.mlflow.of("used") == [({"model": tiny_model},)]
    files = ("evaluation.json", "metrics.md", "side_by_side.png", "sample.mp4")
    assert runner.mlflow.of("log_artifact") == [(chain.output / file,) for file in files]
    assert runner.inputs == {
        "model": model_fingerprint(tiny_model), "dataset": fingerprint_of(heldout),
        "config": section_plain(chain.config.evaluate),
    }  # fmt: skip


class Box:
    """An outbox that has sent what it was given, once it was waited for."""

    def __init__(self, number: str | None) -> None:
        self.number, self.events = number, list[str]()

    def version(self, name: str, fingerprint: str) -> str | None:
        self.events.append(f"{name} {fingerprint[:4]}")
        return self.number

    def flush(self) -> None:
        self.events.append("flush")


@pytest.mark.parametrize(
    ("promote", "missing", "aliases"),
    [
        (True, [], ["fresh", "production"]),
        (True, ["gain is low"], ["fresh"]),
        (False, [], ["fresh"]),
    ],
)
@pytest.mark.parametrize("number", ["4", None])
def test_a_version(
    promote: bool,
    missing: list[str],
    aliases: list[str],
    number: str | None,
    chain: Chain,
    runner: Runner,
    tiny_model: Path,
    heldout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = heard(register, "shortfalls", monkeypatch, missing)
    held = heard(register.registry, "holds", monkeypatch, False)
    parent: Any = chain.parent
    parent.outbox, parent.run_id, parent.experiment_id = box, *_ = Box(number), "r", "3"
    tracking = chain.config.tracking
    tracking.alias, tracking.promote, tracking.model_name = "fresh", promote, "mine"
    record = StageRecord("evaluate", "k", "f", "/report.json", "run", {"gain": 4.5})
    result = register.register(chain, tiny_model, heldout, record)
    key = model_fingerprint(tiny_model)
    place = chain.output / "versions" / key[:16]
    assert model_fingerprint(place) == key
    assert judged == [(({"gain": 4.5}, chain.config.evaluate), {})]
    assert parent.of("register") == [(
        "mine", place, key, {"gain": 4.5}, aliases, ("heldout", digest_of(heldout)),
        [chain.output / "side_by_side.png", chain.output / "sample.mp4"],
    )]  # fmt: skip
    assert runner.mlflow.of("used") == [({"model": tiny_model},)]
    assert runner.inputs == {"model": key, "location": str(place), "registry": "sqlite:///",
                             "name": "mine", "aliases": aliases}  # fmt: skip
    assert box.events == ["flush", f"mine {key[:4]}"], "it is waited for before it is asked for"
    assert (result.output, result.model, result.version) == (chain.output, place, number)
    assert (result.aliases, result.shortfalls, result.metrics) == (
        aliases, missing, {"gain": 4.5},
    )  # fmt: skip
    assert (result.report, result.table) == (Path("/report.json"), chain.output / "metrics.md")
    assert (result.picture, result.run_id, result.experiment_id) == (
        chain.output / "side_by_side.png", "r", "3",
    )  # fmt: skip
    still_there = runner.given["still_there"]
    assert still_there(record) is (number is None)
    assert held == ([(("sqlite:///", "mine", "4", place), {})] if number else [])


def test_a_clip_that_is_streamed(
    config: PipelineConfig, runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "probe", lambda file: SimpleNamespace(frames=9))
    monkeypatch.setattr(live, "fingerprint_of", str)
    films = heard(edit_remote, "film_file", monkeypatch, CameraReport())
    heard(edit_remote, "live_numbers", monkeypatch, {"fps": 16.0})
    config.tracking.model_name = "mine"
    served: list[str] = []

    @contextlib.contextmanager
    def serving(reference: str) -> Iterator[str]:
        served.append(reference)
        yield "ws://h:1"

    result: Any = SimpleNamespace(output=tmp_path, model=Path("/m"), version="4", aliases=["a"])
    stage: Any = runner
    monkeypatch.setattr(Runner, "run", lambda self, stage, version, inputs, output, work: (
        stage, inputs, output, work(self.mlflow, "key")
    ))  # fmt: skip
    name, inputs, output, metrics = live.stream_live(stage, result, config, serving)  # type: ignore[misc]
    assert served == ["models:/mine@a"]
    assert (name, output, metrics) == ("live", tmp_path / "live.mp4", {"fps": 16.0})
    assert inputs == {"model": "/m", "reference": "models:/mine@a", "prompt": live.PROMPT,
                      "video": str(tmp_path / "source.mp4")}  # fmt: skip
    ((given, named),) = films
    assert given == ("ws://h:1", tmp_path / "source.mp4", tmp_path / "live.mp4", live.PROMPT)
    named["progress"](4)
    assert runner.view.of("update") == [
        ("live", 0, 9, "starting models:/mine@a"), ("live", 4, 9, "4/9 frames"),
    ]  # fmt: skip
    assert runner.mlflow.of("log_artifact") == [(tmp_path / "live.mp4",)]
    assert runner.mlflow.of("used") == [({"model": Path("/m")},)]


def test_a_clip_that_is_edited(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again where model, clip or prompt is another, or the copy beside it is gone."""
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"a clip")
    report = SimpleNamespace(frames=9, fps=16.0)
    edits = heard(edit, "edit_video", monkeypatch, report)
    loads = heard(edit, "load_editor", monkeypatch, "the editor")
    monkeypatch.setattr(edit, "probe", lambda file: SimpleNamespace(frames=9))
    monkeypatch.setattr(edit, "fingerprint_of", str)
    result: Any = SimpleNamespace(output=tmp_path, model=Path("/m"))
    stage: Any = runner
    edit.edit_sample(stage, result, clip)
    source, edited = tmp_path / "source.mp4", tmp_path / "edited.mp4"
    assert runner.inputs == {"model": "/m", "clip": str(clip), "prompt": edit.PROMPT}
    assert source.read_bytes() == b"a clip"
    assert loads == [((Path("/m"),), {})]
    ((given, named),) = edits
    assert given == ("the editor", source, edited, edit.PROMPT)
    named["progress"](4)
    assert runner.view.of("update") == [("edit", 4, 9, "4/9 frames")]
    assert runner.metrics == {"frames": 9.0, "fps": 16.0}
    assert runner.mlflow.of("used") == [({"model": Path("/m")},)]
    assert runner.mlflow.of("log_artifact") == [(edited,)]
    still_there: Any = runner.given["still_there"]
    assert still_there(None)
    source.unlink()
    assert not still_there(None)


def test_the_demo_s_server_looks_where_the_demo_registered(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.commands import serve

    running = contextlib.nullcontext(SimpleNamespace(stream_url="ws://h:1"))
    calls = heard(serve, "application", monkeypatch, running)
    config.tracking.uri = "http://m"
    with commands.serving_demo(config, "models:/mine@a") as url:
        assert url == "ws://h:1"
    (((settings,), named),) = calls
    assert (settings.model, named) == ("models:/mine@a", {"registry": "http://m"})
