"""A benchmark that was stopped goes on, and gives what one that was not stopped gives."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.bench.cases import Case
from data.bench.clip import BenchClip
from data.video import VideoWriter
from pipelines.config.benchmark import BenchConfig
from pipelines.evaluation.bench import kept as kept_module
from pipelines.evaluation.bench.judged import Judged
from pipelines.evaluation.bench.kept import CHOICE, CODE, Kept
from pipelines.evaluation.bench.run import chosen, run
from pipelines.evaluation.bench.systems import OurModel, Videos
from tests.known_editors import known_editor

CONFIG = BenchConfig(half="drawn", every=20, long=False, size="48x32")  # three clips


class Noisy:
    """Edits by noise that the clip decides; counts what it edits, and fails once after `most`."""

    name = "noisy"

    def __init__(self, most: int = 99) -> None:
        self.edited: list[str] = []
        self.most = most

    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        if len(self.edited) == self.most:
            raise KeyboardInterrupt
        self.edited.append(clip.case.name)
        noise = np.random.default_rng(clip.case.number).integers(0, 3, clip.truth.shape)
        return (clip.truth // 2 + noise).astype(np.uint8), {"recomputed": 1 / 3}

    def identity(self, case: Case) -> str:
        return self.name


def test_a_run_that_was_stopped_goes_on_to_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.bench.cases.LONG_FRAMES", 6 * 16)  # of 60 s
    config = replace(CONFIG, long=True, every=30)
    long, short = (case.name for case in chosen(config))
    seen: dict[str, list[Judged]] = {"whole": [], "again": []}
    whole = run(Noisy(), config, on_clip=seen["whole"].append)
    stopped = Noisy(most=1)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, config, kept=Kept(tmp_path, stopped, config))
    rest = Noisy()
    again = run(rest, config, kept=Kept(tmp_path, rest, config), on_clip=seen["again"].append)
    assert (stopped.edited, rest.edited) == ([long], [short])
    assert again == whole
    third = run(Noisy(most=0), config, kept=Kept(tmp_path, Noisy(), config))
    assert third == whole
    assert len(third["psnr_by_second"][long]) == 6
    for one, other in zip(seen["whole"], seen["again"], strict=True):
        assert one.by_second == other.by_second
        for frames in ("source", "edit", "truth"):
            assert np.array_equal(getattr(one, frames), getattr(other, frames))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips that are kept."""
    folder = tmp_path_factory.mktemp("kept") / "system" / "clips"  # made when it is needed
    run(Noisy(), CONFIG, kept=Kept(folder, Noisy(), CONFIG))
    return folder


def there(folder: Path, config: BenchConfig = CONFIG, name: str = "noisy") -> int:
    """How many of the three clips are kept for such a run."""
    system = Noisy()
    system.name = name
    return sum(Kept(folder, system, config).read(case) is not None for case in chosen(CONFIG))


@pytest.mark.parametrize(
    "change",
    [{"success_db": 5.0}, {"dilate": 4}, {"seed": 1}, {"detail": False}, {"work_size": "1/2"},
     {"mask_cache": True}, {"clip": "weights"}, {"size": "64x48"}],
)  # fmt: skip
def test_what_moves_a_row_is_measured_anew(measured: Path, change: dict[str, object]) -> None:
    assert there(measured, replace(CONFIG, **change)) == 0  # type: ignore[arg-type]


def test_another_system_or_code_is_measured_anew(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert there(measured) == 3
    assert there(measured, name="other") == 0
    monkeypatch.setattr(kept_module, "_code", lambda: "changed")
    assert there(measured) == 0


@pytest.mark.parametrize("maker", ["numpy", "pillow", "av", "torch"])
def test_another_version_of_what_makes_or_judges_a_clip_is_measured_anew(
    measured: Path, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == maker else version(name)
    )
    assert there(measured) == 0


def test_another_case_version_or_footage_is_measured_anew(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = chosen(CONFIG)[0]
    kept = Kept(measured, Noisy(), CONFIG)
    assert kept.read(case) is not None
    for changes in ({"speed": "fast"}, {"amount": 0.5}, {"words": "x"}, {"occluded": False}):
        assert kept.read(replace(case, **changes)) is None, changes  # type: ignore[arg-type]
    with monkeypatch.context() as other:
        other.setattr(kept_module, "VERSION", "0")
        assert there(measured) == 0
    seen: list[object] = []
    monkeypatch.setattr(kept_module, "footage_hash", lambda path: seen.append(path) or "other")
    assert there(measured) == 0
    assert set(seen) == {kept_module.OWN_FOOTAGE}
    there(measured, replace(CONFIG, footage="mine"))
    assert seen[-1] == "mine"


def test_other_clips_beside_them_move_no_row(measured: Path) -> None:
    more = replace(CONFIG, every=1, half="both", long=True, resamples=7, published=False)
    assert there(measured, more) == 3
    changed = {n for n in CHOICE if getattr(more, n) != getattr(CONFIG, n)}
    assert changed == set(CHOICE) - {"only"}


def test_a_file_that_was_cut_off_is_measured_anew(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Noisy(), CONFIG)
    run(Noisy(), CONFIG, kept=kept)
    first, second, _ = (case.name for case in chosen(CONFIG))
    numbers, picture = tmp_path / f"{first}.json", tmp_path / f"{second}.png"
    numbers.write_text(numbers.read_text()[:-20])
    picture.write_bytes(picture.read_bytes()[:100])
    again = Noisy()
    run(again, CONFIG, kept=Kept(tmp_path, again, CONFIG))
    assert again.edited == [first, second]


def test_numbers_never_stand_beside_another_runs_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between a clip's picture and its numbers, with other settings than the run before."""
    kept, case = Kept(tmp_path, Noisy(), CONFIG), chosen(CONFIG)[0]
    run(Noisy(), CONFIG, kept=kept)
    judged = kept.read(case)
    assert judged is not None

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_module, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path, Noisy(), replace(CONFIG, seed=1)).write(case, judged)
    assert kept.read(case) is None


@pytest.mark.parametrize("name", ["kernel.cu", "network.py"])
def test_code_is_whatever_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(kept_module, "ROOT", tmp_path)
    file = tmp_path / CODE[0] / "gpu" / name
    file.parent.mkdir(parents=True)
    seen = set()
    for text in ("one", "two"):
        file.write_text(text)
        seen.add(kept_module._code.__wrapped__())
    assert len(seen) == 2


def test_what_a_system_is(tmp_path: Path) -> None:
    case = chosen(CONFIG)[0]
    editor = known_editor()
    ours = [OurModel(editor, 0), OurModel(editor, 1), OurModel(editor, 0, detail=True),
            OurModel(editor, 0, "1/2")]  # fmt: skip
    assert len({system.identity(case) for system in ours}) == 4
    other = known_editor(mask_cache=None)
    assert other.identity != editor.identity
    assert OurModel(other, 0).identity(case) != ours[0].identity(case)
    videos = Videos("x", tmp_path)
    identities = []
    for level in (0, 9):
        with VideoWriter(tmp_path / f"{case.name}.mp4", 48, 32, 16) as writer:
            writer.write(np.full((2, 32, 48, 3), level, np.uint8))
        identities.append(videos.identity(case))
    assert identities[0] != identities[1]
