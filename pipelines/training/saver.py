"""Saves a training's state behind its steps.

A step waits while the state is copied into this machine's memory, and no longer: the copy is
written, with its checksums, by a thread. The next save waits for it; if it fails, the next step
does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from pipelines.training import checkpoint
from pipelines.training.methods.base import Setting, Stage
from pipelines.training.run_folder import RunFolder

Write = Callable[[Path], None]
# Takes what writes this rank's part of the state after so many steps into the folder that all ranks
# share, and calls it once, in any thread; a collective.
Keep = Callable[[Write, int], None]
TOLD_SECONDS = 1.0  # a shorter wait is not worth telling


class Saver:
    """Of one worker."""

    def __init__(self, setting: Setting, folder: RunFolder, stage: Stage, keep: Keep) -> None:
        self.setting, self.folder, self.stage, self.keep = setting, folder, stage, keep
        # Its buffers, as large as the state and pinned beside a GPU, are used again by every save.
        # The public stager around it (`DefaultStager`) throws them away after each in torch 2.11,
        # with what a second save needs.
        self._stager = StateDictStager(pin_memory=setting.device.type == "cuda")
        self._writing: Future[None] | None = None

    def save(
        self, step: int, loader: dict[str, Any], epochs: float, metrics: dict[str, float]
    ) -> None:
        """See `checkpoint.take`; a collective. Raises what the save before failed with."""
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > TOLD_SECONDS and self.setting.rank == 0:
            self.folder.say(
                f"step {step} waited {waited:.0f} s until the checkpoint before was written; save "
                f"less often ({self.setting.stage}.checkpoint_every, checkpoint_minutes), or to a "
                "faster disk"
            )
        place = self.folder.new_part(self.setting.rank)
        taken = checkpoint.take(
            place, self.setting, self.stage, step, loader, epochs, metrics, self.copy
        )
        writing: Future[None] = Future()

        def write(target: Path) -> None:
            try:
                taken.write(target)
            except BaseException as error:
                writing.set_exception(error)
                raise
            writing.set_result(None)

        self._writing = writing
        self.keep(write, step)

    def copy(self, state: Any) -> Any:
        """All of `state` in this machine's memory, where nothing that the training does changes it.

        The stager gets bare tensors: it would copy the attributes that DeepSpeed gives its own.
        """
        tensors = {str(id(tensor)): tensor.detach() for tensor in _tensors(state)}
        on_gpu = self.setting.device.type == "cuda"
        staged = self._stager.stage(tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self.setting.device)
        return deepcopy(state, {int(name): staged[name] for name in tensors})

    def check(self) -> None:
        """Raise what a save that has ended failed with."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk; raises what it failed with."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _tensors(state: Any) -> Iterator[Tensor]:
    """Those in `state` and its mappings, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
