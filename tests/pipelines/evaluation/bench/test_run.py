from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.bench.cases import CASES, Case
from data.bench.clip import BenchClip
from data.video import VideoWriter, probe
from infra.runtime.errors import UserError
from pipelines.config.benchmark import BenchConfig
from pipelines.evaluation.bench import systems
from pipelines.evaluation.bench.intervals import groups, mean_with_interval, with_success
from pipelines.evaluation.bench.judged import Judged
from pipelines.evaluation.bench.pictures import extremes, plot, sheet
from pipelines.evaluation.bench.printed import COLUMNS, beside, lines, markdown
from pipelines.evaluation.bench.run import chosen, clips, run
from pipelines.evaluation.bench.systems import OurModel, Videos, some
from pipelines.stages.bench_data import write_bench
from tests.known_editors import assert_edited, known_editor
from tests.pipelines.commands.entry import Liveedit

FEW = {"half": "drawn", "every": 9, "long": False, "size": "48x32"}
QUICK = [f"{key}={str(value).lower()}" for key, value in FEW.items()]


def write(path: Path, video: np.ndarray) -> None:
    height, width = video.shape[1:3]
    with VideoWriter(path, width, height, 16, crf=0, pixel_format="yuv444p") as writer:
        writer.write(video)


class Perfect:
    name = "perfect"

    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        return clip.truth, {"recomputed": 0.25}

    def identity(self, case: Case) -> str:
        return self.name


class Idle:
    name = "idle"

    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        return clip.source, {}

    def identity(self, case: Case) -> str:
        return self.name


@pytest.fixture(scope="module")
def config() -> BenchConfig:
    return BenchConfig(**FEW)  # type: ignore[arg-type]


def test_a_perfect_and_an_idle_system(config: BenchConfig, tmp_path: Path) -> None:
    judged: list[Judged] = []
    report = run(Perfect(), config, on_clip=judged.append)
    idle = run(Idle(), config)
    assert json.loads(json.dumps(report)) == report
    assert [one.row for one in judged] == report["clips"]
    overall = report["overall"]["drawn"]
    assert overall["success"]["mean"] == overall["kept"]["mean"] == 1
    assert overall["edited_psnr"]["mean"] == overall["kept_psnr"]["mean"] == 100
    assert overall["recomputed"]["mean"] == 0.25
    assert idle["overall"]["drawn"]["success"]["mean"] == 0
    assert idle["overall"]["drawn"]["kept"]["mean"] == 1
    for one, clip in zip(judged, clips(config), strict=True):
        assert np.array_equal(one.edit, clip.truth[len(clip.truth) // 2])
    plot(report, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500
    kinds = len(report["kinds"])
    assert sheet(judged).height > kinds * 32
    table = beside([report, idle]).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| perfect", "| idle"]


def test_alignment_is_measured_of_the_source_and_of_its_edit(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Words:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def measure(
            self, instruction: str, source: np.ndarray, edit: np.ndarray, fps: int
        ) -> dict[str, float]:
            assert (self.folder, fps) == ("weights", 16)
            (clip,) = clips(one)
            assert instruction == clip.instruction
            assert np.array_equal(source, clip.source)
            assert np.array_equal(edit, clip.truth)
            return {"clip_text": 0.25}

    monkeypatch.setattr("pipelines.evaluation.bench.run.Alignment", Words)
    one = replace(config, every=60, clip="weights")
    (row,) = run(Perfect(), one)["clips"]
    assert row["clip_text"] == 0.25


def test_our_model_is_streamed_by_the_clips_words(config: BenchConfig) -> None:
    clip = next(clips(config))
    edit, more = OurModel(known_editor(), seed=0).edit(clip)
    assert_edited(edit, clip.source, clip.instruction)
    assert 0 < more["recomputed"] < 1
    assert more["fps"] > 0


def test_an_edit_is_asked_for_as_the_settings_say_and_its_figures_are_of_all_chunks(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, editor, asked = next(clips(config)), known_editor(), []
    chunks = [
        SimpleNamespace(recomputed=share, frames=np.full((count, 4, 4, 3), count, np.uint8))
        for share, count in ((1.0, 9), (0.25, 12), (0.25, 3))
    ]

    def edited(*given: Any, **options: Any) -> Any:
        asked.append((given, options))
        return chunks, 4.0

    monkeypatch.setattr(systems, "edit_clip", edited)
    found, more = OurModel(editor, 7, "1/2", detail=True).edit(clip)
    assert found[:, 0, 0, 0].tolist() == [9] * 9 + [12] * 12 + [3] * 3
    assert more == {"recomputed": 0.5, "fps": 6.0}  # frames, not chunks
    OurModel(editor, 8).edit(clip)
    assert [
        (given[0] is editor, given[1] is clip.source, given[2:], options.pop("truth") is clip.truth)
        for given, options in asked
    ] == [(True, True, (clip.instruction, seed), True) for seed in (7, 8)]
    assert [options for _, options in asked] == [
        {"work_size": "1/2", "detail": "source"}, {"work_size": "full", "detail": "off"},
    ]  # fmt: skip


def test_videos_of_another_system(config: BenchConfig, tmp_path: Path) -> None:
    config = replace(config, every=20)  # three clips
    cases = chosen(config)
    for clip in clips(config):
        for folder, height, truth in (("same", 32, clip.truth), ("large", 64, clip.truth),
                                      ("short", 32, clip.truth[1:])):  # fmt: skip
            video = truth.repeat(height // 32, axis=1).repeat(height // 32, axis=2)
            (tmp_path / folder).mkdir(exist_ok=True)
            write(tmp_path / folder / f"{clip.case.name}.mkv", video)
    same, large = (run(Videos("x", tmp_path / f), config) for f in ("same", "large"))
    gain = [report["overall"]["drawn"]["gain"]["mean"] for report in (same, large)]
    assert same["overall"]["drawn"]["edited_psnr"]["mean"] > 40
    assert gain[1] > 15
    short = Videos("x", tmp_path / "short")
    with pytest.raises(ValueError, match="has 56 frames, its source 57"):
        run(short, config)
    with pytest.raises(UserError, match=f"holds {len(cases)} that cannot .* has 56 frames, its"):
        short.check(cases, config.shape)
    with pytest.raises(ValueError, match="no folder"):
        Videos("x", tmp_path / "absent")


def test_everything_that_is_wrong_with_videos_is_said_at_once(
    config: BenchConfig, tmp_path: Path
) -> None:
    """Another size of the same shape is none of it; nor, nearly, one of whole blocks."""
    absent, empty, square, *fine = cases = chosen(config)
    write(tmp_path / f"{square.name}.mkv", np.zeros((57, 32, 32, 3), np.uint8))
    (tmp_path / f"{empty.name}.mp4").write_bytes(b"no video")
    for case in fine:
        write(tmp_path / f"{case.name}.mkv", np.zeros((57, 64, 98, 3), np.uint8))
    with pytest.raises(UserError) as found:
        Videos("x", tmp_path).check(cases, config.shape)
    said = str(found.value)
    assert f"lacks 1 of {len(cases)} clips: {absent.name}; give every one as NAME.mp4" in said
    assert f"It holds 2 that cannot be judged: {tmp_path / empty.name}.mp4" in said
    assert f"{square.name}.mkv is 32x32, its source 48x32; write one frame" in said
    names = [f"clip-{n}" for n in range(6)]
    assert some(names[:5]) == "clip-0, clip-1, clip-2, clip-3, clip-4"
    assert some(names) == "clip-0, clip-1, clip-2, clip-3, clip-4 ..."


@pytest.mark.parametrize(
    ("width", "height", "fits"),
    [(48, 32, True), (96, 64, True), (50, 32, True), (48, 33, True), (51, 32, False),
     (48, 34, False), (32, 48, False)],
)  # fmt: skip
def test_a_picture_is_stretched_by_a_twentieth_at_most(
    width: int, height: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[1]
    (tmp_path / f"{case.name}.mp4").touch()
    info = SimpleNamespace(width=width, height=height, frames=case.frames)
    monkeypatch.setattr(systems, "probe", lambda path: info)
    said = Videos("x", tmp_path)._unlike(case, (32, 48))
    assert said == (None if fits else f"{case.name}.mp4 is {width}x{height}, its source 48x32")


def test_a_file_that_does_not_say_how_many_frames_it_has_is_read_to_know(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case, *_) = chosen(config)
    write(tmp_path / f"{case.name}.mkv", np.zeros((57, 32, 48, 3), np.uint8))
    untold = replace(probe(tmp_path / f"{case.name}.mkv"), frames=None)
    monkeypatch.setattr("pipelines.evaluation.bench.systems.probe", lambda path: untold)
    Videos("x", tmp_path).check([case], config.shape)


def row(kind: str, gain: float | None, half: str = "drawn", **more: float) -> dict[str, object]:
    named = {"name": f"{kind}{gain}", "half": half, "kind": kind, "traits": [half, "fast"]}
    return {**named, "false_edits": 0.02, **({} if gain is None else {"gain": gain}), **more}


def test_the_picture_shows_failure_and_typical_beside_the_best() -> None:
    """Each clip's source, edit and truth are of levels of its own."""

    def judged(level: int, **values: float) -> Judged:
        source, edit, truth = (np.full((32, 48, 3), level + n, np.uint8) for n in (0, 1, 2))
        about = {"name": "", "half": "natural", "kind": "tone", "instruction": "", **values}
        return Judged(about, source, edit, truth)

    clips = [
        judged(10, gain=9.0, success=1.0), judged(40, gain=25.0, success=1.0),
        judged(70, gain=1.0, success=0.0), judged(100, kept_psnr=40.0), judged(130, kept_psnr=30.0),
    ]  # fmt: skip
    picture = np.asarray(extremes(clips))
    assert picture.shape == (4 * 56, 3 * 52, 3)
    shown = [
        [picture[row * 56 + 36, column * 52 + 24, 0] for column in range(3)] for row in range(4)
    ]
    assert shown == [[level, level + 1, level + 2] for level in (70, 10, 40, 130)]
    assert extremes(clips[3:]).height == 56


def test_means_and_intervals() -> None:
    same = mean_with_interval([3.0] * 5, 100)
    assert same == {"mean": 3, "low": 3, "high": 3, "clips": 5}
    values = np.random.default_rng(0).normal(10, 2, 200)
    wide = mean_with_interval(values.tolist(), 4000)
    half = 1.96 * values.std() / np.sqrt(200)
    assert wide["mean"] == pytest.approx(values.mean())
    assert wide["high"] - wide["mean"] == pytest.approx(half, rel=0.1)
    assert wide["mean"] - wide["low"] == pytest.approx(half, rel=0.1)
    assert mean_with_interval([1.0, 2.0], 50) == mean_with_interval([1.0, 2.0], 50)


def test_the_worst_kind_comes_first_and_nothing_last() -> None:
    rows = [row("good", 9.0), row("bad", 1.0), row("bad", 3.0), row("fair", 5.0, half="natural"),
            row("nothing", None, kept_psnr=20.0)]  # fmt: skip
    rows = [with_success(one, 5.0, 0.01) for one in rows]
    report = groups(rows, 50)
    assert list(report["kinds"]) == ["drawn, bad", "natural, fair", "drawn, good", "drawn, nothing"]
    assert report["kinds"]["drawn, bad"]["gain"]["mean"] == 2
    assert report["overall"]["all"]["success"]["mean"] == 0.5
    assert report["overall"]["drawn"]["gain"]["mean"] == pytest.approx(13 / 3)
    assert report["overall"]["all"]["kept"]["mean"] == 0
    assert report["overall"]["all"]["success"]["clips"] == 4
    assert list(report["traits"]) == ["fast"]
    heads, rows_of_table = lines(report)
    assert heads[:4] == ["", "clips", "gain dB", "success"]
    assert [line[0] for line in rows_of_table][:3] == ["all", "drawn", "natural"]
    assert "drift dB" not in heads
    assert markdown(report).count("\n") == 2 + len(rows_of_table)
    assert len(COLUMNS) == len({column[0] for column in COLUMNS})


def test_systems_are_compared_on_the_same_clips_only() -> None:
    reports = [
        {"system": name, "clips": [{"name": clip}], "overall": {"drawn": {}}}
        for name, clip in (("a", "x"), ("b", "y"))
    ]
    with pytest.raises(ValueError, match="different clips"):
        beside(reports)


def test_sources_for_other_systems(config: BenchConfig, tmp_path: Path) -> None:
    done: list[int] = []
    made = write_bench(tmp_path / "set", config, on_clip=lambda: done.append(1))
    assert len(done) == len(chosen(config))
    listed = json.loads((tmp_path / "set" / "bench.json").read_text())
    assert listed["made"] == made
    assert [entry["name"] for entry in listed["clips"]] == [case.name for case in chosen(config)]
    videos = Videos("sources", tmp_path / "set")
    for clip, entry in zip(clips(config), listed["clips"], strict=True):
        assert entry["instruction"] == clip.instruction
        said = (entry["frames"], entry["height"], entry["width"], entry["fps"])
        assert said == (*clip.source.shape[:3], 16)
        assert entry["checksum"] == clip.checksum()
        assert np.abs(videos.edit(clip)[0].astype(int) - clip.source).max() <= 3
    with pytest.raises(ValueError, match="is there already"):
        write_bench(tmp_path / "set", config)
    write_bench(tmp_path / "set", replace(config, every=59), overwrite=True)
    assert len(json.loads((tmp_path / "set" / "bench.json").read_text())["clips"]) == 1


@pytest.mark.usefixtures("tables")
def test_from_the_command_line(liveedit: Liveedit, config: BenchConfig, tmp_path: Path) -> None:
    for clip in clips(config):
        (tmp_path / "edits").mkdir(exist_ok=True)
        path = tmp_path / "edits" / f"{clip.case.name}.mkv"
        write(path, clip.truth)
    words = ["evaluate", "Some System", "bench", *QUICK, "--outputs", "edits"]
    first = liveedit(*words)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "bench" / "Some-System"
    assert "Some System" in (folder / "bench.md").read_text()
    assert {path.name for path in folder.iterdir()} == {
        "bench.json", "bench.md", "bench.png", "clips", "extremes.jpg", "sheet.jpg",
    }  # fmt: skip
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("liveedit-bench")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    report = json.loads((folder / "bench.json").read_text())
    assert tracked.data.metrics["drawn/gain"] == report["overall"]["drawn"]["gain"]["mean"]
    assert {file.path for file in client.list_artifacts(tracked.info.run_id)} >= {"bench.md"}
    assert "measured before" not in first.stdout
    shutil.copytree(folder / "clips", tmp_path / "two" / "clips")
    again = liveedit(*words, "--no-track", "--out", "two", "--beside", str(folder / "bench.json"))
    assert again.returncode == 0, again.stderr
    assert "7 of 7 clips were measured before" in again.stdout
    assert (tmp_path / "two" / "bench.json").read_bytes() == (folder / "bench.json").read_bytes()
    assert (tmp_path / "two" / "beside.md").read_text().count("| Some System |") == 2
    refused = liveedit("evaluate", "known", "set", "--outputs", "edits")
    assert "belong to bench" in refused.stderr
