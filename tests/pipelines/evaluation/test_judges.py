"""What a variant, the settings and a stream's chunks come to, on their way to a report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.video import read_frames
from pipelines.config.benchmark import BenchConfig
from pipelines.config.pipeline import EvaluateConfig
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation import judges
from pipelines.evaluation.contact_sheet import film, side_by_side
from pipelines.evaluation.evaluate import EditedClip, edit_clip, edit_pair
from pipelines.evaluation.judges import Bench, Pairs

EDITOR: Any = SimpleNamespace(name="mine")
VARIANT = {"seed": 7, "work_size": "1/4", "detail": False}
BENCH = BenchConfig(seed=3, work_size="1/2", detail=True, resamples=50)


@pytest.mark.parametrize("varied", [None, *VARIANT])
def test_on_the_benchmark_a_variant_takes_the_place_of_the_settings(
    varied: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(system: Any, config: BenchConfig, on_clip: Any) -> dict[str, Any]:
        on_clip("a clip")
        asked.append((system.editor, system.seed, system.options, config))
        return {"clips": []}

    monkeypatch.setattr(judges, "run", run)
    seen: list[str] = []
    variant = {varied: VARIANT[varied]} if varied else {"steps": 2}
    Bench(BENCH).judge(EDITOR, variant, lambda: seen.append("clip"))
    wanted = {"seed": 3, "work_size": "1/2", "detail": True} | variant
    options = {
        "work_size": wanted["work_size"],
        "detail": "source" if wanted["detail"] else "off",
    }
    assert asked == [(EDITOR, wanted["seed"], options, BENCH)]
    assert seen == ["clip"]
    assert Bench(BENCH).resamples == 50
    assert Bench(BenchConfig(every=60)).clips == 2


@pytest.mark.parametrize("variant", [{}, {"seed": 7}, {"work_size": "1/4"}, {"detail": True}])
def test_on_pairs_a_variant_takes_the_place_of_what_pairs_are_edited_with(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def evaluate(editor: Any, dataset: str, config: Any, on_clip: Any, **options: Any) -> Any:
        on_clip("a clip")
        asked.append((editor, dataset, config.seed, config.dilate, options))
        rows = [{"gain": 5.0, "fps": 2.0}, {"gain": 3.0, "fps": 4.0}, {"fps": 6.0}]
        settings = {"seed": config.seed}
        return {"clips": rows, "settings": settings, "dataset_hash": "0123456789abcdef"}

    monkeypatch.setattr(judges, "evaluate", evaluate)
    seen: list[str] = []
    pairs = Pairs("set", EvaluateConfig(seed=3, dilate=5, success_db=4.0))
    report = pairs.judge(EDITOR, variant, lambda: seen.append("clip"))
    options = {
        "work_size": variant.get("work_size", "full"),
        "detail": "source" if variant.get("detail") else "off",
    }
    seed = variant.get("seed", 3)
    assert asked == [(EDITOR, "set", seed, 5, options)]
    assert seen == ["clip"]
    assert [(row["name"], row.get("success")) for row in report["clips"]] == [
        ("0", 1.0), ("1", 0.0), ("2", None),
    ]  # fmt: skip
    means = {name: value["mean"] for name, value in report["overall"]["pairs"].items()}
    assert means == {"gain": 4.0, "fps": 4.0, "success": 0.5}
    assert report["made"] == "3 pairs of set (0123456789ab)"
    assert report["settings"] == {"seed": seed}
    assert pairs.resamples == BenchConfig().resamples


@pytest.mark.parametrize(("asked", "clips"), [(None, 5), (3, 3), (9, 5)])
def test_as_many_pairs_are_judged_as_there_are_and_are_asked_for(
    asked: int | None, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "read_dataset_info", lambda uri: SimpleNamespace(samples=5))
    assert Pairs("set", EvaluateConfig(clips=asked)).clips == clips


class Stream:
    """Edits each two pushes together, in a second a push; notes what it was opened with."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.held, self.first = clock, [], 0
        self.opened: list[Any] = []
        self.pushed: list[int] = []

    def open(self, prompt: str, **options: Any) -> Stream:
        self.opened.append((prompt, options))
        return self

    def chunk(self) -> Any:
        frames = np.concatenate(self.held) // 2
        share, first = (1.0 if self.first == 0 else 0.5), self.first
        self.held, self.first = [], first + len(frames)
        mask = np.ones((1 + -(-len(frames) // 4), 2, 2), bool)
        return SimpleNamespace(frames=frames, recomputed=share, first_frame=first, mask=mask)

    def push(self, frames: np.ndarray) -> Iterator[Any]:
        self.clock[0] += 1.0
        self.pushed.append(len(frames))
        self.held.append(frames)
        if len(self.held) == 2:
            yield self.chunk()

    def flush(self) -> Any:
        self.clock[0] += 2.0
        return self.chunk() if self.held else None


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return Stream(clock)


CLIP = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 20, np.uint8)


@pytest.mark.parametrize(("frames", "pushed"), [(12, [5, 5, 2]), (10, [5, 5]), (3, [3])])
def test_a_clip_comes_in_groups_that_are_no_chunks_and_all_of_it_comes_back(
    stream: Stream, frames: int, pushed: list[int]
) -> None:
    editor: Any = stream
    chunks, seconds = edit_clip(
        editor, CLIP[:frames], "make it so", 7, truth=CLIP, work_size="1/2", detail="source"
    )
    sizes = {"height": 32, "width": 32, "seed": 7, "work_size": "1/2", "detail": "source"}
    assert stream.opened == [("make it so", sizes)]  # the truth is for one kind of editor alone
    assert stream.pushed == pushed
    edit = np.concatenate([chunk.frames for chunk in chunks])
    assert np.array_equal(edit, CLIP[:frames] // 2)
    assert seconds == len(pushed) + 2


def test_a_pairs_speed_and_share_are_of_the_whole_clip(stream: Stream) -> None:
    batch = {"source": CLIP[None], "target": CLIP[None], "instruction": ["dark"],
             "mask": np.ones((1, 12, 32, 32), bool)}  # fmt: skip
    editor: Any = stream
    clip = edit_pair(editor, batch, EvaluateConfig(seed=9))
    assert stream.opened[0][1]["seed"] == 9
    assert clip.metrics["fps"] == 12 / 5
    assert clip.metrics["recomputed"] == 0.75  # the mean of its chunks
    assert clip.recomputed.shape == (12, 32, 32)


def test_which_of_a_dataset_is_edited_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_pairs", lambda dataset: iter("abcde"))
    edited: list[str] = []

    def edit(editor: Any, batch: str, config: Any) -> str:
        edited.append(batch)
        return batch.upper()

    monkeypatch.setattr(evaluation, "edit_pair", edit)
    found: Any = evaluation.edit_again(EDITOR, "set", EvaluateConfig(), [3, 1])
    assert (found, edited) == (["D", "B"], ["b", "d"])


def shown(frames: int) -> EditedClip:
    levels = (np.full((frames, 32, 48, 3), level, np.uint8) for level in (40, 120, 200))
    source, edit, truth = levels
    there = np.zeros((frames, 32, 48), bool)
    return EditedClip("x", source, truth, edit, there, there, {"recomputed": 0.254, "gain": -1.25})


def test_a_film_has_source_edit_and_truth_side_by_side(tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4", shown(4), 8.0)
    frames = list(read_frames(tmp_path / "clip.mp4"))
    assert len(frames) == 4
    for column, level in enumerate((40, 120, 200)):
        middle = frames[2][8:24, column * 48 + 8 : column * 48 + 40]
        assert middle.mean() == pytest.approx(level, abs=4)


@pytest.mark.parametrize(
    ("frames", "picked"), [(21, (0, 5, 10, 15, 20)), (10, (0, 2, 4, 7, 9)), (2, (0, 1))]
)
def test_a_sheet_names_its_clip_its_rows_and_its_frames(
    frames: int, picked: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    heights: list[int] = []

    def text(draw: Any, at: tuple[int, int], text: str, *rest: Any, **more: Any) -> None:
        said.append(text)
        heights.append(at[1])

    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", text)
    side_by_side([shown(frames)], ["Best"])
    assert said == [
        'Best   "x"   (-1.2 dB in the edited region)',
        "source",
        *(f"frame {frame}" for frame in picked),
        "edit",
        "ground truth",
        "recomputed\n25% of tokens",
    ]
    labels = [heights[said.index(name)] for name in ("source", *said[-3:])]
    rows = [22 + row * (32 + 4) for row in range(4)]  # of which each has room for two lines
    assert all(0 <= label - row <= 32 - 28 for label, row in zip(labels, rows, strict=True))
