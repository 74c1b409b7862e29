"""What a rank's part of a checkpoint is on the disk, and how it gets there beside the steps."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training import checkpoint
from pipelines.training.checkpoint import Snapshot, _Hashed

STATE: dict[str, Any] = {
    "weights": torch.arange(30_000.0),
    "moments": [torch.ones(3), torch.zeros(100_000)],
}


def test_files_are_whole_and_hashed_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To hash them afterwards reads them again, in pieces for each of which the steps' thread is
    asked for the interpreter's lock."""
    monkeypatch.setattr(checkpoint, "_PIECE", 1 << 16)
    monkeypatch.setattr(checkpoint, "_SMALL", 1 << 12)
    read: list[str] = []
    again = checkpoint._checksum

    def reads(path: Path) -> str:
        read.append(path.name)
        return again(path)

    monkeypatch.setattr(checkpoint, "_checksum", reads)
    place, target = tmp_path / "part", tmp_path / "checkpoint_1"
    (place / "transformer").mkdir(parents=True)
    (place / "transformer" / "zero_to_fp32.py").write_text("DeepSpeed's")
    states: dict[Path, Any] = {place / "transformer" / "state.pt": STATE, place / "own.pt": 7}
    Snapshot(place, states, {"rank": 0, "step": 5}, "causal").write(target)

    files = json.loads((target / "manifest-0.json").read_text())["files"]
    assert sorted(files) == ["own.pt", "transformer/state.pt", "transformer/zero_to_fp32.py"]
    for name, told in files.items():
        assert told == hashlib.sha256((target / name).read_bytes()).hexdigest()
    assert read == ["zero_to_fp32.py"]
    loaded = torch.load(target / "transformer" / "state.pt")
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert torch.equal(loaded["moments"][1], torch.zeros(100_000))
    assert torch.load(target / "own.pt") == 7
    assert not place.exists()


class Noted(ThreadPoolExecutor):
    """Notes what it was given, and for how many bytes."""

    def __init__(self) -> None:
        super().__init__(1)
        self.given: list[tuple[int, Future[Any]]] = []

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(work, *arguments, **named)
        self.given.append((len(arguments[0]), future))
        return future


def test_another_thread_gets_few_and_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint._PIECE == 64 << 20
    monkeypatch.setattr(checkpoint, "_PIECE", 4 << 20)
    data, file = bytes(range(256)) * (9 << 12), BytesIO()  # 9 MiB
    with Noted() as beside:
        hashed = _Hashed(file, beside)
        assert hashed.write(b"head") == 4
        assert hashed.write(data) == len(data)
    assert [size >> 20 for size, _ in beside.given] == [4, 4, 1]
    assert file.getbuffer() == b"head" + data
    assert hashed.checksum() == hashlib.sha256(b"head" + data).hexdigest()


def test_nothing_is_read_any_more_when_writing_fails() -> None:
    """What is written is memory that its owner may then let go of."""

    class Full(BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(28, "No space left on device")

    with Noted() as beside:
        hashed = _Hashed(Full(), beside)
        with pytest.raises(OSError, match="No space left"):
            hashed.write(bytes(32 << 20))
        assert [hashing.done() for _, hashing in beside.given] == [True]
