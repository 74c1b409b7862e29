"""What pictures and tables show of a report, each figure in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import ImageDraw

from data.bench.clip import BenchClip
from data.footage.material import footage_hash
from pipelines.config.benchmark import BenchConfig
from pipelines.evaluation import ablation
from pipelines.evaluation.bench.intervals import groups, with_success
from pipelines.evaluation.bench.judged import Judged
from pipelines.evaluation.bench.pictures import extremes, plot, sheet
from pipelines.evaluation.bench.printed import (
    COLUMNS,
    SHORT,
    beside,
    lines,
    lines_of,
    markdown_of,
)
from pipelines.evaluation.bench.run import clips, run
from tests.pipelines.evaluation.bench.test_run import Idle, row

HEIGHT, WIDTH = 32, 48


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into pictures, in order."""
    words: list[str] = []
    write = ImageDraw.ImageDraw.text

    def noted(draw: Any, at: Any, text: str, *rest: Any, **options: Any) -> None:
        words.append(text)
        write(draw, at, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return words


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Draws by a function that writes a file, and gives what was drawn."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: found.append(figure))

    def by(make: Callable[[Any, Path], None], report: Any) -> Any:
        make(report, Path("nowhere.png"))
        return found[-1]

    return by


def judged(level: int, half: str, kind: str, **values: float) -> Judged:
    """Of which source, edit and truth are levels that follow each other."""
    frames = (np.full((HEIGHT, WIDTH, 3), level + n, np.uint8) for n in (0, 1, 2))
    about = {"name": "", "half": half, "kind": kind, "instruction": f"do {level}"}
    return Judged(about | values, *frames)


def test_the_sheet_shows_the_worst_and_the_median_of_every_kind_of_each_half(
    said: list[str],
) -> None:
    some = [
        judged(10, "drawn", "tone", gain=9.0), judged(20, "drawn", "tone", gain=-1.0),
        judged(30, "drawn", "tone", gain=5.0), judged(40, "natural", "tone", gain=2.0),
        judged(50, "natural", "nothing", kept_psnr=44.0),
        judged(60, "natural", "nothing", kept_psnr=33.0),
    ]  # fmt: skip
    picture = np.asarray(sheet(some))
    assert picture.shape == (20 + 3 * 56, 150 + 6 * 52, 3)
    shown = [
        [picture[20 + n * 56 + 36, 150 + column * 52 + 24, 0] for column in range(6)]
        for n in range(3)
    ]
    wanted = [(20, 30), (40, 40), (60, 50)]
    assert shown == [[a, a + 1, a + 2, b, b + 1, b + 2] for a, b in wanted]
    titles = [f"{which}: {what}" for which in ("worst", "median")
              for what in ("source", "edit", "truth")]  # fmt: skip
    assert said == [
        *titles,
        *("drawn\ntone", '"do 20" -1.0 dB', '"do 30" +5.0 dB'),
        *("natural\ntone", '"do 40" +2.0 dB', '"do 40" +2.0 dB'),
        *("natural\nnothing", '"do 60" kept at 33.0 dB', '"do 50" kept at 44.0 dB'),
    ]


def test_the_worst_is_called_a_failure_where_it_is_one(said: list[str]) -> None:
    some = [
        judged(10, "drawn", "tone", gain=6.0, success=1.0),
        judged(20, "drawn", "tone", gain=9.0, success=1.0),
        judged(30, "drawn", "nothing", kept_psnr=40.0),
    ]
    extremes(some)
    some[0].row["success"] = 0.0
    extremes(some)
    names = [text.partition(":")[0] for text in said]
    rest = ["typical", "best", "nothing to do, the worst"]
    assert names == ["the worst", *rest, "failure", *rest]
    assert said[1] == 'typical: "do 20" +9.0 dB   (source, edit, truth)'


def entry(mean: float, low: float, high: float, clips: int = 4) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "clips": clips}


def ends(bars: Any, axis: int) -> list[list[float]]:
    """Where the lines of error bars begin and end on this axis."""
    (marks,) = bars.lines[2]
    return [[round(float(at), 6) for at in ends[:, axis]] for ends in marks.get_segments()]


def test_gains_are_bars_with_their_intervals_and_long_clips_are_lines(
    drawn: Callable[..., Any],
) -> None:
    report = {
        "kinds": {
            "drawn, tone": {"gain": entry(2.0, 1.0, 4.0)},
            "natural, add": {"gain": entry(5.0, 4.5, 7.0)},
            "natural, nothing": {"kept_psnr": entry(40.0, 30.0, 50.0)},
        },
        "psnr_by_second": {"one": [30.0, 31.0], "two": [40.0]},
        "settings": {"success_db": 4.5},
        "version": "9",
        "system": "mine",
    }
    bars, long = drawn(plot, report).axes
    assert [patch.get_width() for patch in bars.patches] == [2.0, 5.0]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["drawn, tone", "natural, add"]
    (errors,) = (bar.errorbar for bar in bars.containers if hasattr(bar, "patches"))
    assert ends(errors, 0) == [[1.0, 4.0], [4.5, 7.0]]
    marks = {line.get_label(): list(line.get_xdata()) for line in bars.lines}
    assert marks["success"] == [4.5, 4.5]
    assert [0, 0] in marks.values()
    assert bars.yaxis_inverted()  # the first, which is the worst, is at the top
    assert "gain" in bars.get_xlabel()
    assert (long.get_xlabel(), long.get_ylabel()) == ("second", "PSNR against the truth, dB")
    assert {line.get_label(): list(line.get_ydata()) for line in long.lines} == {
        "one": [30.0, 31.0], "two": [40.0],
    }  # fmt: skip
    assert drawn(plot, report | {"psnr_by_second": {}})._suptitle.get_text() == (
        "LiveEdit-Bench 9: mine"
    )
    (alone,) = drawn(plot, report | {"psnr_by_second": {}}).axes
    assert len(alone.patches) == 2


def test_an_ablation_is_drawn_as_loss_over_work_that_is_not_done(
    drawn: Callable[..., Any],
) -> None:
    reports = [
        {"variant": "a", "against": {"loss": entry(1.0, 0.5, 3.0), "saved": entry(0.25, 0, 0)}},
        {"variant": "b", "against": {"loss": entry(-1.0, -2.0, -1.0), "saved": entry(0.5, 0, 0)}},
        {"variant": "c", "against": {"saved": entry(0.75, 0, 0)}},  # nothing to lose
    ]
    (axes,) = drawn(ablation.plot, reports).axes
    assert "not done" in axes.get_xlabel()
    assert "gain lost" in axes.get_ylabel()
    found = {
        bars.get_label(): (*bars.lines[0].get_xydata()[0].tolist(), *ends(bars, 1)[0])
        for bars in axes.containers
    }
    assert found == {"a": (0.25, 1.0, 0.5, 3.0), "b": (0.5, -1.0, -2.0, -1.0)}


def test_a_table_has_a_mean_of_its_decimals_and_intervals_where_asked_of_several() -> None:
    columns = (("gain", "gain dB", 1, True), ("fps", "FPS", 0, False), ("none", "?", 1, False))
    entries = [
        ("one", {"gain": entry(-0.04, -0.26, 1.24, clips=3), "fps": entry(25.6, 0, 99, clips=9)}),
        ("two", {"gain": entry(2.06, 1.0, 3.0, clips=1)}),
    ]
    heads, rows = lines_of(entries, columns)
    assert heads == ["", "clips", "gain dB", "FPS"]
    assert rows == [["one", "9", "0.0 [-0.3, 1.2]", "26"], ["two", "1", "2.1", "-"]]
    assert markdown_of(heads, rows).splitlines() == [
        "|  | clips | gain dB | FPS |",
        "| --- | --- | --- | --- |",
        "| one | 9 | 0.0 [-0.3, 1.2] | 26 |",
        "| two | 1 | 2.1 | - |",
    ]
    report = {"overall": {"all": entries[0][1]}, "kinds": {"k": entries[1][1]}, "traits": {}}
    assert [line[0] for line in lines(report, columns)[1]] == ["all", "k"]


def test_every_metric_has_its_decimals_in_its_column() -> None:
    values = {name: entry(1.23456, 1.0, 2.0) for name, *_ in COLUMNS}
    heads, ((_, _, *cells),) = lines_of([("x", values)], COLUMNS)
    intervals = {1: "1.2 [1.0, 2.0]", 2: "1.23 [1.00, 2.00]"}
    assert dict(zip((name for name, *_ in COLUMNS), cells, strict=True)) == {
        "gain": intervals[1], "success": intervals[2], "edited_psnr": "1.2", "edited_ssim": "1.23",
        "background_psnr": intervals[1], "background_ssim": "1.23", "kept_psnr": intervals[1],
        "false_edits": "1.235", "temporal_inside": "1.2", "temporal_outside": "1.2",
        "sharpness": "1.23", "drift": "1.2", "clip_text": "1.235", "clip_text_gain": "1.235",
        "recomputed": "1.23", "fps": "1",
    }  # fmt: skip
    assert len(heads) == len(COLUMNS) + 2
    left_out = {name for name, *_ in COLUMNS} - {name for name, *_ in SHORT}
    assert left_out == {"edited_ssim", "background_ssim", "drift"}
    heads, rows = ablation.table(
        [{"variant": "v", "overall": {"pairs": {}, "all": values}, "against": {
            name: entry(0.126, 0.1, 0.2) for name in ("loss", "skipped", "saved")}}]
    )  # fmt: skip
    assert dict(zip(heads, rows[0], strict=True)) == {
        "": "v", "clips": "4", "gain dB": intervals[2], "loss dB": "0.13 [0.10, 0.20]",
        "success": "1.23", "outside dB": "1.2", "kept dB": "1.2", "flicker out": "1.23",
        "sharp": "1.23", "drift dB": "1.23", "tokens not computed": "0.13",
        "work not done": "0.13", "FPS": "1.2",
    }  # fmt: skip


def test_systems_stand_beside_each_other_by_all_their_clips() -> None:
    clip = [{"name": "x"}]
    reports = [
        {"system": name, "clips": clip,
         "overall": {"all": {"gain": entry(gain, 0, 9)}, "drawn": {"gain": entry(77.0, 0, 9)}}}
        for name, gain in (("mine", 3.0), ("other", 4.0))
    ]  # fmt: skip
    assert beside(reports).splitlines()[2:] == [
        "| mine | 4 | 3.0 [0.0, 9.0] |",
        "| other | 4 | 4.0 [0.0, 9.0] |",
    ]


class Darker(Idle):
    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        return clip.source // 2, {"fps": 7.0}


def test_a_clip_leaves_its_own_middle_frames_and_its_row(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"photo")
    config = BenchConfig(
        half="drawn", every=59, long=False, size="48x32", success_db=-100.0, footage=str(tmp_path)
    )
    seen: list[Judged] = []
    report = run(Darker(), config, on_clip=seen.append)
    for one, clip in zip(seen, clips(config), strict=True):
        middle = len(clip.source) // 2
        assert np.array_equal(one.source, clip.source[middle])
        assert np.array_equal(one.edit, clip.source[middle] // 2)
        assert np.array_equal(one.truth, clip.truth[middle])
        assert one.by_second is None
        case = clip.case
        about = {"name": case.name, "half": case.half, "kind": case.kind, "fps": 7.0,
                 "traits": list(case.traits), "instruction": clip.instruction,
                 "checksum": clip.checksum()}  # fmt: skip
        assert about.items() <= one.row.items()
        assert one.row.get("success", 1.0) == 1.0
    assert report["psnr_by_second"] == {}
    assert (report["system"], report["settings"]["success_db"]) == ("idle", -100.0)
    assert report["footage"] == footage_hash(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "found"),
    [
        ("tone", {"gain": 4.0}, {"success": 1.0}),
        ("tone", {"gain": 3.99}, {"success": 0.0}),
        ("tone", {}, {}),
        ("nothing", {"false_edits": 0.01}, {"kept": 1.0}),
        ("nothing", {"false_edits": 0.011, "gain": 99.0}, {"kept": 0.0}),
    ],
)
def test_at_the_goal_it_is_reached(
    kind: str, values: dict[str, float], found: dict[str, float]
) -> None:
    known = {"kind": kind} | values
    assert with_success(known, 4.0, 0.01) == known | found


def test_of_one_half_there_is_no_mean_of_all() -> None:
    one = groups([row("tone", 3.0), row("tone", 5.0)], 50)
    assert list(one["overall"]) == ["drawn"]
    assert one["traits"]["fast"]["gain"]["mean"] == 4.0
    # Of both halves each has its own mean, also of a kind that both have; a trait is of both.
    both = groups([row("tone", 3.0), row("tone", 5.0, half="natural")], 50)
    assert {name: found["gain"]["mean"] for name, found in both["overall"].items()} == {
        "all": 4.0, "drawn": 3.0, "natural": 5.0,
    }  # fmt: skip
    assert {name: found["gain"]["mean"] for name, found in both["kinds"].items()} == {
        "drawn, tone": 3.0, "natural, tone": 5.0,
    }  # fmt: skip
    assert both["traits"]["fast"]["gain"]["mean"] == 4.0
    assert "half" not in one["overall"]["drawn"]
