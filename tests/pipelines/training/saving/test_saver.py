"""What a save copies of a training's state before the training goes on."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pipelines.training import checkpoint
from pipelines.training import saver as saver_module
from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Saver, Write
from tests.pipelines.training.plain import setting


@dataclass
class Fragment:
    """As DeepSpeed's state has one for every parameter."""

    numel: int
    start: int


def saver(tmp_path: Path) -> Saver:
    here: Setting = setting("foundation")
    return Saver(here, RunFolder(tmp_path), cast(Any, None), lambda write, step: None)


def test_all_kinds_of_state_are_copied(tmp_path: Path) -> None:
    made = saver(tmp_path)
    flat = torch.arange(6.0)
    parameter = nn.Parameter(torch.ones(2))
    parameter.ds_lock = Lock()  # type: ignore[attr-defined]  # which nobody can copy
    state: dict[str, Any] = {
        "flat": [flat[:4], flat[4:]],
        "mappings": [OrderedDict(weight=Fragment(numel=4, start=2))],
        "kind": nn.Linear,
        "moment": torch.zeros(1).expand(1000),
        "parameter": parameter,
        "numbers": (1, "two", None, {"three": torch.tensor(3)}),
    }
    copy = made.copy(state)
    flat.fill_(-1)
    state["mappings"][0]["weight"].start = 7
    assert [part.tolist() for part in copy["flat"]] == [[0, 1, 2, 3], [4, 5]]
    assert copy["mappings"][0]["weight"] == Fragment(numel=4, start=2)
    assert copy["kind"] is nn.Linear
    assert copy["parameter"].tolist() == [1, 1]
    assert copy["moment"].shape == (1000,)
    assert copy["moment"].untyped_storage().nbytes() == 4
    assert copy["numbers"][3]["three"].item() == 3
    tensors: list[Tensor] = [*copy["flat"], copy["moment"]]
    assert all(tensor.device.type == "cpu" for tensor in tensors)


def test_the_next_copy_takes_the_buffers_of_the_one_before(tmp_path: Path) -> None:
    """Pinning as much memory as a state has takes longer than to copy it."""
    made = saver(tmp_path)
    state = {"weight": nn.Parameter(torch.ones(3)), "views": list(torch.zeros(8).split(4))}
    places = []
    for value in (1.0, 2.0):
        with torch.no_grad():
            state["weight"].fill_(value)  # type: ignore[union-attr]
        copy = made.copy(state)
        assert copy["weight"].tolist() == [value] * 3
        places.append([copy["weight"].data_ptr(), *(view.data_ptr() for view in copy["views"])])
    assert places[0] == places[1]


@pytest.mark.parametrize("error", [OSError("full"), SystemExit(1)])  # of a process that is ended
def test_whatever_ends_a_write_the_steps_hear_of_once(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(target: Path) -> None:
        raise error

    def keep(write: Write, step: int) -> None:
        def behind() -> None:
            with pytest.raises(type(error)):
                write(tmp_path)

        thread = Thread(target=behind)
        thread.start()
        thread.join()

    made = Saver(setting("foundation"), RunFolder(tmp_path), cast(Any, None), keep)
    monkeypatch.setattr(checkpoint, "take", lambda *_: SimpleNamespace(write=fails))
    made.save(3, {}, 0.0, {})
    with pytest.raises(type(error)):
        made.check()
    made.check()  # it was said


@pytest.mark.parametrize(("rank", "told"), [(0, 1), (1, 0)])
def test_the_first_worker_alone_says_that_a_step_waited(
    rank: int, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, folder = [0.0], RunFolder(tmp_path)
    folder.open()
    made = Saver(setting("foundation", rank), folder, cast(Any, None), lambda write, step: None)
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "take", lambda *_: None)
    for seconds in (1.0, 2.6):  # one is not worth telling

        def wait(seconds: float = seconds) -> None:
            now[0] += seconds

        monkeypatch.setattr(made, "wait", wait)
        made.save(4, {}, 0.0, {})
    said, _ = folder.said(0)
    assert len(said) == told
    assert all(line.startswith("step 4 waited 3 s until") for line in said)
