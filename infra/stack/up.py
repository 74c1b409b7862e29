"""The local stack without containers, in the foreground: python -m infra.stack.up

MLflow with a database, an S3 store, Prometheus and Grafana, as far as they are installed. What is
missing is named with how to get it, and the others start. Ctrl-C stops everything.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from infra.stack.servers import SERVERS, Missing, Server, Settings

START_S = 120.0  # that a part has until it answers
STOP_S = 10.0  # that a part has to end by itself
POLL_S = 0.2


class StackError(RuntimeError):
    """A part that did not start or ended by itself; the message says where its log is."""


class StackProcess:
    """A part's processes: one process group of their own, so that Ctrl-C reaches only us."""

    def __init__(self, part: Server, settings: Settings) -> None:
        self.part = part
        self.log = settings.data / "logs" / f"{part.name}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                part.command,
                env=part.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Returns when the part answers. Raises StackError."""
        deadline = time.monotonic() + START_S
        while not _answers(self.part.ready):
            self.check()
            if time.monotonic() > deadline:
                raise StackError(
                    f"{self.part.name} does not answer at {self.part.ready} after {START_S:g} s; "
                    f"its log is {self.log}"
                )
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises StackError if the part has ended."""
        code = self.process.poll()
        if code is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise StackError(
                f"{self.part.name} ended with {code}: {lines[-1] if lines else 'no output'}; "
                f"its log is {self.log}"
            )

    def stop(self) -> None:
        """Ends every process of the part."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while self._signal(0) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> bool:
        """Whether there was anybody to get it."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


def run(settings: Settings) -> None:
    """Start every part that is installed, say where it is, and wait for Ctrl-C or SIGTERM.

    Raises StackError, and OSError for a folder that cannot be written.
    """
    settings.prepare()
    running: list[StackProcess] = []
    try:
        for describe in SERVERS:
            part = describe(settings)
            if isinstance(part, Missing):
                print(f"{part.name:<11}not installed: {part.remedy}", flush=True)
                continue
            _check_port(part)
            running.append(StackProcess(part, settings))
        for started in running:
            started.wait_ready()
            print(f"{started.part.name:<11}{started.part.address}", flush=True)
        print(f"\nFor Ray, training and serving: . {settings.environment_file}")
        print(settings.environment_file.read_text(), flush=True)
        print("Ctrl-C stops everything.", flush=True)
        while True:
            time.sleep(POLL_S)
            for started in running:
                started.check()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes
        for started in running:
            started.stop()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500  # an S3 store refuses whoever does not sign
    except OSError:
        return False


def _check_port(part: Server) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", part.port))
        except OSError as error:
            raise StackError(
                f"port {part.port} is taken ({error.strerror}); choose another with "
                f"--{part.name} PORT"
            ) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.stack.up",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="runs/stack", help="what is kept between runs")
    parser.add_argument("--application", default="localhost:8000", help="HOST:PORT to watch")
    for name, port in (("mlflow", 5000), ("s3", 9000), ("prometheus", 9090), ("grafana", 3000)):
        parser.add_argument(f"--{name}", type=int, default=port, metavar="PORT")
    given = vars(parser.parse_args())
    settings = Settings(**given | {"data": Path(given["data"]).absolute()})

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # a shell's background jobs ignore it
    try:
        run(settings)
    except KeyboardInterrupt:
        print("\nStopped; everything is kept in", settings.data)
    except (StackError, OSError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
