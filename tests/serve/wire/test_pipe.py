"""Bytes through a real connection, however they are cut on either side."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from serve.wire.pipe import AHEAD, SLICE, Pipe

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Pipe, Pipe]]:
    loop = asyncio.get_running_loop()
    came: asyncio.Future[Pipe] = loop.create_future()
    server = await loop.create_server(lambda: Pipe(came.set_result), "127.0.0.1", 0)
    _, here = await loop.create_connection(Pipe, *server.sockets[0].getsockname())
    there = await came
    try:
        async with asyncio.timeout(30):
            yield here, there
    finally:
        here.close()
        there.close()
        server.close()


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


SIZES = [0, 1, 4, AHEAD - 1, AHEAD, AHEAD + 1, SLICE - 1, SLICE, 3 * SLICE + 7, 5, 0, 2**22, 1]


@pytest.mark.parametrize("reads", [SIZES, sorted(SIZES), SIZES[::-1], [sum(SIZES)]])
async def test_what_is_written_is_read_however_it_is_cut(reads: list[int]) -> None:
    said = [noise(size) for size in SIZES]
    async with joined() as (here, there):
        writing = asyncio.create_task(here.write(said))
        heard = [await there.read(size) for size in reads]
        await writing
    assert b"".join(heard) == b"".join(said)


async def test_who_has_nothing_more_to_say_to_one_that_is_gone_is_done() -> None:
    """Also where the loop has not heard of it yet."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, here = await loop.create_connection(Pipe, *server.getsockname())
        there, _ = server.accept()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()  # at once, and without a FIN
        here.finish()
    here.close()


async def test_what_comes_is_put_where_it_is_wanted_and_nowhere_else() -> None:
    place = np.zeros(3 * AHEAD, np.uint8)
    async with joined() as (here, there):
        await here.write([noise(100), noise(AHEAD), b"after"])
        assert await there.read(100) == noise(100)
        await there.read_into(place.data[AHEAD : 2 * AHEAD])
        assert await there.read(5) == b"after"
    assert place[AHEAD : 2 * AHEAD].tobytes() == noise(AHEAD)
    assert not place[:AHEAD].any()
    assert not place[2 * AHEAD :].any()


async def test_two_writers_do_not_mix() -> None:
    size = 32 * SLICE  # more than the kernel takes
    async with joined() as (here, there):
        writing = [asyncio.create_task(here.write([bytes([n]) * size])) for n in range(3)]
        for _ in range(3):
            assert len(set(await there.read(size))) == 1
        await asyncio.gather(*writing)


async def test_a_writer_waits_for_who_does_not_read() -> None:
    """But for what the kernel takes, which is a few megabytes."""
    whole = 2**26
    async with joined() as (here, there):
        writing = asyncio.create_task(here.write([bytes(whole)]))
        await there.read(1)
        for _ in range(200):
            await asyncio.sleep(0)
        assert not writing.done()
        assert len(there._ahead) == AHEAD
        await there.read(whole - 1)
        await writing


async def test_what_was_said_before_the_end_is_read_after_it() -> None:
    for large in (False, True):
        said = noise(AHEAD * 3 if large else 1000)
        async with joined() as (here, there):
            await here.write([said])
            here.finish()
            assert await there.read(len(said)) == said
            while not there._ended:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            await there.write([b"yes"])  # which the other still takes
            assert await here.read(3) == b"yes"
            with pytest.raises(ConnectionError, match="closed the connection"):
                await there.read(1)


async def test_who_waits_hears_that_the_other_end_is_gone() -> None:
    async with joined() as (here, there):
        reading = [asyncio.create_task(there.read(size)) for size in (3 * AHEAD,)]
        writing = asyncio.create_task(there.write([bytes(2**26)]))
        await here.write([b"a piece"])
        here.transport.abort()
        for waiting in (*reading, writing):
            with pytest.raises(ConnectionError):
                await waiting
        with pytest.raises(ConnectionError):
            await there.write([b"more"])
        there.finish()  # nobody is there to hear it


async def test_who_closed_it_can_say_nothing_more() -> None:
    """The transport would throw it away without a word."""
    async with joined() as (here, there):
        here.close()
        with pytest.raises(ConnectionError, match="the connection is closed"):
            await here.write([b"more"])
        with pytest.raises(ConnectionError, match="the other end closed the connection"):
            await there.read(1)


@pytest.mark.parametrize("size", [2, AHEAD, AHEAD + 1, 5 * AHEAD])
async def test_what_ends_in_the_middle_was_not_said(size: int) -> None:
    async with joined() as (here, there):
        await here.write([noise(size - 1)])
        here.finish()
        with pytest.raises(ConnectionError, match="closed the connection"):
            await there.read(size)


async def test_what_was_begun_is_sent_whole_though_its_sender_is_cancelled() -> None:
    """What is said next would be taken for its rest."""
    size = 64 * SLICE  # more than the kernel takes
    async with joined() as (here, there):
        writing = asyncio.create_task(here.write([noise(size)]))
        await asyncio.sleep(0)
        while here._writable.is_set():
            await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        after = asyncio.create_task(here.write([b"after"]))
        assert await there.read(size) == noise(size)
        assert await there.read(5) == b"after"
        await after
