"""A Ray cluster whose nodes are the hosts of a `Network`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.runtime.paths import ROOT
from tests.hosts.network import Network, environment

BIN = Path(sys.executable).parent
PORT = 6379  # of the head, on an address of its own
STORE = 80 * 2**20  # bytes of a node's object store, which is shared memory
START_S = 240.0  # for a process to say that it is ready; a busy machine takes its time


@dataclass
class Process:
    """One on a host, whose output is read all the time."""

    popen: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.said.append(line)

    def wait_for(self, words: str, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(words in line for line in self.said):
            alive = self.popen.poll() is None and time.monotonic() < deadline
            assert alive, f"{words!r} was never said:\n{''.join(self.said)}"
            time.sleep(0.1)


class Cluster:
    """The first host is the head."""

    def __init__(self, net: Network, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.address = f"{net.address(net.names[0])}:{PORT}"

    def node(self, name: str, *resources: str, **variables: str) -> Process:
        """Starts Ray on a host, with `resources` as `ray start` takes them."""
        place: Sequence[Any] = [f"--address={self.address}"]
        if name == self.net.names[0]:
            place = [
                "--head", f"--port={PORT}", f"--temp-dir={self.folder}", "--include-dashboard=false"
            ]  # fmt: skip
        process = self.start(
            name, BIN / "ray", "start", "--block", *place, *resources,
            f"--node-ip-address={self.net.address(name)}", f"--object-store-memory={STORE}",
            **variables,
        )  # fmt: skip
        process.wait_for("Ray runtime started")
        return process

    def start(self, name: str, *command: Any, **variables: str) -> Process:
        """A process on a host that finds this Ray."""
        variables = {"RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT), **variables}
        return Process(
            self.net.start(
                name,
                command,
                cwd=ROOT,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )


@contextmanager
def cluster(net: Network) -> Iterator[Cluster]:
    """Without a node; Ray's files go with it."""
    folder = Path(tempfile.mkdtemp(prefix="rayhosts-", dir="/tmp"))  # its sockets need short names
    try:
        yield Cluster(net, folder)
    finally:
        for name in net.names:
            net.kill(name)
        shutil.rmtree(folder, ignore_errors=True)
