"""Spans of a chunk, with times by hand."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from infra.runtime.errors import UserError
from infra.runtime.paths import ROOT
from pipelines.commands.measure.trace import Way, read_ways
from serve.delivery.session import Delivery, SourceFrame
from serve.front import traces
from serve.front.traces import ChunkTraces, tracer
from serve.wire.work import Edited, Opening

PIXELS = np.zeros((2, 2, 3), np.uint8)
OPENING = Opening("s", "red", 2, 2, 16.0, "live")


def way(folder: Path, monkeypatch: pytest.MonkeyPatch, held_ms: float, begun: float = 2.05) -> Way:
    """Two frames read at 1.0 and 1.5, each decoded in 10 ms; given at 1.6, answered at 2.0 after
    20 ms of queue and 200 ms on the device; sent from 2.2 on."""
    now = 0.0
    monkeypatch.setattr(traces.time, "monotonic", lambda: now)
    made = tracer(str(folder), "front")
    chunk = ChunkTraces(made, OPENING, "acme")
    for index, came in ((0, 1.0), (1, 1.5)):
        now = came + 0.01
        chunk.read(index, came)
    frames = [SourceFrame(n, 0, PIXELS, 0.0, "red") for n in range(2)]
    edited = Edited(
        0, 0, 0.5, 4, 200.0, 50.0, 20.0, None, None,
        rung="mask", work_size="2x2", held_ms=held_ms,
    )  # fmt: skip
    delivery = Delivery(edited, "red", frames, 2, False, 0.5, "m", given=1.6, answered=2.0)
    now = 2.15
    chunk.made(delivery, begun, begun + 0.05)
    now = 2.2
    chunk.sent()
    now = 2.3
    chunk.sent()
    made.span_processor.force_flush()  # type: ignore[attr-defined]
    (found,) = read_ways(folder)
    return found


def test_spans_are_written_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when there are many: who looks for what is slow now would look in vain."""
    monkeypatch.setattr(traces, "WRITE_MS", traces.WRITE_MS / 20)
    tracer(str(tmp_path), "front").start_span("chunk").end()
    deadline = time.monotonic() + 1.5
    while not (tmp_path / "front.jsonl").read_text().endswith("\n"):
        assert time.monotonic() < deadline, "after half a minute, if the pace were what it is"
        time.sleep(0.01)


def test_the_ways_steps_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = way(tmp_path, monkeypatch, held_ms=300.0)
    # 400 ms there and back, of which the editor had it for 300.
    assert [(span.name, round(span.ms)) for span in found.spans] == [
        ("front.receive", 500), ("codec.decode", 10), ("front.wait", 90), ("link.out", 50),
        ("editor.queue", 20), ("editor.device", 200), ("editor.state", 80), ("link.back", 50),
        ("front.queue", 50), ("codec.encode", 50), ("hub.commit", 50), ("front.send", 50),
        ("front.pace", 100),
    ]  # fmt: skip
    assert found.latency_ms == pytest.approx(700.0)
    for name, value in (("session", "s"), ("tenant", "acme"), ("rung", "mask"), ("frames", 2)):
        assert found.about[name] == value


def test_frames_that_went_ahead_are_coded_before_their_chunk_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for begun, left_ms in ((1.97, 20), (1.9, 0)):
        found = way(tmp_path / str(begun), monkeypatch, held_ms=300.0, begun=begun)
        took = {span.name: round(span.ms) for span in found.spans}
        assert took["front.queue"] == 0
        assert took["codec.encode"] == left_ms
        assert took["hub.commit"] == 150 - left_ms


def test_clocks_that_disagree_make_no_span_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = way(tmp_path, monkeypatch, held_ms=500.0)
    assert all(span.ms >= 0 for span in found.spans)


def test_it_costs_nothing_when_it_is_off() -> None:
    """Not even an import."""
    code = "import sys, serve.front.front as f; print([m for m in sys.modules if 'telemetry' in m])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert ran.stdout.decode().strip() == "[]"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"serve setting traces: .*name a folder, or otlp"):
        tracer(str(tmp_path / "file" / "in"), "front")


@pytest.mark.parametrize(
    ("to", "module"),
    [("otlp", "opentelemetry.exporter.otlp.proto.http.trace_exporter"), ("x", "opentelemetry.sdk")],
)
def test_what_is_not_installed_is_named(
    to: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[traces\]"'):
        tracer(to if to == "otlp" else str(tmp_path), "front")


def test_a_collector_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra [traces]")
    asked: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, body))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        made = tracer("otlp", "front")
        made.start_span("editor.device").end()
        made.span_processor.force_flush()  # type: ignore[attr-defined]
    ((path, body),) = asked
    assert path == "/v1/traces"
    assert b"editor.device" in body
    assert b"liveedit" in body
