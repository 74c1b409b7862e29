"""Serving on three hosts: the fronts' on the first, an editor on each of the others.

Not of `make test`: `make hosts`. Where a test says how long something took, it is printed (-s).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.runtime.paths import ROOT
from serve.client import stream as client_stream
from tests.hosts.cluster import BIN, Cluster, Process, cluster
from tests.hosts.network import missing, network
from tests.hosts.streams import Session, Streams, editors_ready, metrics

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.hosts,
    pytest.mark.timeout(900),
]

GOES_ON_S = 10.0  # what is promised of a live session
HTTP_PORT = 8000
DELAY_S, LOSS = 0.025, 0.02  # of a bad line, each way
WORKER = ("--num-cpus=1", "--num-gpus=1")  # a GPU is what an editor asks for, whatever it runs on
SETTINGS = (
    "measured_capacity=false", "max_sessions=4", "min_editors=2", "max_editors=2",
    "editor_gpus=1", "device=cpu", "editor_cpus=0.5", "front_cpus=0.5",
)  # fmt: skip


class Served:
    def __init__(self, ray: Cluster, serve: Process, logs: Path) -> None:
        self.ray, self.net, self.serve, self.logs = ray, ray.net, serve, logs
        self.address = f"{ray.net.address('a')}:{HTTP_PORT}"
        self.url, self.http = f"ws://{self.address}", f"http://{self.address}"

    def streams(self, *modes: str, frames: int) -> Streams:
        return Streams(self.url, *modes, frames=frames)  # type: ignore[arg-type]

    def hub(self, *elsewhere: str) -> str:
        """Name of the host that it is on, which is none of `elsewhere`."""
        unwanted = [self.net.address(name) for name in elsewhere]
        told = self.ray.start("a", BIN / "python", "-m", "tests.hosts.hub_host", *unwanted)
        told.wait_for("the hub is on")
        (address,) = re.findall(r"the hub is on (\S+)", "".join(told.said))
        return next(name for name in self.net.names if self.net.address(name) == address)


def shipped_variables() -> dict[str, str]:
    """Of the head as KubeRay starts it."""
    manifest = yaml.safe_load((ROOT / "infra/kuberay/rayservice.yaml").read_text())
    head = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    return {entry["name"]: entry["value"] for entry in head["containers"][0]["env"]}


@pytest.fixture(scope="module")
def served(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if why := missing():
        pytest.skip(why)
    logs = tmp_path_factory.mktemp("logs")
    with network("a", "b", "c") as net, cluster(net) as ray:
        ray.node("a", "--num-cpus=2", **shipped_variables())
        serve = ray.start(
            "a", BIN / "liveedit", "serve", small_model, *SETTINGS, f"log_dir={logs}",
            "--host", "0.0.0.0", "--port", HTTP_PORT,
        )  # fmt: skip
        made = Served(ray, serve, logs)
        assert made.hub() == "a"  # there is no other host yet
        for name in "bc":
            ray.node(name, *WORKER)
        serve.wait_for("Ctrl-C")
        yield made


@pytest.fixture(autouse=True)
async def whole(served: Served) -> None:
    """Both editors are there, on hosts that reach each other."""
    for name in "bc":
        served.net.heal(name)
        if not served.net.processes(name):
            served.ray.node(name, *WORKER)
    await editors_ready(served.http, 2)


def check(sessions: list[Session], since: float, what: str, reconnects: int = 0) -> None:
    """Nothing is lost or repeated by any, and all go on in time."""
    for session in sessions:
        if session.mode == "lossless":
            assert session.indices == list(range(session.frames))
        else:
            assert all(a < b for a, b in itertools.pairwise(session.indices))
            assert session.indices[-1] == session.sent - 1
        assert session.reconnects == reconnects
        print(
            f"{what}: {session.mode}, {len(session.got)} of {session.frames} frames, none twice, "
            f"longest pause {session.pause(since):.1f} s"
        )
        if session.mode == "live":
            assert session.pause(since) < GOES_ON_S


async def held(served: Served) -> list[float]:
    """Sessions of each editor, the emptiest first."""
    values = await metrics(served.http)
    return sorted(count for (name, _), count in values.items() if name == "editor_sessions")


async def test_a_host_vanishes_with_its_link(served: Served) -> None:
    streams = served.streams("lossless", "live", "lossless", "live", frames=240)
    await streams.begun()
    assert min(await held(served)) >= 1
    lost = (await metrics(served.http)).get(("processes_lost_total", "hub"), 0)
    since = time.monotonic()
    await asyncio.to_thread(served.net.vanish, "b")
    await editors_ready(served.http, 1)
    print(f"vanished: metrics know of it after {time.monotonic() - since:.1f} s")
    check(await streams.end(), since, "vanished")
    now = await metrics(served.http)
    assert now["editors_wanted", "hub"] == 2
    assert now["processes_lost_total", "hub"] == lost + 1


async def test_a_partition_heals(served: Served) -> None:
    """The editor that was cut off comes back empty: its sessions are elsewhere, held once."""
    streams = served.streams("lossless", "live", "lossless", "live", frames=240)
    await streams.begun()
    processes = served.net.processes("b")
    since = time.monotonic()
    served.net.cut("b")
    await editors_ready(served.http, 1)
    served.net.heal("b")
    took = await editors_ready(served.http, 2)
    print(f"partition: the editor is back {took:.1f} s after it healed")
    async with asyncio.timeout(30):  # what it said while it was cut off may come first
        while await held(served) != [0.0, 4.0]:
            await asyncio.sleep(0.2)
    check(await streams.end(), since, "partition")
    assert set(processes) <= set(served.net.processes("b"))  # nothing there was started again
    log = "".join(path.read_text() for path in served.logs.glob("*front*.log"))
    for name in set(re.findall(r"session (\w{12}): opened", log)):
        assert len(re.findall(rf"session {name}: \w+ after .* frames edited", log)) == 1


async def test_a_line_of_50_ms_that_loses_2_percent(served: Served) -> None:
    """Sessions stay where they are and live: a slow answer is no lost machine."""
    before = await metrics(served.http)
    since = time.monotonic()
    with served.net.worsened("b", DELAY_S, LOSS) as counts:
        streams = served.streams("lossless", "live", "lossless", "live", frames=160)
        await streams.begun()
        assert min(await held(served)) >= 1  # over the bad line, too
        check(await streams.end(), since, "bad line")
        now = await metrics(served.http)
    passed, lost = counts
    print(f"bad line: {passed} frames of Ethernet passed, {lost} lost")
    assert passed > 1000
    assert 0.01 < lost / (passed + lost) < 0.03
    for name in ("processes_lost_total", "editors_ready", "sessions_moved_total"):
        was, is_now = (sum(v for (n, _), v in of.items() if n == name) for of in (before, now))
        assert is_now == was, name


async def test_the_hubs_host_vanishes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an editor and its sessions. A new hub has them from their front: who loses the
    connection after that comes back to it."""
    sockets: list[Any] = []

    def connect_socket(*arguments: Any, **named: Any) -> Any:
        sockets.append(connect_really(*arguments, **named))
        return sockets[-1]

    connect_really = client_stream.connect_socket
    monkeypatch.setattr(client_stream, "connect_socket", connect_socket)
    host = await asyncio.to_thread(served.hub, "a")
    await editors_ready(served.http, 2)
    streams = served.streams("lossless", "live", "lossless", "live", frames=400)
    await streams.begun()
    since = time.monotonic()
    await asyncio.to_thread(served.net.vanish, host)
    await editors_ready(served.http, 1)
    print(f"hub: another one knows of the editor after {time.monotonic() - since:.1f} s")
    for socket in sockets:
        socket.connection.transport.abort()
    check(await streams.end(), since, "hub", reconnects=1)
