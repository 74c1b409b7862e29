"""What is in the pictures, by every door of a real server, with an editor whose answer is known."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest

from data.video import probe, read_frames
from serve.client import EditedFrame, connect, edit_frames, served_model
from serve.limits import Limits
from serve.wire.protocol import Detail, Dropped, Format, PromptApplied, WireError
from serve.wire.work import Opening
from tests.data.conftest import write_raw
from tests.known_editors import (
    BLOCK,
    TURNED,
    UNCHANGED,
    assert_edited,
    block_clip,
    expected_edit,
    known_editor,
    write_known_model,
)
from tests.serve.client.test_stream import edited_without_server, send_all
from tests.serve.conftest import Server, clip, serving

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

RED, BLUE = "paint it red", "paint it blue"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    model = write_known_model(folder / "known")
    turned = write_known_model(folder / "turned", name="turned", paints=TURNED)
    both = (str(model), str(turned))
    with serving(model, models=both, work_size="full", detail="off") as running:
        yield running


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


# --- POST /v1/edits


def post(server: Server, path: Path, **fields: str) -> httpx.Response:
    return httpx.post(
        f"{server.http}/v1/edits",
        files={"video": (path.name, path.read_bytes())},
        data=fields,
        timeout=60,
    )


def blocks(frames: np.ndarray) -> np.ndarray:
    """The means of the insides of the editor's blocks, where a codec costs little."""
    n, height, width, _ = frames.shape
    cells = frames.reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).astype(float)
    return cells[:, :, 2:-2, :, 2:-2].mean(axis=(2, 4))


def lossless(path: Path, frames: np.ndarray, fps: Fraction | int = 16) -> Path:
    return write_raw(path, frames, fps=fps, codec="ffv1", pixel_format="bgr0")


@pytest.mark.parametrize("prompt", [UNCHANGED, RED, "paint it green and blue"])
def test_a_video_comes_back_with_the_right_pictures(
    known: Server, tmp_path: Path, prompt: str
) -> None:
    source = block_clip(45, 64, 96, seed=5)
    response = post(known, lossless(tmp_path / "in.mkv", source), prompt=prompt)
    assert response.status_code == 200
    edited = np.stack(list(read_frames(io.BytesIO(response.content))))
    wanted = expected_edit(source, prompt)
    assert edited.shape == wanted.shape
    assert np.abs(blocks(edited) - blocks(wanted)).mean() < 2
    assert np.abs(blocks(edited) - blocks(wanted)).max() < 25


def test_a_videos_sound_comes_back_packet_by_packet(known: Server, tmp_path: Path) -> None:
    source = write_raw(tmp_path / "in.mp4", block_clip(32, 64, 96), audio="aac")
    response = post(known, source, prompt=RED)
    path = tmp_path / "out.mp4"
    path.write_bytes(response.content)
    before, after = packets(source), packets(path)
    assert len(before) > 20
    assert [data for _, data in after] == [data for _, data in before]
    # In its place, but for the encoder's 1024 samples of lead, which a stream cannot cut off.
    shifts = {there - here for (here, _), (there, _) in zip(before, after, strict=True)}
    assert len(shifts) == 1
    assert shifts <= {0, 1024}


def packets(path: Path) -> list[tuple[int, bytes]]:
    with av.open(str(path)) as container:
        (stream,) = container.streams.audio
        return [(p.pts, bytes(p)) for p in container.demux(stream) if p.pts is not None]


def test_a_videos_rate_is_kept_up_to_the_limit(known: Server, tmp_path: Path) -> None:
    frames = block_clip(24, 64, 96)
    for fps, rate, count in ((Fraction(24000, 1001), Fraction(24000, 1001), 24), (80, 60, 18)):
        sent = lossless(tmp_path / "in.mkv", frames, fps)
        path = tmp_path / "out.mp4"
        path.write_bytes(post(known, sent, prompt=RED).content)
        assert float(probe(path).fps) == pytest.approx(float(rate), rel=1e-3)
        assert len(list(read_frames(path))) == count


@pytest.mark.parametrize(("fields", "seed"), [({"seed": "3"}, 3), ({"seed": "0"}, 0), ({}, 0)])
def test_the_seed_is_the_one_that_was_asked_for(
    server: Server, small_model: Path, tmp_path: Path, fields: dict[str, str], seed: int
) -> None:
    source = clip(21)
    # The source's detail is the same with every seed, and most of what this model shows.
    fields = {**fields, "prompt": "x", "detail": "off"}
    response = post(server, lossless(tmp_path / "in.mkv", source), **fields)
    edited = np.stack(list(read_frames(io.BytesIO(response.content))))
    distance = {
        tried: np.abs(
            edited.astype(int) - edited_without_server(small_model, source, "x", tried, "off")
        ).mean()
        for tried in (0, 1, 3)
    }
    assert min(distance, key=lambda tried: distance[tried]) == seed, distance
    assert sorted(distance.values())[0] < 0.9 * sorted(distance.values())[1]


def test_the_wires_seed_is_0_unless_it_is_said(server: Server, small_model: Path) -> None:
    source = clip(12)
    edited = np.stack(list(edit_frames(server.url, source, "x", fps=16, format="rgb24")))
    np.testing.assert_array_equal(edited, edited_without_server(small_model, source, "x", 0))


def test_the_metrics_of_an_upload(tmp_path: Path) -> None:
    with serving(write_known_model(tmp_path / "known")) as server:
        path = lossless(tmp_path / "in.mkv", block_clip(25, 64, 96))
        post(server, path, prompt=RED)
        post(server, path, prompt=" ")
        value = server.front.services.metrics.registry.get_sample_value
        who = {"tenant": "everybody", "model": "known"}
        assert value("liveedit_sessions_admitted_total", who) == 1
        assert value("liveedit_frames_edited_total", who) == 25
        assert value("liveedit_recomputed_share_count") == 3
        assert value("liveedit_chunk_latency_seconds_count") == 3
        assert value("liveedit_first_chunk_seconds_count") == 1
        assert (value("liveedit_gpu_seconds_total", who) or 0) > 0
        refused = {"code": "bad_request", "tenant": "everybody"}
        assert value("liveedit_sessions_refused_total", refused) == 1
        assert value("liveedit_sessions_ended_total", {"reason": "close", **who}) == 1
        assert value("liveedit_sessions") == 0


@pytest.mark.parametrize(
    ("limits", "fields", "status", "code", "named"),
    [
        ({}, {}, 400, "bad_request", "prompt is missing"),
        ({}, {"prompt": " "}, 400, "bad_request", "the prompt is empty"),
        ({}, {"prompt": "x" * 2001}, 400, "bad_request", "2001 characters"),
        ({}, {"prompt": "x", "sed": "1"}, 400, "bad_request", "no field 'sed'"),
        *[
            ({}, {"prompt": "x", "seed": seed}, 400, "bad_request", "seed")
            for seed in ("-1", "1.5", "one", "", "²", " 1", str(2**63))
        ],
        ({}, {"prompt": "x", "work_size": "2/1"}, 400, "bad_request", "work size '2/1' is none"),
        ({}, {"prompt": "x", "detail": "on"}, 400, "bad_request", "must be one of source, off"),
        (
            {"max_work_pixels": 64 * 96 - 1},
            {"prompt": "x", "work_size": "96x64"},
            422,
            "unsupported_size",
            "work size 96x64",
        ),
        ({"max_pixels": 64 * 96 - 1}, {"prompt": "x"}, 422, "unsupported_size", "96x64"),
        ({"max_side": 95}, {"prompt": "x"}, 422, "unsupported_size", "96x64"),
        ({"min_side": 65}, {"prompt": "x"}, 422, "unsupported_size", "96x64"),
        ({"max_upload": 2000}, {"prompt": "x"}, 400, "bad_request", "larger than 2000 bytes"),
    ],
)
def test_a_mistake_in_an_upload_is_refused_with_its_name(
    known: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
    fields: dict[str, str],
    status: int,
    code: str,
    named: str,
) -> None:
    for name, value in limits.items():
        monkeypatch.setitem(known.front.services.limits.__dict__, name, value)
    response = post(known, lossless(tmp_path / "in.mkv", block_clip(9, 64, 96)), **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert named in error["message"]
    engine: Any = known.engine
    assert engine.capacity.loads == {}


def test_an_upload_of_another_kind_is_refused(known: Server) -> None:
    url = f"{known.http}/v1/edits"
    for request, named in (
        ({"data": {"video": "text", "prompt": "x"}}, "video must be a file"),
        ({"files": {"video": b"no video"}, "data": {"prompt": "x"}}, "not a readable video"),
        ({"files": {"video": b"", "more": b""}, "data": {"prompt": "x"}}, "files"),
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, "video"),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            "",
        ),
    ):
        response = httpx.post(url, timeout=20, **request)  # type: ignore[arg-type]
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "bad_request"
        assert named in response.json()["error"]["message"]


def test_an_upload_that_finds_no_room_is_told_to_come_back(tmp_path: Path) -> None:
    with serving(write_known_model(tmp_path / "known"), Limits(), max_sessions=1) as full:
        engine: Any = full.engine
        path = lossless(tmp_path / "in.mkv", block_clip(9, 64, 96))
        full.call(lambda: engine.capacity.admit(Opening("other", "p", 96, 64, 16.0, "live")))
        response = post(full, path, prompt="x")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "at_capacity"
