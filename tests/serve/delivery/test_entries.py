"""What of a delivery goes to the client, and by which prompt and when it was made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.wire.codec import parse_frame
from tests.serve.delivery.sessions import answer, edited, feed, make, messages

# A fault here is mostly work that never comes.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_each_frame_has_its_own_index_time_and_image() -> None:
    session = make()
    feed(session, 21)
    answer(session, await session.take())
    images = [b"image %d" % n for n in range(12)]
    entries = session.entries(session.deliver(edited(await session.take())), images)
    frames = [parse_frame(entry.data) for entry in entries if isinstance(entry.data, bytes)]
    assert [(frame.index, frame.time_us, bytes(frame.image)) for frame in frames] == [
        (9 + n, 1009 + n, image) for n, image in enumerate(images)
    ]


async def test_an_end_without_frames_says_nothing() -> None:
    """Neither of a prompt nor of a quality that no frame has."""
    session = make()
    feed(session, 9)
    answer(session, await session.take())
    session.sent(9)
    session.set_prompt("blue")
    session.finish()
    last = replace(edited(await session.take()), rung="mask", work_size="x")
    assert session.entries(session.deliver(last), []) == []
    assert (session.applied_prompt, session.quality) == ("red", "full")


async def test_a_prompt_whose_words_are_all_known_names_none() -> None:
    session = make()
    session.set_prompt("blue")
    feed(session, 9)
    said = answer(session, await session.take())
    assert messages(said)[1] == {"type": "prompt_applied", "prompt": "blue", "first_frame": 0}


async def test_a_close_edits_what_went_ahead_by_the_prompt_that_it_came_with() -> None:
    session = make()
    feed(session, 4)
    assert (await session.take()).more
    session.set_prompt("blue")
    session.finish()
    last = await session.take()
    assert (len(last.frames), last.last, last.prompt) == (0, True, "red")


async def test_a_chunk_was_given_out_when_the_last_of_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    session, told = make(), []
    for count in (4, 5, 12):
        feed(session, count)
        now += 1.0
        await session.take()
    started = [chunk.works[-1] for chunk in session._started]
    for work in started:
        now += 10.0
        delivery = session.deliver(edited(work))
        told.append((delivery.given, delivery.answered))
    assert told == [(102.0, 113.0), (103.0, 123.0)]
