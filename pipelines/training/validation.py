"""Validation while a stage trains: held-out loss with the same noise every time, and a few clips
edited by the real stream; which model was the best, and whether it still gets better.

Every rank takes a share of the clips for the loss. The first one also writes the model as it would
be exported and edits with it, while the others wait.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from data.loader import Split, loader
from data.manifest import read_dataset_info
from modeling.editor import StreamingEditor
from modeling.model_dir import Model
from modeling.pixels import from_uint8
from modeling.text.build import build_text_encoder
from modeling.text.encoder import TextEncoder
from pipelines.evaluation.contact_sheet import film, side_by_side
from pipelines.evaluation.evaluate import EditedClip, evaluate
from pipelines.tracking.records import write_json
from pipelines.training.export import copy_model
from pipelines.training.methods.base import FixedDraw, Setting, Stage
from pipelines.training.run_folder import RunFolder, TrainingReport

SHOWN = ("gain", "background_psnr")  # of what `evaluate` says
HIGHER_IS_BETTER = ("validation_psnr", "validation_gain", "validation_background_psnr")


class Validation:
    """`export` writes the model as it is to a folder, on the first rank; a collective."""

    def __init__(
        self,
        setting: Setting,
        stage: Stage,
        model: Model,
        folder: RunFolder,
        export: Callable[[Path], None],
    ) -> None:
        self.setting, self.stage, self.model = setting, stage, model
        self.section, self.folder, self.export = setting.section, folder, export
        self.place = folder.path / "validation"
        self.last: dict[str, float] = {}
        self._clips: list[tuple[int, dict[str, Any]]] | None = None
        self._text: TextEncoder | None = None  # that remembers the clips' prompts, without weights
        self._state = self.place / "best.json"

    def is_due(self, done: int) -> bool:
        every = self.section.validate_every
        return every > 0 and (done % every == 0 or done == self.section.steps)

    def __call__(self, done: int) -> bool:
        """Validate after `done` steps; whether the stage may end because it gets no better.

        A collective.
        """
        self.last = self.losses()
        draft = self.place / "model"
        if self.section.sample_clips or self.section.keep_best:
            self.export(draft)
        enough = False
        if self.setting.rank == 0:
            files = self.edit(draft, done) if self.section.sample_clips else {}
            report = TrainingReport(done, self.section.steps, self.last, 0.0, files=files)
            self.folder.report(report)
            enough = self._judge(draft, done)
        answer = torch.tensor(int(enough), device=self.setting.device)
        distributed.broadcast(answer, 0)
        return bool(answer)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Means of the stage's own losses over the held-out clips; a collective."""
        setting, total = self.setting, self._total
        if self._clips is None:
            self._clips = list(self._read(total))
        sums: dict[str, Tensor] = {}
        for place, batch in self._clips:
            draw = FixedDraw(setting, place, total)
            counts = float(place < total)  # all ranks run equally many forwards
            for name, value in self.stage.judge(batch, draw).items():
                sums[name] = sums.get(name, 0.0) + counts * value.double()
        means = torch.stack(list(sums.values()))
        distributed.all_reduce(means)
        values = (means / (total * setting.sharing)).tolist()
        return {f"validation_{name}": value for name, value in zip(sums, values, strict=True)}

    def edit(self, model: Path, done: int) -> dict[str, str]:
        """Edit the first clips with the model just written; the files that show it."""
        assert self.setting.job.heldout is not None
        editor = StreamingEditor.load(model, device=self.setting.device)
        editor.text = self._prompts()
        settings = replace(self.setting.config.evaluate, clips=self.section.sample_clips)
        clips: list[EditedClip] = []
        report = evaluate(editor, self.setting.job.heldout, settings, on_clip=clips.append)
        editor.text.release()
        mean = report["mean"]
        self.last |= {f"validation_{name}": mean[name] for name in SHOWN if name in mean}
        place = self.place / f"step-{done:06d}"
        place.mkdir(parents=True, exist_ok=True)
        side_by_side(clips).save(place / "samples.png")
        fps = editor.settings.fps
        for number, clip in enumerate(clips):
            film(place / f"sample-{number}.mp4", clip, fps)
        del editor
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs what the stream used
        return {str(file): f"validation/{place.name}" for file in sorted(place.iterdir())}

    @property
    def best(self) -> dict[str, Any] | None:
        """{"step", "value", "metrics", "history"} of the best model so far, on the first rank."""
        return json.loads(self._state.read_text()) if self._state.is_file() else None

    def take_best(self, output: Path) -> dict[str, Any] | None:
        """Put the best model in the place of the last one; what is known of it, if it was kept."""
        best = self.best
        if self.section.keep_best is None or best is None:
            return None
        shutil.rmtree(output, ignore_errors=True)
        copy_model(self.place / "best", output, self.setting.job.start / "text")
        return best

    def _judge(self, model: Path, done: int) -> bool:
        name = self.section.keep_best
        if name is None:
            shutil.rmtree(model, ignore_errors=True)
            return False
        value, best = self.last[name], self.best
        # Of a training that goes on from a checkpoint, what came after that is judged once more.
        history = {step: v for step, v in (best["history"] if best else []) if step < done}
        history[done] = value
        sign = 1 if name in HIGHER_IS_BETTER else -1
        if best is None or sign * value > sign * best["value"] or best["step"] == done:
            shutil.rmtree(self.place / "best", ignore_errors=True)
            model.rename(self.place / "best")
            best = {"step": done, "value": value, "metrics": self.last}
        else:
            shutil.rmtree(model)
        write_json(self._state, best | {"history": list(history.items())})
        worse = sum(step > best["step"] for step in history)
        return 0 < self.section.patience <= worse

    @cached_property
    def _total(self) -> int:
        assert self.setting.job.heldout is not None
        return min(self.section.validate_clips, read_dataset_info(self.setting.job.heldout).samples)

    def _read(self, total: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place, batch of one) of this rank's clips, the last of them again where another rank has
        one more."""
        assert self.setting.job.heldout is not None
        rank, workers = self.setting.data_rank, self.setting.data_workers
        pairs = loader(
            self.setting.job.heldout,
            Split(batch_size=1, rank=0, world_size=1, shuffle=False, epochs=1),
            clip_frames=self.setting.clip_frames,
        )
        text = self._prompts() if self.setting.stage != "vae" else None
        mine: list[tuple[int, dict[str, Any]]] = []
        spare: dict[str, Any] = {}
        for place, batch in enumerate(islice(pairs, total)):
            if place % workers == rank or not mine:
                spare = self._encode(batch, text) if text else batch
            if place % workers == rank:
                mine.append((place, spare))
        if text:
            text.release()
        most = -(-total // workers)
        yield from mine
        yield from [(total, spare)] * (most - len(mine))

    def _prompts(self) -> TextEncoder:
        """An encoder that remembers the prompts of this rank's clips and of all samples, so that
        UMT5 (11 GB) is loaded for the first validation alone."""
        if self._text is None:
            assert self.setting.job.heldout is not None
            self._text = build_text_encoder(self.model.config.text).to(self.setting.device)
            if self.setting.rank == 0 and self.section.sample_clips:
                split = Split(batch_size=1, rank=0, world_size=1, shuffle=False, epochs=1)
                shown = islice(loader(self.setting.job.heldout, split), self.section.sample_clips)
                self._text.encode([batch["instruction"][0] for batch in shown])
        return self._text

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any], text: TextEncoder) -> dict[str, Any]:
        vae: Any = self.model.vae
        device = self.setting.device
        encoded: dict[str, Any] = {}
        for name in ("source", "target"):
            pixels = from_uint8(torch.as_tensor(batch[name]).to(device).permute(0, 1, 4, 2, 3))
            encoded[name] = vae.encode(pixels)[0].half().float().cpu()  # as shards keep them
        encoded["text"] = text.encode(batch["instruction"]).half().float().cpu()
        return encoded
