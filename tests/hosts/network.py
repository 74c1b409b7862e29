"""Several hosts on this machine: network namespaces on one switch, as root.

What runs in a namespace has an address of its own and reaches the others over a bridge, so a host
can be cut off, or vanish with its link, without anybody being told. Memory, disk and clock are this
machine's. Nothing is left: a process beside this one clears up when this one ends, however it does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from infra.runtime.paths import ROOT

GONE_S = 10.0  # for killed processes to be gone


def missing() -> str | None:
    """Why there can be no such network here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = f"le{os.getpid()}p"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "delete", probe)
        _ip("link", "add", probe, "type", "bridge")
        _ip("link", "delete", probe)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"network namespaces cannot be made here: {said.strip()}"
    return None


class Network:
    """Hosts by name; this process has `gateway` on their switch and is no host."""

    def __init__(self, number: int, names: Sequence[str]) -> None:
        self.bridge = f"le{number}"
        self.subnet = f"198.18.{number % 256}"  # for tests between devices (RFC 2544)
        self.gateway = f"{self.subnet}.1"
        self.names = list(names)

    def address(self, name: str) -> str:
        return f"{self.subnet}.{self.names.index(name) + 2}"

    def start(self, name: str, command: Sequence[Any], **options: Any) -> subprocess.Popen[str]:
        """A process on that host."""
        inside = ["ip", "netns", "exec", self._namespace(name), *map(str, command)]
        return subprocess.Popen(inside, text=True, **options)

    def cut(self, name: str) -> None:
        """The switch passes nothing on to it or from it; its own end stays up."""
        _run("bridge", "link", "set", "dev", self._port(name), "state", "0")

    def heal(self, name: str) -> None:
        _run("bridge", "link", "set", "dev", self._port(name), "state", "3")

    @contextmanager
    def worsened(self, name: str, delay_s: float, loss: float) -> Iterator[list[int]]:
        """Its line takes so long, each way, and loses this share of the frames (`relay`).

        At the end the list holds how many frames were passed on and how many lost.
        """
        side, ends = f"{self._port(name)}s", [f"{self._port(name)}{end}" for end in "io"]
        command = [sys.executable, "-m", "tests.hosts.relay", *ends, str(delay_s), str(loss)]
        line = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        counts: list[int] = []
        try:
            assert line.stdout is not None
            assert line.stdout.readline() == "laid\n"
            _ip("link", "add", side, "type", "bridge")
            _ip("link", "set", side, "up")
            for end, bridge in zip(ends, (side, self.bridge), strict=True):
                _ip("link", "set", end, "master", bridge, "up")
            _ip("link", "set", self._port(name), "master", side)
            yield counts
        finally:
            told, _ = line.communicate()  # its devices go with it
            counts += map(int, told.split())
            _ip("link", "set", self._port(name), "master", self.bridge)
            _ip("link", "delete", side)

    def vanish(self, name: str) -> None:
        """Its link goes and then all that runs there, so that nobody hears of either."""
        self.cut(name)
        self.kill(name)

    def kill(self, name: str) -> None:
        deadline = time.monotonic() + GONE_S
        while pids := self.processes(name):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pids} on {name} cannot be killed")
            time.sleep(0.05)

    def processes(self, name: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._namespace(name)).split()]

    def _namespace(self, name: str) -> str:
        return f"{self.bridge}-{name}"

    def _port(self, name: str) -> str:
        return f"{self.bridge}{name}"

    def lay(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.gateway}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for name in self.names:
            space, port = self._namespace(name), self._port(name)
            _ip("netns", "add", space)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", port, "master", self.bridge, "up")
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            # Ray asks the kernel by which address it would reach the world.
            _ip("-n", space, "route", "add", "default", "via", self.gateway)

    def take_away(self) -> None:
        """With all that runs there, and whatever of it was laid."""
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was not made
                self.kill(name)
                _ip("netns", "delete", self._namespace(name))
            # Sockets that still say goodbye hold the namespace, and with it its link, for minutes.
            for link in (f"{self._port(name)}s", self._port(name)):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip("link", "delete", link)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self.bridge)


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Hosts of one letter each."""
    number = os.getpid()
    command = [sys.executable, "-m", "tests.hosts.network", str(number), *names]
    clearing = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    try:
        laid = Network(number, names)
        laid.lay()
        yield laid
    finally:
        clearing.communicate()


def environment(**values: str) -> Mapping[str, str]:
    """This process's, without what points at a Ray elsewhere.

    A token in the home of who runs the tests, or none there, would make nodes ask for one, or fail
    for want of it.
    """
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**ours, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **values}


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":  # see `network`: its end of the pipe closes with it
    sys.stdin.read()
    Network(int(sys.argv[1]), sys.argv[2:]).take_away()
