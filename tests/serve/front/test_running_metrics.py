"""What a running session's metrics say."""

from __future__ import annotations

import pytest

from serve.delivery.pacing import PacedOutbox
from serve.hub.records import Entry
from serve.wire.codec import parse_frame
from tests.serve.front.arithmetic import CHUNK, FIRST
from tests.serve.front.running import say
from tests.serve.front.world import OPEN, Wire, World, frames


def test_only_whole_chunks_say_how_late_frames_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is shorter, and the last what is left: their delays compare with no other."""
    told: list[float | None] = []
    put = PacedOutbox.put

    def record(self: PacedOutbox, entries: list[Entry], arrived: float | None = None) -> None:
        told.append(arrived)
        put(self, entries, arrived)

    monkeypatch.setattr(PacedOutbox, "put", record)
    with World() as world:
        wire = world.connect(OPEN)
        say(world, wire, frames(0, FIRST))
        world.advance(1.0)
        now = world.clock.now
        say(world, wire, frames(FIRST, CHUNK))
        say(world, wire, [*frames(FIRST + CHUNK, 5), {"type": "close"}])
        assert told == [None, pytest.approx(now, abs=0.01), None]


def test_the_metrics_of_a_scripted_session() -> None:
    with World() as world:
        world.editors.chunk_s = 0.2
        wire = world.connect(OPEN | {"mode": "live", "fps": 12})
        assert world.sample("sessions") == 1
        world.advance(1.0)
        say(world, wire, frames(0, FIRST))
        world.advance(0.9)
        world.editors.chunk_s = 1.5  # longer than the second that a chunk lasts
        say(world, wire, frames(FIRST, CHUNK))
        world.advance(3.0)
        # Six more than may wait: the oldest are dropped.
        say(world, wire, frames(FIRST + CHUNK, 8))
        say(world, wire, frames(FIRST + CHUNK + 8, 22))
        world.advance(6.0)
        say(world, wire, [{"type": "close"}])
        world.advance(30.0)
        dropped = sum(m["frames"] for m in wire.messages if m["type"] == "dropped")
        edited = len(wire.frames)
        assert wire.messages[-1] == {"type": "closed", "frames": edited, "reason": "close"}
        assert edited + dropped == FIRST + CHUNK + 30
        assert dropped > 0
        chunks = [m for m in wire.messages if m["type"] == "chunk"]
        value = world.sample
        assert value("sessions") == 0
        assert value("sessions_admitted_total") == 1
        assert value("sessions_resumed_total") == 0
        assert value("sessions_ended_total", reason="close") == 1
        assert value("frames_edited_total") == edited
        assert value("frames_dropped_total") == dropped
        assert value("gpu_seconds_total") == pytest.approx(0.05 * len(chunks))
        assert value("session_gpu_seconds_sum") == pytest.approx(0.05 * len(chunks))
        assert value("session_gpu_seconds_count") == 1
        assert value("recomputed_share_sum") == pytest.approx(0.5 * len(chunks))
        assert value("chunk_latency_seconds_count") == len(chunks)
        latencies = [m["latency_ms"] / 1000 for m in chunks]
        assert latencies[:2] == pytest.approx([0.2, 1.5], abs=0.01)
        assert value("chunk_latency_seconds_sum") == pytest.approx(sum(latencies), abs=0.01)
        met = sum(latency <= 1.0 for latency in latencies)
        assert value("chunk_deadlines_total", met="yes") == met >= 1
        assert value("chunk_deadlines_total", met="no") == len(chunks) - met >= 1
        assert value("first_chunk_seconds_count") == 1
        assert value("first_chunk_seconds_sum") == pytest.approx(1.2, abs=0.01)
        assert value("session_seconds_count") == 1
        assert value("session_seconds_sum") == pytest.approx(world_seconds(world, wire), abs=0.1)


def test_what_sessions_cost_and_how_long_they_last_is_counted_while_they_do() -> None:
    with World() as world:
        world.metrics.gpu_hour_cost = 7.2
        world.editors.chunk_s = 0.2
        wire = world.connect(OPEN | {"mode": "live", "fps": 12})
        say(world, wire, frames(0, FIRST))
        world.advance(30.0)
        say(world, wire, frames(FIRST, CHUNK))
        world.advance(1.0)
        who = {"tenant": "everybody", "model": "known"}
        assert world.sample("cost_total", **who) == pytest.approx(2 * 0.05 / 3600 * 7.2)
        assert world.sample("session_time_seconds_total", **who) == pytest.approx(30.2, abs=0.1)
        world.advance(9.0)
        say(world, wire, [{"type": "close"}])
        world.advance(1.0)
        assert world.sample("session_time_seconds_total", **who) == pytest.approx(40.0, abs=0.3)


def test_without_a_price_there_is_no_cost() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        say(world, wire, [{"type": "close"}])
        assert world.sample("gpu_seconds_total") > 0
        names = {s.name for m in world.metrics.snapshot() for s in m.samples}
        assert "liveedit_cost_total" not in names


def world_seconds(world: World, wire: Wire) -> float:
    assert wire.ended_at is not None
    return wire.ended_at - 100.0  # where the clock starts


@pytest.mark.parametrize(
    ("hang", "pausing", "stalls"), [(1.0, False, 0), (2.5, False, 1), (2.5, True, 0)]
)
def test_a_stall_is_a_pause_in_what_comes_back_while_frames_go_in(
    hang: float, pausing: bool, stalls: int
) -> None:
    """Of more than a chunk and a half; a source that pauses, too, is none."""
    with World() as world:
        wire = world.connect(OPEN | {"mode": "live", "fps": 12})
        sent = 0

        def go_on(seconds: float, sending: bool) -> None:
            nonlocal sent
            for _ in range(round(seconds * 12)):
                if sending:
                    say(world, wire, frames(sent, 1))
                    sent += 1
                world.advance(1 / 12)

        go_on(4.0, True)
        assert world.sample("stalls_total") == 0
        world.editors.chunk_s = hang
        go_on(1.0, True)
        world.editors.chunk_s = 0.0
        go_on(hang, not pausing)
        go_on(4.0, True)
        assert world.sample("stalls_total") == stalls


def test_a_lossless_session_has_no_deadlines_and_no_stalls() -> None:
    with World() as world:
        world.editors.chunk_s = 5.0
        wire = world.connect(OPEN, *frames(0, FIRST + CHUNK))
        for n in range(FIRST + CHUNK, FIRST + 3 * CHUNK):  # frames go in all the while
            world.advance(1.0)
            say(world, wire, frames(n, 1))
        say(world, wire, [{"type": "close"}])
        world.advance(100.0)
        assert wire.code == 1000
        assert len(wire.frames) == FIRST + 3 * CHUNK
        for met in ("yes", "no"):
            assert world.sample("chunk_deadlines_total", met=met) == 0
        assert world.sample("stalls_total") == 0


def test_the_time_of_capture_comes_back() -> None:
    with World() as world:
        sent = frames(0, FIRST)
        wire = world.connect(OPEN, *sent)
        assert [frame.time_us for frame in wire.frames] == [parse_frame(s).time_us for s in sent]


def test_what_is_counted_is_counted_for_the_model_that_did_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A session that goes on by a newer version counts for that from there on."""
    caplog.set_level("INFO")
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        world.editors.model = "known 2"
        world.editors.leave()
        say(world, wire, [*frames(FIRST, CHUNK + 3), {"type": "close"}])
        edited = {
            model: world.sample("frames_edited_total", model=model)
            for model in ("known", "known 2")
        }
        assert edited == {"known": FIRST, "known 2": CHUNK + 3}
        assert world.sample("sessions_admitted_total", model="known") == 1
        assert world.sample("sessions_ended_total", model="known 2", reason="close") == 1
    told = [(r.event, r.model) for r in caplog.records if hasattr(r, "model")]
    assert told == [("opened", "known"), ("rolled", "known 2"), ("ended", "known, known 2")]
