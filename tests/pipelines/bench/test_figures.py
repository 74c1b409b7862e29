"""The benchmarks' arithmetic, by hand, on reports that no machine made."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modeling.config import MaskCacheConfig
from modeling.presets import PRESETS
from pipelines.bench import SCHEMA
from pipelines.bench import report as stream_report
from pipelines.bench import serve as serve_report
from pipelines.bench.check import Comparison, compare, ratios, read_report, require_same_work
from pipelines.bench.chunk_times import ChunkTimes
from pipelines.bench.plot import PARTS, draw
from pipelines.bench.serve import killer
from pipelines.bench.stream import percentiles, summary
from pipelines.bench.subject import BenchOptions, build_editor, describe, noise_frames
from pipelines.commands.measure.stream import parse_guide
from pipelines.commands.options import parse_numbers, parse_size
from serve.client.cameras import CameraLoad


def times(encode: float, d: float, decode: float, v: float) -> dict[str, Any]:
    parts = {"encode": encode, "D": d, "decode": decode, "detail": 3, "E": d + decode, "V": v}
    entries = {
        name: {"p50_ms": ms, "p99_ms": 2 * ms, "fps": 12000 / ms, "spread": 0.01}
        for name, ms in parts.items()
    }
    chunk = {"encode": encode, "D": d, "decode": decode, "detail": 3, "V": v}
    last = {"last_frame": {"p50_ms": 3.0, "p99_ms": 4.0}, "recomputed": 1.0}
    return entries | last | {"chunks": [chunk, chunk]}


def measured() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "variants": {"dense": times(5, 70, 11, 130), "mask cache": times(5, 35, 11, 65)},
        "plain": times(15, 140, 49, 280),
        "yardstick": {"ms": 2.0},
        "start": {
            "cold": {"first_chunk_ms": 9000.0, "slowest_next_ms": 40700.0},
            "warm": {"first_chunk_ms": 1200.0, "slowest_next_ms": 300.0},
        },
        "memory": {
            "measure": "cuda reserved",
            "weights_gib": 2.5,
            "one_stream_gib": 3.25,
            "held_gib": 2.75,
        },
        "sessions": {
            "variant": "mask cache",
            "deadline_ms": 750.0,
            "held": 1,
            "tried": [
                {"sessions": 1, "holds": True, "p50_ms": 1.0, "p99_ms": 600.0, "memory_gib": 3.5},
                {"sessions": 2, "holds": False, "p50_ms": 1.0, "p99_ms": 900.0, "memory_gib": 4.5},
                {"sessions": 3, "holds": False, "out_of_memory": True},
            ],
        },
        "load_s": 4.0,
        "config": {
            "model": "demo", "vae": "tiny", "width": 832, "height": 480, "dtype": "bfloat16",
            "steps": 4, "chunk_frames": 12, "transformer": {"dim": 8},
            "mask_cache": {"keep_ratio": 0.3},
        },
        "hardware": {"device": "cuda", "gpu": "A card", "cpu": "a cpu", "torch": "2"},
    }  # fmt: skip


def test_ratios_by_hand() -> None:
    report = measured()
    values = {name: entry["value"] for name, entry in ratios(report).items()}
    assert values == pytest.approx(
        {
            "D dense / matrix product": 70 / 2,
            "V dense / D dense": 130 / 70,
            "V dense / (encode + D + decode)": 130 / (5 + 70 + 11 + 3),
            "D mask cache / D dense": 35 / 70,
            "D dense / D plain": 70 / 140,
            "VAE / VAE plain": (5 + 11) / (15 + 49),
        }
    )
    assert {entry["tolerance"] for entry in ratios(report).values()} == {0.15}
    del report["variants"]["mask cache"]
    report["plain"] = None
    assert list(ratios(report)) == list(values)[:3]


@pytest.mark.parametrize(
    ("now", "regressed"), [(0.5, False), (1.1, False), (1.25, False), (1.26, True)]
)
def test_a_ratio_may_get_worse_by_its_tolerance(now: float, regressed: bool) -> None:
    assert Comparison("r", 1.0, now, 0.25).regressed == regressed


def test_a_comparison_is_of_the_same_ratio_with_the_stored_tolerance() -> None:
    report = {**measured(), "ratios": ratios(measured())}
    stored = deepcopy(report)
    for n, entry in enumerate(stored["ratios"].values()):
        entry["value"] *= 1 + n
        entry["tolerance"] = 0.01 * n
    for n, comparison in enumerate(compare(report, stored)):
        now = report["ratios"][comparison.name]["value"]
        assert (comparison.now, comparison.stored) == (now, now * (1 + n))
        assert comparison.tolerance == 0.01 * n


@pytest.mark.parametrize("key", ["vae", "width", "height", "dtype", "steps", "chunk_frames"])
def test_reports_of_other_work_are_not_compared(key: str) -> None:
    other = deepcopy(measured())
    other["config"][key] = "another"
    with pytest.raises(ValueError, match=f"{key} another there, {measured()['config'][key]} here"):
        require_same_work(measured(), other)


def test_sizes_within_decide_the_work_and_the_label_and_the_card_do_not() -> None:
    other = deepcopy(measured())
    other["config"]["model"], other["hardware"]["gpu"] = "models/mine", "Another card"
    require_same_work(measured(), other)
    for section, key in (("transformer", "dim"), ("mask_cache", "keep_ratio")):
        changed = deepcopy(measured())
        changed["config"][section][key] = 77
        with pytest.raises(ValueError, match=f"{section}.{key} 77 there"):
            require_same_work(measured(), changed)
    other["hardware"]["device"] = "cpu"
    with pytest.raises(ValueError, match="device cpu there, cuda here"):
        require_same_work(measured(), other)
    without = deepcopy(measured())
    without["config"]["mask_cache"] = None
    with pytest.raises(ValueError, match="mask_cache"):
        require_same_work(without, measured())


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"schema": 0}', '{"schema": 2}', "{}"])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json (is no valid JSON|has schema)"):
        read_report(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(measured()))
    assert read_report(tmp_path / "r.json") == measured()


def test_a_summary_by_hand() -> None:
    def chunk(n: float) -> ChunkTimes:
        return ChunkTimes(n, 10 * n, 2 * n, 3 * n, 99.0, 20 * n, recomputed=n / 10, index=0)

    found = summary([[chunk(1), chunk(2)], [chunk(3), chunk(5), chunk(4)]], frames=12)
    for name, factor in (
        ("encode", 1),
        ("D", 10),
        ("decode", 2),
        ("detail", 3),
        ("E", 12),
        ("V", 20),
    ):
        assert found[name]["p50_ms"] == pytest.approx(3 * factor)
        assert found[name]["p99_ms"] == pytest.approx((4 + 0.96) * factor)
        assert found[name]["fps"] == pytest.approx(12 / (3 * factor) * 1000)
        assert found[name]["spread"] == pytest.approx((4 - 1.5) / 3)
    assert found["recomputed"] == pytest.approx(0.3)
    assert found["chunks"][1] == {"encode": 2, "D": 20, "decode": 4, "detail": 6, "V": 40}
    assert percentiles([1.0, 2.0, 3.0]) == pytest.approx({"p50_ms": 2.0, "p99_ms": 2.98})


def test_words_of_the_command_line() -> None:
    assert parse_size("832x480") == (480, 832)
    assert (parse_guide("decoded"), parse_guide("0.5")) == ("decoded", 0.5)
    assert parse_numbers("--sessions", "1, 2,4", 1) == (1, 2, 4)
    assert parse_numbers("--zero", "0", 0) == (0,)
    for parse, wrongs in (
        (parse_size, ("832", "x480", "832x", "axb", "-8x8", "8x8x8", "8x\u00b2", "0x8")),
        (partial(parse_numbers, "--gpus", least=0), ("", "1,", "a", "-1", "1;2", "\u00b2")),
        (partial(parse_numbers, "--gpus", least=1), ("0", "1,0")),
        (parse_guide, ("", "blurred", "0,5")),
    ):
        for wrong in wrongs:
            with pytest.raises(ValueError, match="must be"):
                parse(wrong)  # type: ignore[operator]


OPTIONS = BenchOptions(model="demo", device="cpu", chunks=2, sessions=0)
ASKED: dict[str, Any] = {
    "policy": "published", "keep_ratio": 0.4, "scope": "block", "pruned_steps": (2, 3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunks": 1}, "leaves no spread"),
        ({"sessions": -1}, "is negative"),
        *(
            ({"no_cache": True, name: value}, "--no-cache excludes")
            for name, value in ASKED.items()
        ),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(OPTIONS, **changes)
    assert replace(OPTIONS, no_cache=True).mask_cache(PRESETS["demo"]) is None


def test_what_is_asked_for_is_timed() -> None:
    assert replace(OPTIONS, **ASKED).mask_cache(PRESETS["demo"]) == MaskCacheConfig(**ASKED)


def test_a_mask_cache_for_a_model_of_two_steps_prunes_the_second() -> None:
    natural = PRESETS["natural"]
    two = replace(natural, stream=replace(natural.stream, timesteps=(1000, 500)))
    asked = replace(OPTIONS, policy="published").mask_cache(two)
    assert asked == MaskCacheConfig(policy="published", pruned_steps=(1,))
    own = PRESETS["demo"].stream.mask_cache
    assert OPTIONS.mask_cache(PRESETS["demo"]) == (own or MaskCacheConfig())
    for name, value in ASKED.items():
        chosen = replace(OPTIONS, **{name: value}).mask_cache(PRESETS["demo"])
        assert chosen == replace(own or MaskCacheConfig(), **{name: value})
    with pytest.raises(ValueError, match="beyond the 4"):
        replace(OPTIONS, pruned_steps=(4,)).mask_cache(PRESETS["demo"])
    editor = build_editor(replace(OPTIONS, **ASKED))
    told = describe(editor, OPTIONS, (48, 64))
    assert (told["height"], told["width"], told["dtype"]) == (48, 64, "float32")
    wanted = asdict(MaskCacheConfig(**ASKED))
    assert told["mask_cache"] == {**wanted, "pruned_steps": [2, 3]}
    assert told["chunk_frames"] == 12
    assert noise_frames(2, 3, 4).shape == (2, 3, 4, 3)
    half = replace(OPTIONS, work_size="1/2", detail="source")
    for guide, blur in (("decoded", None), (0.5, 0.5)):
        editor = build_editor(replace(OPTIONS, guide_blur=guide))  # type: ignore[arg-type]
        assert editor.settings.guide_blur == blur
        assert describe(editor, half, (48, 64)).get("guide_blur") == blur
        assert "guide_blur" not in describe(editor, OPTIONS, (48, 64))  # has no detail
    with pytest.raises(ValueError, match="neither a model directory nor one of the presets"):
        build_editor(replace(OPTIONS, model="nowhere"))


def shown(view: object) -> str:
    text = StringIO()
    Console(file=text, width=200).print(view)
    return text.getvalue()


def test_the_table_and_the_facts_hold_the_figures_in_their_places() -> None:
    report = measured()
    heads = [column.header for column in stream_report.table(report).columns]
    assert heads == ["", "dense", "mask cache"]
    rows = {
        line.split("│")[1].strip(): line
        for line in shown(stream_report.table(report)).splitlines()
        if "│" in line
    }
    assert "70.0 / 140.0  171.4" in rows["D transformer"]
    assert rows["D transformer"].index("70.0") < rows["D transformer"].index("35.0 / 70.0")
    assert "81.0 / 162.0" in rows["E D + VAE decode"]
    assert "130.0 / 260.0   92.3" in rows["V video to video"]
    assert "5.0 / 10.0" in rows["VAE encode"]
    assert "11.0 / 22.0" in rows["VAE decode"]
    assert "3.0 / 4.0" in rows["last frame in to edit out"]
    facts = "\n".join(stream_report.facts(report))
    for words in (
        "demo, tiny VAE, 832x480, bfloat16, 4 steps, chunks of 12 frames",
        "A card, torch 2, model built in 4.0 s",
        "first chunk of a cold stream after 9.00 s, no chunk after it above 40.70 s",
        "first chunk of a warm stream after 1.20 s, no chunk after it above 0.30 s",
        "weights 2.50 GiB, with one stream 3.25 GiB, 2.75 GiB between its chunks",
        "D 140.0, encode 15.0, decode 49.0 ms",
        "1 live sessions (mask cache) keep P99 within 750 ms; 1: 600 ms, 3.5 GiB, "
        "2: 900 ms, 4.5 GiB, 3: out of memory",
    ):
        assert words in facts, words


def test_bars_are_as_long_as_the_times() -> None:
    parts, chunks, sessions = draw(measured()).axes
    lengths = {
        bars.get_label(): [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in bars]
        for bars in parts.containers
    }
    assert list(lengths) == list(PARTS)
    assert [lengths[part][0] for part in PARTS] == [(0, 5), (5, 70), (75, 11), (86, 44)]
    assert lengths["D"][1][1] == 35
    assert {text.get_text() for text in parts.texts} >= {"70", "130 ms, 92.3 FPS"}
    lines = {line.get_label(): list(line.get_ydata()) for line in chunks.lines}
    variants = measured()["variants"].items()
    assert lines == {name: [c["V"] for c in entry["chunks"]] for name, entry in variants}
    assert [bar.get_width() for bar in sessions.containers[0]] == [600, 900, 0]
    assert [text.get_text() for text in sessions.texts] == ["600 ms", "900 ms", "out of memory"]
    assert list(sessions.lines[0].get_xdata()) == [750, 750]
    for (first, last), longest in (
        (parts.get_xlim(), 130), (chunks.get_ylim(), 130), (sessions.get_xlim(), 900)
    ):  # fmt: skip
        assert first == 0
        assert longest < last < 1.5 * longest, "all is within the picture and fills it"


def test_cameras_figures_stand_in_their_columns() -> None:
    names = [name for row in serve_report._ROWS.values() for name in row]
    runs = [
        {name: 100.0 * run + n for n, name in enumerate(names)}
        | {"sessions": run, "kills": 4 * (run == 2), "attacks": "floods" * (run == 3)}
        for run in (1, 2, 3)
    ]
    view = serve_report.table(runs)
    heads = [column.header for column in view.columns]
    assert heads == ["", "1 session", "2 sessions, 4 kills", "3 sessions, floods"]
    text = shown(view)
    for label, row in serve_report._ROWS.items():
        (line,) = [line for line in text.splitlines() if f" {label} " in line]
        cells = [cell.strip() for cell in line.split("│")[2:5]]
        assert cells == [" / ".join(f"{run[name]:.1f}" for name in row) for run in runs]
    model = {"name": "m", "device": "cpu", "work_size": "native"}
    machine = {"model": model, "hardware": {"cpu": "a cpu"}}
    said = serve_report.facts(machine, CameraLoad(64, 48, 12.5, "lossless", "png"))
    assert said == "m on cpu, 64x48 edited at native, 12.5 fps, lossless, png; a cpu"
    said = serve_report.facts(machine, CameraLoad(64, 48, work_size="1/2"))
    assert said.startswith("m on cpu, 64x48 edited at 1/2, 16 fps")


def test_fronts_and_editors_are_killed_in_turn_and_as_many_as_asked_for() -> None:
    class Running:
        def __init__(self) -> None:
            self.killed: list[str] = []
            self.alive = True

        def kill(self, kind: str) -> str | None:
            self.killed.append(kind)
            return kind if self.alive else None

    running = Running()
    kill = killer(running, 3)  # type: ignore[arg-type]
    assert asyncio.run(kill())
    running.alive = False  # none is there to be killed: it does not count
    assert not asyncio.run(kill())
    running.alive = True
    assert [asyncio.run(kill()) for _ in range(3)] == [True, True, False]
    assert running.killed == ["editor", "front", "editor", "front"]
