"""Whole videos over HTTP: what ends one, whenever it does, and what is left of it then: nothing.

The front is the real one, its editors are arithmetic, and the clock runs.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from data.video import VideoError, probe, read_timed
from serve.front import edits
from serve.front.account import Account
from serve.front.door import Door
from serve.front.front import Front
from serve.hub.ledger import Key, Ledger
from serve.hub.records import SessionStore
from serve.limits import Limits
from serve.metrics import Metrics
from serve.tenants import Tenants
from serve.versions.catalog import Menu
from serve.versions.rolling import Offer, Version
from serve.wire.protocol import WireError
from serve.work_sizes import WorkSizes
from tests.serve.conftest import clip
from tests.serve.front.arithmetic import SIDE, Editors
from tests.serve.front.test_http import video
from tests.serve.tokens import write_tokens

pytestmark = pytest.mark.anyio

MENU = Menu((Offer("known", "known 1"),), {"known 1": Version("known 1", (48, 64))})
VIDEO = video(clip(40, width=SIDE, height=SIDE))
FAST = video(clip(48, width=SIDE, height=SIDE), fps=48)
FOREVER = 1e6


@dataclass
class Office:
    """A front with its editors, and what it counts."""

    front: Front
    editors: Editors
    ledger: Ledger
    tokens: Path

    def post(self, token: str = "one", **fields: str) -> asyncio.Task[httpx.Response]:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.front.app)
            client = httpx.AsyncClient(transport=transport, base_url="http://front")
            async with client, asyncio.timeout(60):  # which httpx does not keep here
                return await client.post(
                    f"/v1/edits?token={token}", files={"video": ("v.mp4", VIDEO)},
                    data={"prompt": "prompt 1", **fields},
                )  # fmt: skip

        return asyncio.create_task(send())

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)

    async def nothing_is_left(self) -> None:
        edits = self.front.edits
        await self.until(lambda: not edits.running and not self.editors.open)
        for _ in range(10):  # what is shielded of a request that was cancelled
            await asyncio.sleep(0)
        assert (edits.open, edits._uploads, self.front.open_connections) == (set(), 0, 0)
        assert (self.ledger._sessions, self.front.services.usage._held) == ({}, {})
        assert self.sample("sessions") == 0

    def sample(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for metric in self.front.services.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == f"liveedit_{name}" and labels.items() <= sample.labels.items()
        )


class Afar(Ledger):
    """In another process, as a hub's is: what asks it waits."""

    async def leave(self, key: Key) -> None:
        await asyncio.sleep(0)
        await super().leave(key)


@pytest.fixture
async def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Office]:
    monkeypatch.setattr("serve.front.front.HOLDER_BEAT_S", 0.01)
    tokens = write_tokens(tmp_path / "tokens", {"a": "one", "b": "two"}, max_sessions=1)

    async def nobody() -> list[Any]:
        return []

    async def nothing() -> dict[str, Any]:
        return {}

    editors, ledger = Editors(), Afar()
    front = Front(
        backend=editors, store=SessionStore(), sizes=WorkSizes(Limits(max_fps=20.0)),
        metrics=Metrics(), door=Door(Tenants(str(tokens))), ledger=ledger, grace_s=FOREVER,
        models=nobody, menu=lambda: MENU, notes=nobody, snapshots=nothing,
    )  # fmt: skip
    yield Office(front, editors, ledger, tokens)
    if front._beating:
        front._beating.cancel()


def drained(office: Office) -> None:
    office.front.grace_s = 0.05
    office.front.leave()


def withdrawn(office: Office) -> None:
    write_tokens(office.tokens, {"b": "two"})


def spent(office: Office) -> None:
    write_tokens(office.tokens, {"a": "one"}, minutes_per_day=1e-6)


ENDS = [
    (drained, "draining", "going away"),
    (withdrawn, "unauthorized", "no longer accepted"),
    (spent, "at_capacity", "your limit is reached: the video's time is spent"),
]


async def test_a_video_that_was_edited_leaves_nothing(office: Office) -> None:
    answer = await office.post()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    await office.nothing_is_left()
    assert office.sample("frames_edited_total", tenant="a") == 40
    assert office.sample("sessions_ended_total", reason="close") == 1
    assert office.sample("gpu_seconds_total") == pytest.approx(4 * 0.05)  # of four chunks
    answer = await office.post()  # its tenant may have one at a time, and has it again
    assert answer.status_code == 200


@pytest.mark.parametrize(("end", "code", "message"), ENDS[:2])
async def test_one_that_waits_for_an_editor_can_be_ended(
    office: Office, end: Callable[[Office], None], code: str, message: str
) -> None:
    office.editors.places = [1] * 10_000
    asked = office.post()
    await office.until(lambda: office.editors.openings)
    end(office)
    answer = await asked
    assert answer.json()["error"]["code"] == code
    assert message in answer.json()["error"]["message"]
    assert office.sample("sessions_refused_total", code=code, tenant="a") == 1
    await office.nothing_is_left()


@pytest.mark.parametrize(("end", "code", "message"), ENDS)
async def test_one_that_is_being_edited_is_cut(
    office: Office,
    end: Callable[[Office], None],
    code: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So that its client sees that it is not whole; one line says why."""
    office.editors.chunk_s = FOREVER
    asked = office.post()
    await office.until(lambda: office.editors.open)
    end(office)
    (ended,) = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(ended, AssertionError)  # httpx: the answer did not end,
    assert ended.__context__ is None  # and none began in its middle, of an error
    (line,) = (r.getMessage() for r in caplog.records if r.name == "serve.front.door")
    assert line.startswith(f"an answer is cut: {code}: ")
    assert message in line
    await office.nothing_is_left()
    assert office.sample("sessions_ended_total", reason=code, tenant="a") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VideoError("no video"), "bad_request"),
        (WireError("too_slow", "as told"), "too_slow"),
        (ZeroDivisionError("a fault of ours"), "internal"),
    ],
)
async def test_what_ends_one_in_its_middle_is_counted_as_what_it_is(
    office: Office, error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> Iterator[Any]:
        yield from itertools.islice(read_timed(*given, **named), 20)
        raise error

    monkeypatch.setattr(edits, "read_timed", broken)
    (ended,) = await asyncio.gather(office.post(), return_exceptions=True)
    assert isinstance(ended, Exception)  # the answer was cut
    await office.nothing_is_left()
    assert office.sample("sessions_ended_total") == 1
    assert office.sample("sessions_ended_total", reason=code, tenant="a") == 1


@pytest.mark.parametrize(("most", "code"), [(40, "close"), (39, "bad_request")])
async def test_one_that_said_less_of_its_length_is_cut_at_the_limit(
    office: Office, most: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 40 frames may all come, of 39 the last not."""
    monkeypatch.setattr("serve.front.upload.probe", lambda p: replace(probe(p), frames=5))
    services, sizes = office.front.edits.services, WorkSizes(Limits(max_video_frames=most))
    office.front.edits.services = replace(services, sizes=sizes)
    (answer,) = await asyncio.gather(office.post(), return_exceptions=True)
    assert isinstance(answer, httpx.Response) is (code == "close")
    await office.nothing_is_left()
    assert office.sample("sessions_ended_total", reason=code, tenant="a") == 1


async def test_a_front_that_leaves_has_its_videos_time_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to leave every second, which begins nothing anew."""
    now = 100.0
    monkeypatch.setattr("serve.front.front.time", SimpleNamespace(monotonic=lambda: now))
    office.front.grace_s, office.editors.chunk_s = 60.0, FOREVER
    asked = office.post()
    await office.until(lambda: office.editors.open)
    for later in (0.0, 40.0, 59.0):
        now = 100.0 + later
        office.front.leave()
    assert not asked.done()
    now = 160.5
    office.front.leave()
    await office.until(asked.done)
    assert asked.exception() is not None
    await office.nothing_is_left()
    assert office.sample("sessions_ended_total", reason="draining", tenant="a") == 1


@pytest.mark.parametrize("last", ["http.response.start", "http.response.body"])
async def test_a_videos_file_is_there_until_its_session_is_over(
    office: Office, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Also of a client that takes nothing and is cut off, be it before the first piece: what reads
    the file has to end first."""
    fields = {"files": {"video": ("v.mp4", VIDEO)}, "data": {"prompt": "prompt 1"}}
    request = httpx.Request("POST", "http://front/v1/edits", **fields)  # type: ignore[arg-type]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/edits", "query_string": b"token=one",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
    }  # fmt: skip
    said = [{"type": "http.request", "body": request.read()}]
    stuck, there, ended = asyncio.Event(), list[list[bool]](), Account.ended

    async def receive() -> Any:
        return said.pop() if said else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == last:
            stuck.set()
            await asyncio.Event().wait()

    async def noted(account: Account, outcome: str) -> None:
        there.append([edit.path.exists() for edit in office.front.edits.open])
        await ended(account, outcome)

    monkeypatch.setattr(Account, "ended", noted)
    asked = asyncio.create_task(office.front.app(scope, receive, send))
    async with asyncio.timeout(60):
        await stuck.wait()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await office.nothing_is_left()
    assert there == [[True]]


async def test_it_counts_as_a_session_of_its_tenant(office: Office) -> None:
    office.editors.chunk_s = FOREVER
    first = office.post()
    await office.until(lambda: office.editors.open)
    answer = await office.post()
    assert answer.status_code == 503
    assert "1 sessions are open and 1 may be" in answer.json()["error"]["message"]
    assert len(office.editors.openings) == 1  # no editor was asked
    other = office.post(token="two")
    await office.until(lambda: office.sample("sessions") == 2)
    for task in (first, other):
        task.cancel()
    await asyncio.gather(first, other, return_exceptions=True)
    await office.nothing_is_left()
    assert office.sample("sessions_ended_total", reason="disconnected") == 2


async def test_a_video_faster_than_the_limit_has_that_rate(
    office: Office, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """20 frames a second: every frame of the answer lies on that grid, not on the file's."""
    monkeypatch.setattr(sys.modules[__name__], "VIDEO", FAST)
    answer = await office.post()
    assert answer.status_code == 200
    assert office.editors.openings[0].fps == 20.0
    (tmp_path / "out.mp4").write_bytes(answer.content)
    times = [time for time, _ in read_timed(tmp_path / "out.mp4")]
    assert times == [Fraction(n, 20) for n in range(20)]


async def test_what_an_editor_refuses_leaves_nothing(office: Office) -> None:
    office.editors.full = True
    answer = await office.post()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    await office.nothing_is_left()
    assert office.sample("sessions_ended_total") == 0  # it never was one
    office.editors.full = False
    assert (await office.post()).status_code == 200


async def test_what_is_asked_for_arrives(office: Office) -> None:
    answer = await office.post(
        prompt="prompt 7", seed="11", work_size="32x32", detail="off", model="known"
    )
    (opening,) = office.editors.openings
    assert (opening.prompt, opening.seed, opening.tenant) == ("prompt 7", 11, "a")
    assert (opening.work_size, opening.detail, opening.mode) == ("32x32", "off", "lossless")
    assert (opening.model, opening.version, opening.fps) == ("known", "known 1", 16.0)
    assert answer.headers["x-liveedit-work-size"] == "32x32"
    for name, wrong in (("model", "other"), ("work_size", "half"), ("detail", "on")):
        refused = await office.post(**{name: wrong})
        assert refused.status_code == 400, name
    await office.nothing_is_left()
