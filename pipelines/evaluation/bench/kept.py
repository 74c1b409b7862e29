"""Clips that are measured already, one by one on disk: a run that was stopped goes on from them.

A clip's key is the hash of everything that decides its row: the clip, the settings that touch it,
what edits it, and the code. What has another key, or cannot be read, is measured anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from data.bench.cases import VERSION, Case
from data.bench.clip import OWN_FOOTAGE
from data.footage.material import footage_hash
from infra.runtime.paths import ROOT
from pipelines.config.benchmark import BenchConfig
from pipelines.evaluation.bench.judged import MAKERS, Judged
from pipelines.evaluation.bench.systems import System
from pipelines.tracking.records import key_of, write_json

CHOICE = ("half", "every", "long", "only", "resamples", "published")  # touch no clip's row
CODE = ("data", "modeling", "pipelines/evaluation")


class Kept:
    """The measured clips of `folder`: NAME.json, and NAME.png with the middle frames."""

    def __init__(self, folder: Path, system: System, config: BenchConfig) -> None:
        self.folder, self.system, self.config = folder, system, config

    def read(self, case: Case) -> Judged | None:
        try:
            stored = json.loads((self.folder / f"{case.name}.json").read_text(encoding="utf-8"))
            if stored["key"] != self.key(case):
                return None
            with Image.open(self.folder / f"{case.name}.png") as picture:
                source, edit, truth = np.split(np.asarray(picture), 3, axis=1)
            return Judged(stored["row"], source, edit, truth, stored["by_second"])
        except (OSError, ValueError, KeyError):  # none yet, or a file that was cut off
            return None

    def write(self, case: Case, judged: Judged) -> None:
        """The picture first: what has its numbers is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{case.name}.json").unlink(missing_ok=True)  # numbers of another picture
        frames = np.concatenate([judged.source, judged.edit, judged.truth], axis=1)
        Image.fromarray(frames).save(self.folder / f"{case.name}.png")
        row = {"key": self.key(case), "row": judged.row, "by_second": judged.by_second}
        write_json(self.folder / f"{case.name}.json", row)

    def key(self, case: Case) -> str:
        return key_of(
            {"case": asdict(case), "system": self.system.identity(case), "all": self._for_all}
        )

    @cached_property
    def _for_all(self) -> str:
        settings = asdict(self.config)
        return key_of(
            {
                "version": VERSION,
                "settings": {name: settings[name] for name in settings if name not in CHOICE},
                "footage": footage_hash(self.config.footage or OWN_FOOTAGE),
                "makers": {name: importlib.metadata.version(name) for name in (*MAKERS, "torch")},
                "code": _code(),
            }
        )


@cache
def _code() -> str:
    """Of every file that may move a number."""
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cu"):
                digest.update(file.read_bytes())
    return digest.hexdigest()
