"""A client of the wire protocol: async (`connect`) and sync (`edit_frames`).

    async with connect("ws://host:8000", "make the cat blue", width=832, height=480, fps=16) as s:
        await s.send(frame)             # uint8 [height, width, 3]; from a task of its own
        async for edited in s:          # until `finish` was called and everything has come
            show(edited.pixels)

A lost connection is opened again with the resume token; nothing is lost or repeated.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anyio
import numpy as np
from anyio.from_thread import start_blocking_portal
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from serve.client.stream import ConnectError, EditedFrame, Event, Stream, stream_url
from serve.wire.protocol import PATH, Detail, Format, InQueue, Mode, Open, ServerMessage, WireError

ANSWER_S = 20.0  # for a plain HTTP request


@asynccontextmanager
async def connect(
    url: str,
    prompt: str,
    *,
    width: int,
    height: int,
    fps: float,
    mode: Mode = "lossless",
    format: Format = "jpeg",
    seed: int | None = None,
    work_size: str | None = None,
    detail: Detail | None = None,
    model: str | None = None,
    token: str | None = None,
    mask: bool = False,
    on_queue: Callable[[InQueue], None] | None = None,
) -> AsyncIterator[Stream]:
    """Open a stream at `url` (ws://, wss://, http:// or https://, with or without the path).

    Raises WireError for what the server refuses (`at_capacity` has `retry_after_s`) and
    ConnectError when there is no server; one that cuts the connection before it answers (its front
    died or is starting) is asked again for `client_stream.FIRST_S`. With `on_queue` an open that
    finds no room waits for it, and `on_queue` is told its place.

    The model edits at `work_size` ("native", "full", "1/2", "416x240"; see docs/wire.md), None is
    the server's choice, and what comes back has the size that was sent: with `detail` "source" and
    its detail, with "off" enlarged. `model` is one of those that the server has, by name, None its
    first. `Stream.opened` says what it became.
    """
    message = Open(
        prompt, width, height, fps, mode, format, seed=seed, mask=True if mask else None,
        queue=True if on_queue else None, work_size=work_size, detail=detail,
        model=model,
    )  # fmt: skip
    stream = Stream(url, message, token=token, on_queue=on_queue)
    opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(stream.run(opened))
    try:
        await opened
        yield stream
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def served_model(url: str, model: str | None = None, *, token: str | None = None) -> dict[str, Any]:
    """What the server at `url` says of a model, by default its first: name, width, height, fps, ...

    Raises WireError for what the server refuses, also for a `model` that it does not have, and
    ConnectError when there is no server.
    """
    models = served_models(url, token=token)
    found = [each for each in models if model in (None, each.get("model"))]
    if not found:
        known = ", ".join(dict.fromkeys(str(each.get("model")) for each in models))
        raise WireError("bad_request", f"no model {model!r} is served; choose {known}")
    return found[0]


def served_models(url: str, *, token: str | None = None) -> list[dict[str, Any]]:
    """What the server at `url` says of its models, version by version, at least one. Raises as
    `served_model` does."""
    parts = urlsplit(stream_url(url))
    scheme = {"ws": "http", "wss": "https"}[parts.scheme]
    path = parts.path.removesuffix(PATH) + "/v1/models"
    address = urlunsplit((scheme, parts.netloc, path, "", ""))
    request = urllib.request.Request(address)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            models: list[dict[str, Any]] = json.load(answer)["models"]
            models[0]["name"]  # or this is no LiveEdit server
            return models
    except urllib.error.HTTPError as error:
        try:
            told = json.load(error)["error"]
            refusal = WireError(told["code"], told["message"])
        except (ValueError, LookupError, TypeError):
            raise ConnectError(f"{address} answers {error}; is it a LiveEdit server?") from error
        raise refusal from error
    except urllib.error.URLError as error:
        raise ConnectError(
            f"{url} cannot be reached ({error.reason}); start a server with `liveedit serve`, or "
            "correct the address"
        ) from error
    except (OSError, ValueError, LookupError) as error:
        raise ConnectError(
            f"{address} gives no answer: {error}; is it a LiveEdit server?"
        ) from error


def edit_frames(
    url: str,
    frames: Iterable[np.ndarray],
    prompt: str,
    *,
    fps: float,
    format: Format = "jpeg",
    seed: int | None = None,
    work_size: str | None = None,
    detail: Detail | None = None,
    model: str | None = None,
    token: str | None = None,
    on_event: Callable[[ServerMessage], None] | None = None,
) -> Iterator[np.ndarray]:
    """Lossless, without asyncio: uint8 [height, width, 3] in, the same number of edited ones out.

    `frames` are taken in another thread; `on_event` is called, between the frames that come out,
    with the server's messages, the first of which is `opened`.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None:
        return
    height, width = first.shape[:2]

    async def feed(stream: Stream) -> None:
        frame: np.ndarray | None = first
        while frame is not None:
            await stream.send(frame)
            frame = await anyio.to_thread.run_sync(next, source, None, abandon_on_cancel=True)
        stream.finish()

    async def run(out: MemoryObjectSendStream[Event]) -> None:
        async with (
            out,
            connect(
                url, prompt, width=width, height=height, fps=fps, format=format, seed=seed,
                work_size=work_size, detail=detail, model=model, token=token,
            ) as stream,
            asyncio.TaskGroup() as tasks,
        ):  # fmt: skip
            tasks.create_task(feed(stream))
            if stream.opened is not None:
                await out.send(stream.opened)
            async for event in stream.events():
                await out.send(event)

    send, receive = anyio.create_memory_object_stream[Event]()
    with start_blocking_portal(name="liveedit-client") as portal:
        running = portal.start_task_soon(run, send)
        try:
            while (event := portal.call(_next, receive)) is not None:
                if isinstance(event, EditedFrame):
                    yield event.pixels
                elif on_event is not None:
                    on_event(event)
            running.result()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


async def _next(events: MemoryObjectReceiveStream[Event]) -> Event | None:
    """None after the last."""
    return await anext(events, None)
