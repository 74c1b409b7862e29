"""What fails while a checkpoint is written: the disk's errors have a remedy, others are bugs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.training.checkpoint import CheckpointError, _writing_failed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "a file ended early"),
        (RuntimeError("[enforce fail at inline_container.cc:858]"), "a file ended early"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_told_with_its_room(
    error: Exception, reason: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoint_1"
    if there:
        target.mkdir()

    def room(place: Path) -> SimpleNamespace:
        assert place == (target if there else tmp_path)  # the one that exists
        return SimpleNamespace(free=3 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", room)
    told = _writing_failed(error, target, "causal", 7)
    assert isinstance(told, CheckpointError)
    assert str(told).startswith(
        f"stage causal could not write its checkpoint at step 7 to {tmp_path} ({reason}); "
        "3.0 GiB are free there. Make room"
    )


def test_any_other_error_is_raised_as_it_is(tmp_path: Path) -> None:
    error = RuntimeError("shapes differ")
    assert _writing_failed(error, tmp_path, "causal", 7) is error
