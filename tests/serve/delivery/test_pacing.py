"""Edited entries on their way out, under a clock of the test's own."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.delivery.pacing import PacedOutbox
from serve.hub.records import Entry
from tests.serve.front.clock import Clock


class Run:
    """An outbox, and what left it when."""

    def __init__(self, clock: Clock, mode: str, fps: float) -> None:
        self.clock = clock
        self.left: list[tuple[float, bytes | str]] = []
        self.sent = 0
        self.take_s = 0.0  # that the client takes for each
        self.outbox = PacedOutbox(mode=mode, fps=fps)  # type: ignore[arg-type]
        self.task = clock.task(self.outbox.run(self._send, self._sent))

    async def _send(self, data: str | bytes) -> None:
        if self.take_s:
            await asyncio.sleep(self.take_s)
        self.left.append((self.clock.now, data))

    def _sent(self) -> None:
        self.sent += 1


def entries(first: int, count: int) -> list[Entry]:
    return [
        *(Entry(n, bytes([n % 256])) for n in range(first, first + count)),
        Entry(count, "chunk"),
    ]


@given(
    st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 12), st.booleans()), max_size=8),
    st.sampled_from(["live", "lossless"]),
)
@settings(max_examples=100, deadline=None)
def test_all_leaves_in_order_and_live_frames_at_a_human_pace(
    chunks: list[tuple[float, int, bool]], mode: str
) -> None:
    with Clock() as clock:
        run = Run(clock, mode, fps=10.0)
        put: list[bytes | str] = []
        when: list[float] = []
        for pause, count, whole in chunks:
            clock.advance(pause)
            more = entries(len(put), count)
            run.outbox.put(more, clock.now - 0.5 if whole else None)
            put += [entry.data for entry in more]
            when += [clock.now] * len(more)
        run.outbox.end()
        clock.advance(60.0)
        assert run.task.done()
        assert [data for _, data in run.left] == put
        assert run.sent == sum(isinstance(data, bytes) for data in put)
        assert run.outbox.stuck_s == 0
        assert not run.outbox._batches  # of hours nothing is left
        times = [at for at, data in run.left if isinstance(data, bytes)]
        steps = [b - a for a, b in pairwise(times)]
        if mode == "live":
            assert all(step >= 0.05 - 1e-4 for step in steps)
        else:
            assert [at for at, _ in run.left] == pytest.approx(when, abs=1e-3)


def test_what_the_client_takes_and_when_it_is_stuck() -> None:
    with Clock() as clock:
        run = Run(clock, "lossless", fps=10.0)
        clock.advance(100.0)
        assert run.outbox.stuck_s == 0  # nothing was there
        run.take_s = 4.0
        run.outbox.put(entries(0, 3))
        clock.advance(3.0)
        assert run.outbox.stuck_s == pytest.approx(3.0, abs=0.01)
        run.outbox.put(entries(3, 3))  # more of it is no progress
        clock.advance(0.9)
        assert run.outbox.stuck_s == pytest.approx(3.9, abs=0.01)
        clock.advance(0.2)
        assert run.outbox.stuck_s == pytest.approx(0.1, abs=0.01)
        assert (len(run.left), run.sent) == (1, 1)
        clock.advance(40.0)
        run.outbox.put([Entry(6, "dropped"), Entry(6, "quality")])
        clock.advance(4.1)
        assert run.outbox.stuck_s == pytest.approx(0.1, abs=0.01)  # a message is one, too
        clock.advance(40.0)
        run.outbox.end()  # while nothing is left to send
        clock.settle()
        assert (run.sent, run.task.done()) == (6, True)


def test_a_message_does_not_wait_for_the_pace_of_frames() -> None:
    with Clock() as clock:
        run = Run(clock, "live", fps=10.0)
        run.outbox.put(entries(0, 1), clock.now)
        clock.advance(0.001)
        assert [data for _, data in run.left] == [b"\x00", "chunk"]
        run.outbox.put([Entry(1, "dropped")])
        clock.advance(0.001)
        assert run.left[-1][1] == "dropped"
        run.outbox.put(entries(1, 1), clock.now)
        clock.advance(0.01)
        assert run.left[-1][1] == "dropped"  # half an interval has not gone by
        clock.advance(0.1)
        assert run.left[-1][1] == "chunk"


def test_a_delay_that_stays_is_no_lateness() -> None:
    """A chunk that came later after its source than the last three is played faster, and no more
    when all of them are as late."""
    with Clock() as clock:
        run = Run(clock, "live", fps=10.0)
        spans = []
        for n, delay in enumerate((0.1, 1.0, 1.0, 1.0, 1.0, 0.9)):
            run.outbox.put(entries(10 * n, 10), clock.now - delay)
            before = len(run.left)
            clock.advance(2.0)
            times = [at for at, data in run.left[before:] if isinstance(data, bytes)]
            spans.append(times[-1] - times[0])
        assert spans == pytest.approx([0.9, 0.45, 0.45, 0.45, 0.9, 0.9], abs=0.05)


def test_the_rest_of_a_batch_whose_successor_is_there_is_played_faster() -> None:
    """And the successor's frames then leave evenly, so that the last is out when it has to be."""
    with Clock() as clock:
        run = Run(clock, "live", fps=10.0)
        began = clock.now
        run.outbox.put(entries(0, 10), clock.now)
        clock.advance(0.35)
        run.outbox.put(entries(10, 10), clock.now)
        clock.advance(2.0)
        times = [at - began for at, data in run.left if isinstance(data, bytes)]
        steps = [0.1] * 3 + [0.05] * 7 + [0.07] * 9
        assert [b - a for a, b in pairwise(times)] == pytest.approx(steps, abs=0.001)
