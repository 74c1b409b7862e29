"""The benchmark at its smallest: the demo preset on a CPU.

No test depends on how long anything takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling.config import ModelConfig
from modeling.model_dir import save_model
from modeling.presets import PRESETS
from pipelines.bench.check import compare, ratios, read_report
from pipelines.bench.chunk_times import ChunkTimer, ChunkTimes
from pipelines.bench.machine import yardstick
from pipelines.bench.stream import StreamBench, in_real_time
from pipelines.bench.subject import BenchOptions, build_editor, noise_frames
from pipelines.commands.measure.stream import bench_app
from tests.known_editors import known_model

SMALL = ["stream", "demo", "--device", "cpu", "--size", "48x32", "--chunks", "2"]
OPTIONS = BenchOptions(model="demo", device="cpu", chunks=2, sessions=0)


@pytest.fixture(scope="module", autouse=True)
def _a_small_demo(tiny_config: ModelConfig) -> Iterator[None]:
    """What is asked is how it is timed, not how long it takes."""
    demo = PRESETS["demo"]
    stream = replace(demo.stream, window_latents=tiny_config.stream.window_latents)
    small = replace(demo, transformer=tiny_config.transformer, stream=stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "demo", small)
        # By default 23 products of a twentieth of a second each.
        patch.setattr("pipelines.bench.stream.yardstick", partial(yardstick, repeats=1))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("bench")
    json_file, plot_file = folder / "bench.json", folder / "bench.png"
    arguments = [*SMALL, "--sessions", "1", "--json", str(json_file), "--plot", str(plot_file)]
    result = CliRunner().invoke(bench_app, arguments)
    assert result.exit_code == 0, result.output
    return json_file, plot_file, result.output


@pytest.fixture(scope="module")
def report(files: tuple[Path, Path, str]) -> dict[str, Any]:
    return read_report(files[0])


def test_report_splits_every_chunk(report: dict[str, Any]) -> None:
    for entry in report["variants"].values():
        assert len(entry["chunks"]) == 2
        for chunk in entry["chunks"]:
            assert min(chunk["encode"], chunk["D"], chunk["decode"]) > 0
            assert chunk["encode"] + chunk["D"] + chunk["decode"] <= chunk["V"]
        assert entry["V"]["fps"] == pytest.approx(12000 / entry["V"]["p50_ms"])
    assert report["variants"]["dense"]["recomputed"] == 1.0
    assert 0.5 < report["variants"]["mask cache"]["recomputed"] < 1.0
    assert report["hardware"]["device"] == "cpu"
    assert report["memory"]["weights_gib"] > 0
    assert [entry["sessions"] for entry in report["sessions"]["tried"]] == [1]
    assert report["sessions"]["variant"] == "mask cache"  # what who opens a stream gets
    yardstick = report["yardstick"]
    operations = 2 * yardstick["size"] ** 3  # a product and a sum each
    assert yardstick["tflops"] == pytest.approx(operations / (yardstick["ms"] * 1e9))


def test_a_working_size_is_timed_as_a_part_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "half.json"
    arguments = [*SMALL, "--sessions", "0", "--work-size", "32x16", "--json", str(file)]
    result = CliRunner().invoke(bench_app, arguments)
    assert result.exit_code == 0, result.output
    assert "48x32 edited at 32x16 with the source's detail" in result.output
    report = read_report(file)
    config = report["config"]
    assert (config["work_width"], config["work_height"], config["detail"]) == (32, 16, "source")
    for entry in report["variants"].values():
        for chunk in entry["chunks"]:
            parts = [chunk[part] for part in ("encode", "D", "decode", "detail")]
            assert min(parts) > 0
            assert sum(parts) <= chunk["V"]
            # The source's way back through the decoder alone takes about what the edit's does.
            assert chunk["detail"] > chunk["decode"] / 3


def test_table_and_picture_show_it(files: tuple[Path, Path, str]) -> None:
    for words in ("V video to video", "mask cache", "live sessions", "48x32"):
        assert words in files[2]
    with Image.open(files[1]) as image:
        assert len(image.getcolors(1 << 20) or []) > 8


def test_check_names_what_got_worse(report: dict[str, Any]) -> None:
    assert not any(comparison.regressed for comparison in compare(report, report))
    better = deepcopy(report)
    better["ratios"]["D mask cache / D dense"]["value"] /= 1.2
    worse = [c for c in compare(report, better) if c.regressed]
    assert [c.name for c in worse] == ["D mask cache / D dense"]
    assert "+20%, allowed +15%" in str(worse[0])


def test_check_fails_the_command(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the figures that were measured above, which one more run would only measure again."""
    given: list[Any] = []
    monkeypatch.setattr(
        "pipelines.bench.stream.measure", lambda *told: given.append(told) or deepcopy(report)
    )
    stored = deepcopy(report)
    for entry in stored["ratios"].values():
        entry["tolerance"] = 1e6
    stored["ratios"]["V dense / D dense"] |= {"value": 1e-3, "tolerance": 0.1}
    (tmp_path / "stored.json").write_text(json.dumps(stored))
    arguments = [*SMALL, "--sessions", "0", "--check", str(tmp_path / "stored.json")]
    result = CliRunner().invoke(bench_app, arguments)
    assert result.exit_code == 1
    assert result.output.strip().endswith("V dense / D dense")
    ((options, compared, _),) = given
    assert (options.size, options.chunks, options.sessions) == ((32, 48), 2, 0)
    assert compared == stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "FILE", "--keep", "0.5"], "mask_cache.keep_ratio 0.3 there, 0.5 here"),
        (["--check", "absent.json"], "does not exist"),
        (["--json", "absent/x.json"], "folder absent"),
        (["--no-cache", "--keep", "0.5"], "excludes"),
        (["--fp8"], "fp8 needs a GPU"),
        (["--pruned-steps", "3,4"], "beyond the 4"),
        (["--chunks", "1"], "spread"),
        (["--policy", "guess"], "'guess'; there are budget, follow, published, settled"),
        (["--vae", "guess"], "unknown VAE 'guess'; there are folded, tiny, wan"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(
    arguments: list[str], message: str, files: tuple[Path, Path, str]
) -> None:
    given = [str(files[0]) if a == "FILE" else a for a in arguments]
    result = CliRunner().invoke(bench_app, [*SMALL, *given])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_watching_a_stream_changes_nothing() -> None:
    editor = build_editor(OPTIONS)
    source = noise_frames(12, 32, 48)
    timer = ChunkTimer(editor, source)
    plain, watched = (editor.open("a", height=32, width=48) for _ in range(2))
    expected = [next(plain.push(source[: plain.wanted_frames])) for _ in range(3)]
    with timer.watch():
        times = [timer.push(watched) for _ in range(2)]
    assert "encode" not in vars(editor.vae)
    last = next(watched.push(source))
    assert np.array_equal(last.frames, expected[2].frames)
    assert [t.index for t in times] == [0, 1]


def test_the_parts_of_a_chunk_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes as long as nothing else does; what is decoded second is the source."""
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for name in ("pipelines.bench.chunk_times", "modeling.streaming.device"):
        monkeypatch.setattr(f"{name}.time", clock)

    def takes(*seconds: float) -> Callable[[], None]:
        left = cycle(seconds)
        return lambda: now.__setitem__(0, now[0] + next(left))

    vae = SimpleNamespace(encode=takes(2), decode=takes(3, 5))
    editor: Any = SimpleNamespace(
        device=torch.device("cpu"),
        vae=vae,
        resize=takes(0.5),
        following=takes(0.25),
        transfer=takes(4),
    )
    before, transformer = takes(1), takes(10)

    def push(frames: np.ndarray) -> Iterator[Any]:
        assert len(frames) == 12
        for part in (before, vae.encode, editor.resize, transformer, vae.decode, vae.decode):
            part()
        editor.resize()
        editor.following()
        editor.transfer()
        yield SimpleNamespace(recomputed=0.25, index=7)

    stream: Any = SimpleNamespace(wanted_frames=12, push=push)
    timer = ChunkTimer(editor, noise_frames(12, 2, 2))
    with timer.watch():
        found = timer.run(stream, 2)
    assert [asdict(times) for times in found] == 2 * [
        pytest.approx(
            {"encode": 2000, "transformer": 10000, "decode": 3000, "detail": 5000 + 4250 + 1000,
             "answer": 26250, "whole": 26250, "recomputed": 0.25, "index": 7}
        )
    ]  # fmt: skip


def test_variants_share_an_editor() -> None:
    editor = build_editor(OPTIONS)
    dense = editor.open("a", height=32, width=48, mask_cache=None)
    source = noise_frames(9 + 12, 32, 48)
    assert [chunk.recomputed for chunk in dense.push(source)] == [1.0, 1.0]
    cached = editor.open("a", height=32, width=48)
    assert [chunk.recomputed < 1 for chunk in cached.push(source)] == [False, True]


def test_plain_path_has_networks_of_its_own(report: dict[str, Any]) -> None:
    editor = build_editor(OPTIONS)
    bench = StreamBench(editor, replace(OPTIONS, size=(32, 48)), note=lambda text: None)
    assert bench.time_plain() is None
    editor.accelerated = True  # as on a GPU; the plain path must then differ from the editor's
    plain = bench.time_plain()
    assert plain is not None
    assert plain["recomputed"] == 1.0
    assert {"D dense / D plain", "VAE / VAE plain"} <= set(ratios(report | {"plain": plain}))


def test_benchmarks_never_load_a_text_encoder() -> None:
    editor = build_editor(OPTIONS)
    assert editor.config.text.kind == "words"
    assert editor.config.transformer == PRESETS["demo"].transformer


def test_a_model_directory_runs_in_what_a_cpu_computes_in(tmp_path: Path) -> None:
    """However its weights are stored."""
    model = known_model()
    parts = {"transformer": model.transformer, "vae": model.vae}
    save_model(tmp_path / "m", model.config, **parts, card={"name": "mine"}, dtype=torch.bfloat16)
    editor = build_editor(replace(OPTIONS, model=str(tmp_path / "m")))
    assert {parameter.dtype for parameter in editor.transformer.parameters()} == {torch.float32}
    assert editor.name == "mine"


def test_late_sessions_fall_behind() -> None:
    def latencies(cost: float, sessions: int, rounds: int, rest: float = 0) -> list[float]:
        times = ChunkTimes(0, 0, 0, 0, answer=cost - rest, whole=cost, recomputed=1, index=0)
        return in_real_time(lambda _: times, sessions=sessions, rounds=rounds, period=750)

    assert latencies(100, sessions=1, rounds=3) == [100, 100, 100]
    assert latencies(300, sessions=2, rounds=2) == [300, 600, 300, 600]
    assert latencies(300, sessions=3, rounds=2) == [300, 600, 900, 450, 750, 1050]
    assert latencies(300, sessions=3, rounds=1, rest=50) == [250, 550, 850]
