"""When it is validated, which model is kept as the best, and when a stage has enough."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.training import validation as module
from pipelines.training.run_folder import RunFolder
from pipelines.training.validation import Validation
from tests.pipelines.training.plain import setting

pytestmark = pytest.mark.usefixtures("alone")


class Told(Validation):
    """Its losses are those it is told; a model is a file that says after how many steps."""

    def __init__(self, folder: Path, name: str = "validation_loss", **section: Any) -> None:
        here = setting("foundation", **{"steps": 9, "sample_clips": 0, "keep_best": name} | section)
        run = RunFolder(folder)
        run.open()
        nothing: Any = None
        self.edited: list[str] = []
        self.exported: list[int] = []
        super().__init__(here, nothing, nothing, run, self.write)

    def write(self, draft: Path) -> None:
        self.exported.append(self.done)
        if self.setting.rank > 0:  # takes part
            return
        draft.mkdir(parents=True)
        (draft / "step").write_text(str(self.done))

    def losses(self) -> dict[str, float]:
        names = ("loss", "psnr", "gain", "background_psnr")
        return {f"validation_{name}": self.value for name in names}

    def edit(self, model: Path, done: int) -> dict[str, str]:
        self.edited.append((model / "step").read_text())
        self.last["validation_gain"] = 8.0
        return {"a.png": "validation"}

    def after(self, done: int, value: float) -> bool:
        self.done, self.value = done, value
        return self(done)

    @property
    def kept(self) -> tuple[int, list[list[float]]]:
        """The step of the best model, by what is written of it and by itself; all losses."""
        state = json.loads((self.place / "best.json").read_text())
        assert (self.place / "best" / "step").read_text() == str(state["step"])
        assert not (self.place / "model").exists(), "a draft is left"
        return state["step"], state["history"]


@pytest.mark.parametrize(
    ("every", "steps", "due"),
    [(2, 7, [2, 4, 6, 7]), (3, 6, [3, 6]), (9, 4, [4]), (1, 2, [1, 2]), (0, 3, [])],
)
def test_it_is_validated_now_and_then_and_at_the_end(
    every: int, steps: int, due: list[int], tmp_path: Path
) -> None:
    told = Told(tmp_path, validate_every=every, steps=steps)
    assert [done for done in range(1, steps + 1) if told.is_due(done)] == due


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("validation_loss", [3, 1, 2, 1], 4),  # the first of equals
        ("validation_loss", [1, 2, 3], 2),
        ("validation_psnr", [3, 1, 4, 4, 2], 6),
        ("validation_gain", [3, 1, 4, 4, 2], 6),
        ("validation_background_psnr", [3, 1, 4, 4, 2], 6),
    ],
)
def test_the_best_is_the_lowest_loss_or_the_highest_score(
    name: str, values: list[float], best: int, tmp_path: Path
) -> None:
    told = Told(tmp_path, name)
    for n, value in enumerate(values, 1):
        assert told.after(2 * n, value) is False
    assert told.kept == (best, [[2 * n, value] for n, value in enumerate(values, 1)])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("keep", ["validation_loss", None])
def test_a_model_is_written_by_all_where_the_first_edits_with_it_or_keeps_it(
    keep: str | None, samples: int, rank: int, tmp_path: Path
) -> None:
    told = Told(tmp_path, keep_best=keep, sample_clips=samples)
    told.setting = replace(told.setting, rank=rank)
    assert told.after(4, 2.0) is False
    assert told.exported == ([4] if keep or samples else [])
    assert told.edited == (["4"] if samples and rank == 0 else [])
    assert not (told.place / "model").exists()
    reports, _ = told.folder.reports(0)
    assert len(reports) == (rank == 0)
    for report in reports:
        assert (report.step, report.steps, report.seconds_per_step) == (4, 9, 0.0)
        assert report.metrics == told.last
        assert report.metrics["validation_loss"] == 2.0
        assert report.metrics["validation_gain"] == (8.0 if samples else 2.0)
        assert report.files == ({"a.png": "validation"} if samples else {})
    assert told.place.joinpath("best").exists() == (keep is not None and rank == 0)
    if told.best is not None:
        assert told.best["metrics"] == told.last


@pytest.mark.parametrize(
    ("patience", "values", "enough"),
    [
        (2, [3, 1, 2, 2], [False, False, False, True]),
        (2, [3, 2, 3, 1, 2, 2], [False] * 5 + [True]),  # counted from the best
        (1, [1, 1], [False, True]),
        (0, [1, 2, 3, 4], [False] * 4),
    ],
)
def test_enough_is_when_it_got_no_better_so_many_times(
    patience: int, values: list[float], enough: list[bool], tmp_path: Path
) -> None:
    told = Told(tmp_path, patience=patience)
    assert [told.after(2 * n, value) for n, value in enumerate(values, 1)] == enough


def test_what_is_trained_again_after_a_restart_is_judged_again(tmp_path: Path) -> None:
    """Goes on from step 3: what came later is another training's, and its models are gone."""
    before = Told(tmp_path)
    for done, value in ((2, 5.0), (4, 1.0), (6, 7.0)):
        before.after(done, value)
    again = Told(tmp_path)
    again.after(4, 3.0)  # no better than it was, but what it was cannot come back
    assert again.kept == (4, [[2, 5.0], [4, 3.0]])
    again.after(6, 2.0)
    assert again.kept == (6, [[2, 5.0], [4, 3.0], [6, 2.0]])


def test_the_best_takes_the_place_of_the_last_only_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(source: Path, target: Path, text: Path) -> None:
        assert text == told.setting.job.start / "text"
        shutil.copytree(source, target)

    monkeypatch.setattr(module, "copy_model", copy)
    output = tmp_path / "made"
    told = Told(tmp_path)
    assert told.take_best(output) is None
    for done, value in ((2, 1.0), (4, 7.0)):
        told.after(done, value)
    output.mkdir()
    (output / "last").touch()
    told.section.keep_best = None  # this time; the best of an earlier try still lies there
    assert told.take_best(output) is None
    assert [path.name for path in output.iterdir()] == ["last"]
    told.section.keep_best = "validation_loss"
    taken = told.take_best(output)
    assert taken is not None
    assert (taken["step"], taken["metrics"]["validation_loss"]) == (2, 1.0)
    assert [path.name for path in output.iterdir()] == ["step"]
