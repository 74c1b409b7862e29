"""The slowest chunk of a file of spans, from lines written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.runtime.errors import UserError
from pipelines.cli import app
from pipelines.commands.measure.trace import read_ways, trace

TIMES = (("front.receive", 700), ("codec.decode", 2), ("editor.device", 100), ("codec.encode", 10))


def line(trace: str, name: str, began_ms: int, ended_ms: int, **attributes: Any) -> str:
    began, ended = (f"2026-01-02T03:04:{ms // 1000:02}.{ms % 1000:03}000Z"
                    for ms in (began_ms, ended_ms))  # fmt: skip
    context = {"trace_id": trace, "span_id": "0x1"}
    span = {"name": name, "context": context, "start_time": began, "end_time": ended}
    return json.dumps({**span, "attributes": attributes}) + "\n"


def chunk(number: int, device_ms: int, session: str = "one") -> str:
    """Spans one after the other, the root last, as they are written."""
    trace, at, lines = f"{session}{number}", 0, ""
    for name, ms in TIMES:
        ms = device_ms if name == "editor.device" else ms
        lines += line(trace, name, at, at + ms)
        at += ms
    lines += line(trace, "front.pace", at, at + 700)
    about = {
        "session": session, "chunk": number, "latency_ms": at - 700.0, "size": "48x32",
        "work_size": "32x16", "fps": 16.0, "mode": "live", "rung": "size", "steps": 4,
        "recomputed": 0.6,
    }  # fmt: skip
    return lines + line(trace, "chunk", 0, at + 700, **about)


def shown(*arguments: str) -> str:
    answer = CliRunner().invoke(app, ["trace", *arguments], env={"COLUMNS": "200"})
    assert answer.exit_code == 0, answer.output
    return answer.output


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Three chunks of two fronts, the second of which was killed while it wrote."""
    (tmp_path / "a.jsonl").write_text(chunk(0, 100) + chunk(1, 400))
    (tmp_path / "b.jsonl").write_text(chunk(7, 120, "two") + chunk(8, 900, "two")[:-40])
    return tmp_path


def test_the_slowest_is_shown_beside_what_is_usual(traces: Path) -> None:
    said = shown(str(traces))
    assert "chunk 1 of session one: 412.0 ms" in said
    assert "P50 of 3 chunks 132.0 ms" in said
    assert "48x32 edited at 32x16, 16 fps, live, size, 4 steps, 60% recomputed" in said
    rows = {row.split()[1]: row for row in said.splitlines() if row.startswith("│")}
    assert list(rows) == ["front.receive", "codec.decode", "editor.device", "codec.encode",
                          "front.pace"]  # fmt: skip
    assert rows["editor.device"].split()[3:8:2] == ["400.0", "120.0", "400.0"]
    bars = {name: row.count("█") for name, row in rows.items()}
    assert bars == {"front.receive": 0, "codec.decode": 1, "editor.device": 35,
                    "codec.encode": 1, "front.pace": 0}  # fmt: skip


def test_a_root_whose_spans_are_not_there_is_no_whole_chunk(traces: Path) -> None:
    """As where they lie in another front's file, which is not given."""
    whole = chunk(2, 100)
    (tmp := traces / "c.jsonl").write_text(whole.splitlines(keepends=True)[-1])
    assert len(read_ways(traces)) == 3
    with pytest.raises(UserError, match="holds no whole chunk"):
        trace(tmp)


def test_a_chunk_without_a_front_is_drawn_from_its_first_span_to_its_last(tmp_path: Path) -> None:
    """As of an editor's file alone."""
    spans = (("editor.queue", 0, 10), ("editor.device", 10, 30), ("codec.encode", 30, 40))
    about = {
        "session": "s", "chunk": 0, "latency_ms": 40.0, "size": "48x32", "work_size": "32x16",
        "fps": 16.0, "mode": "live", "rung": "full", "steps": 4, "recomputed": 1.0,
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(
        "".join(line("t", *span) for span in spans) + line("t", "chunk", 0, 40, **about)
    )
    bars = [row.split("│")[5] for row in shown(str(tmp_path)).splitlines() if "│" in row]
    assert [(len(bar) - len(bar.lstrip()) - 1, bar.count("█")) for bar in bars] == [
        (0, 9), (9, 18), (27, 9),
    ]  # fmt: skip


def test_another_session_and_the_next_slowest(traces: Path) -> None:
    assert "chunk 7 of session two: 132.0 ms" in shown(str(traces), "--session", "two")
    assert "chunk 0 of session one" in shown(str(traces / "a.jsonl"), "--nth", "2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f.write_text(""), "holds no whole chunk; serve with traces="),
        (lambda f: f.write_text("{}\n" + chunk(0, 1)), "a.jsonl:1 is no span"),
        (lambda f: f.write_text("[1]\n" + chunk(0, 1)), "a.jsonl:1 is no span"),
        (lambda f: f.unlink(), "cannot be read (No such file or directory); give a file or folder"),
    ],
)
def test_what_is_no_trace_is_said(
    tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(chunk(0, 100))
    change(file)
    answer = CliRunner().invoke(app, ["trace", str(file)])
    assert isinstance(answer.exception, UserError)
    assert told in str(answer.exception)


def test_no_chunk_of_that_session_or_so_many(traces: Path) -> None:
    for arguments, told in (
        (["--session", "x"], "no whole chunk of session x"), (["--nth", "4"], "holds 3 chunks")
    ):  # fmt: skip
        answer = CliRunner().invoke(app, ["trace", str(traces), *arguments])
        assert told in str(answer.exception)
    assert len(read_ways(traces)) == 3
