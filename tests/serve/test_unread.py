"""Who reads nothing of what is written to it, told by a transport's buffer alone."""

from __future__ import annotations

import asyncio

import pytest

from serve.ingress.unread import Unread

pytestmark = pytest.mark.anyio


class Buffer:
    """A transport's, as full as a test says."""

    size, aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.size

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(
    ("looks", "aborted"),
    [
        ([(9, True), (9, True)], True),
        ([(9, True), (8, True), (8, True)], True),
        ([(9, True), (8, True), (7, True), (6, True)], False),  # slowly, but it reads
        ([(0, True), (0, True), (0, True)], False),  # a connection that is kept
        ([(9, False), (9, False), (9, True)], False),  # an answer that runs
        ([(9, True), (9, False), (9, True)], False),  # and the next one
        ([(9, True), (9, False), (9, True), (9, True)], True),
    ],
)
async def test_only_who_reads_nothing_while_nobody_can_write_is_let_go(
    looks: list[tuple[int, bool]], aborted: bool
) -> None:
    buffer, still = Buffer(), [False]
    looking = Unread(asyncio.get_running_loop(), buffer, lambda: still[0])  # type: ignore[arg-type]
    for buffer.size, still[0] in looks:
        assert not buffer.aborted
        looking._look()
        looking.stop()
    assert buffer.aborted == aborted


async def test_who_reads_as_much_as_is_written_is_not_let_go() -> None:
    buffer = Buffer()
    buffer.size = 9
    looking = Unread(asyncio.get_running_loop(), buffer, lambda: True)  # type: ignore[arg-type]
    for reads in (True, True, True, False):
        assert not buffer.aborted
        looking._look()
        looking.stop()
        if reads:
            looking.was_read()
    looking._look()
    assert buffer.aborted
