"""What a save copies of a training's state before the training goes on."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Saver
from tests.pipelines.training.plain import setting


@dataclass
class Fragment:
    """As DeepSpeed's state has one for every parameter."""

    numel: int
    start: int


def saver(tmp_path: Path) -> Saver:
    here: Setting = setting("foundation")
    return Saver(here, RunFolder(tmp_path), cast(Any, None), lambda write, step: None)


def test_all_kinds_of_state_are_copied_with_a_stager_that_copies_no_class(tmp_path: Path) -> None:
    """As torch 2.11's, which ended the first save of a training: its table lacks `type`, and an
    object's copy asks for its class."""
    made = saver(tmp_path)
    del made._stager._state_dict_stager._deepcopy_dispatch[type]
    flat = torch.arange(6.0)
    state: dict[str, Any] = {
        "flat": [flat[:4], flat[4:]],
        "mappings": [OrderedDict(weight=Fragment(numel=4, start=2))],
        "kind": nn.Linear,
        "moment": torch.zeros(1).expand(1000),
        "numbers": (1, "two", None, {"three": torch.tensor(3)}),
    }
    copy = made.copy(state)
    flat.fill_(-1)
    state["mappings"][0]["weight"].start = 7
    assert [part.tolist() for part in copy["flat"]] == [[0, 1, 2, 3], [4, 5]]
    assert copy["mappings"][0]["weight"] == Fragment(numel=4, start=2)
    assert copy["kind"] is nn.Linear
    assert copy["moment"].shape == (1000,)
    assert copy["moment"].untyped_storage().nbytes() == 4
    assert copy["numbers"][3]["three"].item() == 3
    tensors: list[Tensor] = [*copy["flat"], copy["moment"]]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
