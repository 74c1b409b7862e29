"""What is in the pictures of streams, on a real server whose editors' answers are known."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from data.video import read_frames
from serve.client import EditedFrame, connect, edit_frames, served_model
from serve.wire.protocol import Detail, Dropped, Format, PromptApplied, WireError
from tests.known_editors import (
    UNCHANGED,
    assert_edited,
    block_clip,
    expected_edit,
    known_editor,
)
from tests.serve.client.test_stream import send_all
from tests.serve.conftest import Server
from tests.serve.pictures.asked import BLUE, RED, blocks, lossless, post

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 34)])
@pytest.mark.parametrize(
    ("format", "within"), [("rgb24", 0), ("png", 0), ("jpeg", 10), ("webp", 60)]
)
def test_every_format_brings_the_right_picture(
    known: Server, format: Format, within: int, height: int, width: int
) -> None:
    source = block_clip(31, height, width)
    if format == "webp":  # its chroma is halved: grey, that little is lost
        source = source.mean(-1, keepdims=True).astype(np.uint8).repeat(3, -1)
    edited = np.stack(list(edit_frames(known.url, source, RED, fps=16, format=format)))
    assert_edited(edited, source, RED, within)


@pytest.mark.parametrize(
    ("model", "made_by", "colour"),
    [(None, "known", RED), ("known", "known", RED), ("turned", "turned", BLUE)],
)
def test_the_model_that_is_chosen_edits(
    known: Server, tmp_path: Path, model: str | None, made_by: str, colour: str
) -> None:
    """By name, on a stream and over HTTP; and what it did counts as its own."""
    source, told = block_clip(21, 64, 96, seed=8), list[Any]()
    edited = edit_frames(
        known.url, source, RED, fps=16, format="png", model=model, on_event=told.append
    )
    assert_edited(np.stack(list(edited)), source, colour)
    assert told[0].model == made_by
    done = known.front.services.metrics.frames.labels("everybody", made_by)
    counted = done._value.get()
    fields = {"prompt": RED, **({"model": model} if model else {})}
    answer = post(known, lossless(tmp_path / "in.mkv", source), **fields)
    assert answer.status_code == 200
    (tmp_path / "out.mp4").write_bytes(answer.content)
    seen = blocks(np.stack(list(read_frames(tmp_path / "out.mp4"))))
    assert np.abs(seen - blocks(expected_edit(source, colour))).max() <= 10
    assert done._value.get() == counted + 21


def test_a_model_that_is_not_served_is_refused_with_those_that_are(
    known: Server, tmp_path: Path
) -> None:
    said = "no model 'other' is served; choose known, turned"
    with pytest.raises(WireError, match=said) as raised:
        next(edit_frames(known.url, block_clip(9, 64, 96), RED, fps=16, model="other"))
    assert raised.value.code == "bad_request"
    with pytest.raises(WireError, match="no model 'other' is served; choose known, turned"):
        served_model(known.http, "other")
    video = lossless(tmp_path / "in.mkv", block_clip(9, 64, 96))
    answer = post(known, video, prompt=RED, model="other")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, said)
    told = httpx.get(f"{known.http}/v1/models").json()["models"]
    assert [(each["model"], each["name"]) for each in told] == [("known",) * 2, ("turned",) * 2]


@pytest.mark.parametrize("detail", ["source", "off"])
def test_a_stream_is_edited_at_the_size_it_asks_for(known: Server, detail: Detail) -> None:
    """And comes back in its own, as it is edited here."""
    source = block_clip(21, 64, 96, seed=6)
    source[:, :, ::2] //= 2  # stripes that half the size does not show
    told: list[Any] = []
    there = edit_frames(
        known.url, source, RED, fps=16, format="rgb24", seed=3, work_size="1/2", detail=detail,
        on_event=told.append,
    )  # fmt: skip
    here = known_editor().open(RED, height=64, width=96, seed=3, work_size="48x32", detail=detail)
    wanted = np.concatenate([chunk.frames for chunk in here.push(source)])
    found = np.stack(list(there))
    # A level that the VAE rounds the other way, when frames come in other pieces, is a few here.
    off = np.abs(found.astype(int) - wanted)
    assert off.max() <= 10
    assert (off > 0).mean() < 0.01
    assert (told[0].work_size, told[0].detail) == ("48x32", detail)
    stripes = np.abs(np.diff(found.astype(int), axis=2)).mean()
    assert stripes > 30 if detail == "source" else stripes < 10


@pytest.mark.parametrize(
    ("frames", "height", "width", "choice", "work"),
    [
        (1, 64, 96, "1/2", "48x32"),  # one frame, and a close
        (10, 90, 50, "native", "64x112"),  # portrait, of as many pixels as the model's 96x64
        (9, 16, 16, "native", "80x80"),  # smaller than the model works at
        (9, 40, 30, "64x80", "64x80"),  # and than it is asked to
        (9, 37, 301, "3/4", "224x32"),
    ],
)
def test_any_size_and_length_is_edited_at_any_size(
    known: Server, frames: int, height: int, width: int, choice: str, work: str
) -> None:
    source = block_clip(frames, height, width, seed=7)
    told: list[Any] = []
    edited = np.stack(
        list(
            edit_frames(
                known.url, source, UNCHANGED, fps=16, format="rgb24", work_size=choice,
                detail="source", on_event=told.append,
            )
        )
    )  # fmt: skip
    assert told[0].work_size == work
    assert edited.shape == source.shape
    # Nothing is changed, and the detail is the source's: whatever the size, it comes back, but
    # where the VAE rounds the edit another way than the source.
    assert np.abs(edited.astype(int) - source).mean() < 0.1


async def stream(
    server: Server, source: np.ndarray, cuts: dict[int, str]
) -> tuple[np.ndarray, int]:
    """The edited pictures, and with which of them the prompt turned from red to blue.

    `cuts` say what to do when so many edited frames have come: "cut" ends the connection, "leave"
    sends the client back, "move" lets the editor give the stream back.
    """
    edited, applied = [], 0
    async with connect(
        server.url, RED, width=source.shape[2], height=source.shape[1], fps=16, format="rgb24"
    ) as opened:

        async def send() -> None:
            for n, frame in enumerate(source):
                if n == 21:
                    opened.set_prompt(BLUE)
                await opened.send(frame)
                await asyncio.sleep(0.005)
            opened.finish()

        sending = asyncio.create_task(send())
        async for event in opened.events():
            if isinstance(event, PromptApplied):
                applied = event.first_frame
            if not isinstance(event, EditedFrame):
                continue
            edited.append(event.pixels)
            how = cuts.get(len(edited))
            if how == "cut":
                server.call(lambda: [c.supersede() for c in server.front.connections])
            elif how == "leave":
                server.call(lambda: [c.leave() for c in server.front.connections])
            elif how == "move":
                engine: Any = server.engine
                server.call(engine.leave)
                await asyncio.sleep(0.1)
                server.call(engine._leaving.clear)  # as another editor
        await sending
    return np.stack(edited), applied


@pytest.mark.parametrize(
    "cuts", [{}, {5: "cut", 40: "leave"}, {9: "move", 33: "cut"}, {44: "cut", 50: "move"}]
)
async def test_a_stream_shows_what_was_asked_whatever_happens(
    known: Server, cuts: dict[int, str]
) -> None:
    source = block_clip(61, 64, 96, seed=1)
    edited, border = await stream(known, source, cuts)
    # Frames that are sent again after a lost connection come after the newest prompt.
    assert border == 21 or (border == 9 and "cut" in cuts.values())
    red, blue = expected_edit(source, RED), expected_edit(source, BLUE)
    wanted = np.concatenate([red[:border], blue[border:]])
    assert edited.shape == wanted.shape
    assert np.abs(edited.astype(int) - wanted).max() <= 1


async def test_sessions_do_not_mix(known: Server) -> None:
    async def one(seed: int, prompt: str) -> None:
        source = block_clip(33, 64, 96, seed=seed)
        async with connect(
            known.url, prompt, width=96, height=64, fps=16, format="rgb24"
        ) as opened:
            sending = asyncio.create_task(send_all(opened, source))
            edited = np.stack([frame.pixels async for frame in opened])
            await sending
        assert_edited(edited, source, prompt)

    await asyncio.gather(one(1, RED), one(2, BLUE), one(3, UNCHANGED))


async def test_live_frames_keep_their_number_when_others_are_dropped(known: Server) -> None:
    source = block_clip(200, 64, 96, seed=4)
    shown, dropped = {}, set[int]()
    async with connect(
        known.url, UNCHANGED, width=96, height=64, fps=60, mode="live", format="rgb24"
    ) as opened:
        sending = asyncio.create_task(send_all(opened, source))
        async for event in opened.events():
            if isinstance(event, EditedFrame):
                shown[event.index] = event.pixels
            elif isinstance(event, Dropped):
                dropped |= set(range(event.first_frame, event.first_frame + event.frames))
        await sending
    assert dropped
    assert sorted(shown.keys() | dropped) == list(range(200))
    assert not shown.keys() & dropped
    wanted = expected_edit(source, UNCHANGED)
    for index, picture in shown.items():
        assert np.abs(picture.astype(int) - wanted[index]).max() <= 1, index
