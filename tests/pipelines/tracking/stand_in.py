"""A stand-in for the MLflow behind an outbox, which does what it is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

LONG = 30.0  # seconds; what a test may wait for before it fails


class Server:
    """Takes entries as `Sender` does; `down` it fails, closed `gate` it is silent."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.taken: list[dict[str, Any]] = []
        self.refuses: set[str] = set()
        self.down = False
        self.runs: dict[str, str] = {}
        self.uri = uri
        self.experiment_id = "1"
        self.asked, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def send(self, entry: dict[str, Any], files: Path) -> str | None:
        self.asked.set()
        assert self.gate.wait(LONG)
        if self.down:
            raise ConnectionError("nobody listens")
        if entry["what"] in self.refuses:
            raise FileNotFoundError(entry["what"])
        self.taken.append(entry)
        self.runs[entry["run"]] = f"run of {entry['run']}"
        return f"{len(self.taken)} at {self.uri}" if entry["what"] == "register" else None

    @property
    def order(self) -> list[str]:
        return [entry["what"] for entry in self.taken]
