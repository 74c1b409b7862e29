"""Every figure that a session leaves behind, by hand: metrics, ledger and log."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve.delivery.session import Delivery, SourceFrame
from serve.front.account import Account, refused
from serve.front.door import Visitor
from serve.hub.ledger import Ledger, Usage
from serve.metrics import Metrics
from serve.tenants import Tenant
from serve.wire.protocol import Mode, WireError
from serve.wire.work import Edited, Opening

TENANT = Tenant("acme", max_sessions=2)
PIXELS = np.zeros((64, 96, 3), np.uint8)
FPS, CHUNK = 12.0, 12


class Told:
    """A session's account, under a clock that the test moves."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, mode: Mode = "live", epoch: int = 0
    ) -> None:
        self.now = 100.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("serve.front.account.time", clock)
        self.metrics = Metrics(gpu_hour_cost=7200.0)
        self.ledger = Ledger(clock=lambda: self.now)
        self.usage = Usage("front", clock=lambda: self.now)
        self.opening = Opening("s", "red", 96, 64, FPS, mode, epoch=epoch)
        self.account = Account(
            Visitor(TENANT, "secret", "203.0.113.9"), self.opening,
            metrics=self.metrics, ledger=self.ledger, usage=self.usage,
        )  # fmt: skip

    def enter(self) -> None:
        asyncio.run(self.account.enter())

    def opened(self, at: float, model: str) -> None:
        if self.account.key not in self.usage._held:
            self.enter()
        self.now = at
        self.account.opened(model)

    def delivered(
        self, at: float, index: int, frames: int, *, latency: float = 0.5, rung: str = "full",
        model: str = "one", dropped: int = 0, recomputed: float = 0.25,
    ) -> None:  # fmt: skip
        self.now = at
        edited = Edited(
            index, index, recomputed, 4, 200.0, 50.0, 20.0, None, None, rung=rung,
        )  # fmt: skip
        source = [SourceFrame(n, 0, PIXELS, 0.0, "red") for n in range(frames)]
        delivery = Delivery(edited, "red", source, frames, False, latency, model, 0.0, at)
        self.account.delivered(delivery, chunk_frames=CHUNK, dropped=dropped)

    def ended(self, at: float, outcome: str) -> None:
        self.now = at
        asyncio.run(self.account.ended(outcome))

    def figures(self) -> dict[str, float]:
        """All that are not nothing, but for what buckets they fell into."""
        found: dict[str, float] = {}
        for metric in self.metrics.registry.collect():
            for sample in metric.samples:
                if sample.value and not sample.name.endswith("_bucket"):
                    labels = ",".join(v for k, v in sorted(sample.labels.items()) if k != "tenant")
                    assert sample.labels.get("tenant", "acme") == "acme"
                    found[f"{sample.name.removeprefix('liveedit_')} {labels}".strip()] = (
                        sample.value
                    )
        return found


def test_the_figures_of_a_session(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    told = Told(monkeypatch)
    told.enter()
    assert told.figures() == {}  # it has no editor yet
    assert told.ledger._sessions == {("s", 0): ("acme", 100.0)}
    told.opened(103.0, "one")
    assert told.figures() == {"sessions": 1, "sessions_admitted_total one": 1}
    told.delivered(105.0, 0, 9, latency=0.75)
    told.delivered(106.5, 1, CHUNK, latency=1.0, rung="mask", dropped=4)  # just in time
    told.delivered(108.0, 2, CHUNK, latency=1.25, rung="mask", model="two", dropped=7)
    told.delivered(109.0, 3, 3, latency=0.5, rung="steps", model="two", dropped=7)
    told.delivered(109.5, 4, 0, model="two", dropped=8)  # nothing but the end
    told.now = 110.0
    assert told.usage.used().seconds == {"acme": 7.0}  # since it had an editor
    told.ended(110.25, "close")
    assert told.figures() == pytest.approx({
        "sessions_admitted_total one": 1,
        "sessions_ended_total two,close": 1,
        "session_seconds_count": 1,
        "session_seconds_sum": 10.25,
        "session_gpu_seconds_count": 1,
        "session_gpu_seconds_sum": 1.0,
        "gpu_seconds_total one": 0.5,
        "gpu_seconds_total two": 0.5,
        "cost_total one": 1.0,
        "cost_total two": 1.0,
        "session_time_seconds_total one": 3.5,
        "session_time_seconds_total two": 3.75,
        "first_chunk_seconds_count": 1,
        "first_chunk_seconds_sum": 5.0,
        "chunk_latency_seconds_count": 4,
        "chunk_latency_seconds_sum": 3.5,
        "chunk_deadlines_total yes,one": 2,
        "chunk_deadlines_total yes,two": 1,
        "chunk_deadlines_total no,two": 1,
        "chunks_lowered_total one,mask": 1,
        "chunks_lowered_total two,mask": 1,
        "chunks_lowered_total two,steps": 1,
        "frames_edited_total one": 21,
        "frames_edited_total two": 15,
        "frames_dropped_total one": 4,
        "frames_dropped_total two": 4,
        "recomputed_share_count": 4,
        "recomputed_share_sum": 1.0,
    })  # fmt: skip
    assert told.ledger._sessions == told.usage._held == {}
    lines = [record.__dict__ for record in caplog.records]
    assert [line["event"] for line in lines] == ["opened", "rolled", "ended"]
    about = {
        "session": "s", "tenant": "acme", "client": "203.0.113.9", "width": 96, "height": 64,
        "fps": FPS, "mode": "live",
    }  # fmt: skip
    wanted: tuple[dict[str, Any], ...] = (
        {**about, "model": "one"},
        {"session": "s", "model": "two"},
        {
            **about, "model": "one, two", "reason": "close", "seconds": 10.2, "frames": 36,
            "dropped": 8, "gpu_s": 1.0, "quality": "1 on full, 2 on mask, 1 on steps of 4 chunks",
        },
    )  # fmt: skip
    for line, values in zip(lines, wanted, strict=True):
        assert {name: line[name] for name in values} == values
    assert lines[2]["message"] == (
        "session s: close after 10.2 s, 36 frames edited, 8 dropped, 1.00 s of compute; 96x64 at "
        "12 fps, live, for acme from 203.0.113.9, by one, two; edited 1 on full, 2 on mask, 1 on "
        "steps of 4 chunks"
    )


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        ([], "as asked"),
        (["full"], "as asked"),
        (["full", "full"], "as asked"),
        (["mask"], "1 on mask of 1 chunks"),
        (["steps", "size", "full", "slowed", "size"],
         "1 on full, 1 on slowed, 2 on size, 1 on steps of 5 chunks"),
    ],
)  # fmt: skip
def test_how_well_it_was_edited_is_said_in_words(
    rungs: list[str], words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    told = Told(monkeypatch)
    told.opened(100.0, "one")
    for index, rung in enumerate(rungs):
        told.delivered(101.0, index, CHUNK, rung=rung)
    told.ended(102.0, "close")
    assert caplog.records[-1].__dict__["quality"] == words


def test_a_session_that_comes_back_is_no_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor in the ledger: its newer holder is there before the older has left."""
    caplog.set_level("INFO")
    told = Told(monkeypatch, epoch=2)
    told.enter()
    assert list(told.ledger._sessions) == list(told.usage._held) == [("s", 2)]
    assert not told.ledger._opens["acme"]
    told.opened(101.0, "one")
    assert told.figures() == {"sessions": 1, "sessions_resumed_total one": 1}
    assert caplog.records[-1].__dict__["event"] == "resumed"
    told.delivered(102.0, 5, CHUNK)  # not the first of its session
    assert "first_chunk_seconds_count" not in told.figures()


def test_what_never_had_an_editor_leaves_no_figure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    told = Told(monkeypatch)
    told.enter()
    told.ended(130.0, "at_capacity")
    assert (told.figures(), caplog.records) == ({}, [])
    assert told.ledger._sessions == told.usage._held == {}
    others = [Told(monkeypatch).account for _ in range(2)]
    for n, account in enumerate(others):  # as many as its tenant may have, and one
        account.key, account._ledger = (f"other {n}", 0), told.ledger
        asyncio.run(account.enter())
    with pytest.raises(WireError, match="2 sessions are open and 2 may be"):
        told.enter()
    assert told.usage._held == {}


@pytest.mark.parametrize(
    ("mode", "gap", "quiet", "stalls"),
    [
        ("live", 1.5, 0.0, 0),  # a chunk and a half, just so
        ("live", 1.51, 0.0, 1),
        ("live", 1.51, 1.5, 1),
        ("live", 9.0, 1.51, 0),  # its source pauses
        ("lossless", 9.0, 0.0, 0),
    ],
)
def test_what_counts_as_standing_still(
    mode: Mode, gap: float, quiet: float, stalls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(monkeypatch, mode=mode)
    told.opened(100.0, "one")
    told.account.sent(chunk_frames=CHUNK, frame_at=0.0)  # the first ends no pause
    told.now += gap
    told.account.sent(chunk_frames=CHUNK, frame_at=told.now - quiet)
    told.account.sent(chunk_frames=CHUNK, frame_at=told.now)
    assert told.figures().get("stalls_total one", 0) == stalls


def test_a_lossless_session_has_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, mode="lossless")
    told.opened(100.0, "one")
    told.delivered(101.0, 0, 9, latency=30.0)
    assert not [name for name in told.figures() if "deadline" in name]


@pytest.mark.parametrize("tenant", ["acme", ""])
def test_a_refusal_is_counted_and_said(tenant: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    metrics = Metrics()
    refused(metrics, "bad_request", "no such model", tenant=tenant, client="203.0.113.9")
    (found,) = (
        sample.labels
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "liveedit_sessions_refused_total"
    )
    assert found == {"code": "bad_request", "tenant": tenant}
    (line,) = caplog.records
    who = tenant or "nobody"
    assert line.getMessage() == (f"refused: bad_request: no such model; for {who} from 203.0.113.9")
