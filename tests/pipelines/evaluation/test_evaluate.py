from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.sample import Pair
from data.shards import write_dataset
from modeling.config import MaskCacheConfig
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import EvaluateConfig
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.contact_sheet import chosen, recomputed_view, side_by_side
from pipelines.evaluation.evaluate import (
    EditedClip,
    edit_again,
    evaluate,
    load_editor,
    markdown_table,
    shortfalls,
    spread_mask,
    table_rows,
)
from pipelines.evaluation.scores import clip_metrics
from pipelines.stages.encode import encode_dataset
from pipelines.tracking.records import fingerprint_of
from tests.known_editors import (
    CONFIG,
    assert_edited,
    block_clip,
    expected_edit,
    known_editor,
    write_known_model,
)


@pytest.mark.parametrize("mask_cache", [None, True, False])
def test_report_of_a_model(tiny_model: Path, heldout: str, mask_cache: bool | None) -> None:
    config = EvaluateConfig(mask_cache=mask_cache)
    clips: list[EditedClip] = []
    report = evaluate(load_editor(tiny_model, mask_cache), heldout, config, on_clip=clips.append)
    assert len(clips) == len(report["clips"]) == 2
    assert json.loads(json.dumps(report)) == report
    for clip, row in zip(clips, report["clips"], strict=True):
        assert clip.edit.shape == clip.source.shape == (21, 32, 48, 3)
        assert clip.recomputed.shape == clip.mask.shape == (21, 32, 48)
        assert clip.mask.any()
        expected = clip_metrics(clip.source, clip.edit, clip.truth, clip.mask, dilate=config.dilate)
        assert expected.items() <= row.items()
    gains = [row["gain"] for row in report["clips"]]
    assert report["mean"]["gain"] == pytest.approx(np.mean(gains))
    assert report["mean"]["fps"] > 0
    share = report["mean"]["recomputed"]
    assert share < 1 if mask_cache else share == 1
    assert (report["mask_cache"] is not None) == bool(mask_cache)


def test_a_clip_s_rate_is_of_its_frames_and_its_share_of_all_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, shares = block_clip(21, 32, 48), []

    def edited(*given: Any, **options: Any) -> Any:
        chunks, _ = edit_clip(*given, **options)
        shares.extend(chunk.recomputed for chunk in chunks)
        return chunks, 4.0

    edit_clip = evaluation.edit_clip
    monkeypatch.setattr(evaluation, "edit_clip", edited)
    mask = np.ones(source.shape[:3], bool)
    batch = {"source": [source], "target": [source], "mask": [mask], "instruction": ["make it red"]}
    numbers = evaluation.edit_pair(known_editor(), batch, EvaluateConfig()).metrics
    assert numbers["fps"] == 5.25
    assert len(set(shares)) == 2  # the first chunk is computed whole
    assert numbers["recomputed"] == pytest.approx(sum(shares) / len(shares))


def test_clips_limits_and_seed_repeats(tiny_model: Path, heldout: str) -> None:
    editor = load_editor(tiny_model)
    reports = [evaluate(editor, heldout, EvaluateConfig(clips=1, seed=s)) for s in (0, 0, 1)]
    edits = [{k: v for k, v in r["clips"][0].items() if k != "fps"} for r in reports]
    assert all(len(report["clips"]) == 1 for report in reports)
    assert edits[0] == edits[1] != edits[2]


def test_encoded_dataset_is_refused(tiny_model: Path, heldout: str, tmp_path: Path) -> None:
    encoded = str(tmp_path / "encoded")
    encode_dataset(heldout, encoded, tiny_model, batch_size=1, samples_per_shard=2)
    with pytest.raises(ConfigError, match="needs the videos"):
        evaluate(load_editor(tiny_model), encoded, EvaluateConfig())


def test_chunk_mask_as_pixels() -> None:
    mask = np.zeros((3, 2, 3), bool)
    mask[0, 0, 0] = mask[1, 1, 2] = True
    first = spread_mask(mask, first_frame=0, frames=9, height=30, width=41)
    assert first.shape == (9, 30, 41)
    assert first[0, :16, :16].all()
    assert not first[1, :16, :16].any()
    assert first[1:5, 16:, 32:].all()
    later = spread_mask(mask, first_frame=9, frames=7, height=32, width=48)
    assert later.shape == (7, 32, 48)
    assert later[:4, :16, :16].all()
    assert later[4:, 16:, 32:].all()


PROMPTS = ("paint it red", "make it blue", "leave it as it is", "red and green")
TRUTHS = ("paint it red", "make it green", "make it blue", "red and green")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Clips whose source, truth and edit all differ where that is not the perfect edit."""
    samples = []
    for number, (prompt, truth) in enumerate(zip(PROMPTS, TRUTHS, strict=True)):
        source = block_clip(21, 48, 64, seed=number)
        target = expected_edit(source, truth)
        mask = (source != target).any(-1)
        samples.append(Pair(source, target, mask, prompt, 16.0, {}))
    uri = str(tmp_path_factory.mktemp("judged") / "set")
    write_dataset(uri, samples, made_by={}, samples_per_shard=3)
    return uri


def test_each_clip_is_edited_by_its_own_words_and_compared_with_its_own_truth(judged: str) -> None:
    clips: list[EditedClip] = []
    report = evaluate(known_editor(), judged, EvaluateConfig(clips=None), on_clip=clips.append)
    assert [clip.instruction for clip in clips] == list(PROMPTS)
    assert [row["instruction"] for row in report["clips"]] == list(PROMPTS)
    for number, clip in enumerate(clips):
        assert_edited(clip.edit, clip.source, PROMPTS[number])
        drawn = block_clip(21, 48, 64, seed=number)  # it was stored by a lossy codec
        truth = expected_edit(drawn, TRUTHS[number])
        assert np.abs(clip.source.astype(int) - drawn).mean() < 3
        assert np.abs(clip.truth.astype(int) - truth).mean() < 3
        assert np.array_equal(clip.mask, (drawn != truth).any(-1))
    right = [row["edited_psnr"] for row in report["clips"]]
    gains = [row["gain"] for row in report["clips"]]
    assert min(right[0], right[3], *gains[::3]) > 12  # painted as they should be
    assert gains[1] < 0  # blue where green is right: twice as far from it as the source
    assert abs(gains[2]) < 1  # nothing where blue is right
    assert min(row["background_psnr"] for row in report["clips"]) > 35
    assert report["mean"]["success"] == 0.5
    assert report["mean"]["gain"] == pytest.approx(np.mean(gains))


@pytest.mark.parametrize(("clips", "edited"), [(3, 3), (5, 4), (None, 4)])
def test_as_many_clips_are_judged_as_are_asked_for(
    judged: str, clips: int | None, edited: int
) -> None:
    seen: list[EditedClip] = []
    report = evaluate(known_editor(), judged, EvaluateConfig(clips=clips), on_clip=seen.append)
    assert [clip.instruction for clip in seen] == list(PROMPTS[:edited])
    assert len(report["clips"]) == edited


def test_the_report_says_what_was_judged_on_what_and_how(judged: str) -> None:
    config = EvaluateConfig(clips=1, dilate=3, seed=7, success_db=90)
    clips: list[EditedClip] = []
    report = evaluate(known_editor(), judged, config, on_clip=clips.append)
    clip = clips[0]
    measured = clip_metrics(clip.source, clip.edit, clip.truth, clip.mask, dilate=3)
    assert measured.items() <= report["clips"][0].items()
    assert 12 < measured["gain"] < 90
    assert report["mean"]["success"] == 0
    assert report["model"] == "known"
    assert report["dataset"] == judged
    assert report["dataset_hash"] == fingerprint_of(judged)
    assert report["settings"] == asdict(config)
    assert report["mask_cache"] == json.loads(json.dumps(asdict(CONFIG.stream.mask_cache)))  # type: ignore[arg-type]


def test_what_was_computed_anew_is_said_in_its_place(judged: str) -> None:
    editor = known_editor(mask_cache=MaskCacheConfig(keep_ratio=0.25, pruned_steps=(1, 2, 3)))
    clips: list[EditedClip] = []
    evaluate(editor, judged, EvaluateConfig(clips=1), on_clip=clips.append)
    stream = editor.open(PROMPTS[0], height=48, width=64, seed=0)
    chunks = list(stream.push(clips[0].source))
    assert [chunk.first_frame for chunk in chunks] == [0, 9]
    assert clips[0].recomputed[:9].all()
    later = chunks[1].mask.repeat(4, 0).repeat(16, 1).repeat(16, 2)
    assert 0 < later.mean() < 1
    assert np.array_equal(clips[0].recomputed[9:], later)
    assert clips[0].metrics["recomputed"] == pytest.approx(
        np.mean([chunk.recomputed for chunk in chunks])
    )


def test_a_mask_cache_can_be_switched_on_and_off_and_left(tmp_path: Path) -> None:
    own = MaskCacheConfig(keep_ratio=0.5)
    with_one = write_known_model(tmp_path / "with", mask_cache=own)
    without = write_known_model(tmp_path / "without", mask_cache=None)
    assert load_editor(with_one).mask_cache == load_editor(with_one, True).mask_cache == own
    assert load_editor(with_one, False).mask_cache is None
    assert load_editor(without).mask_cache is load_editor(without, False).mask_cache is None
    assert load_editor(without, True).mask_cache == MaskCacheConfig()
    config = json.loads((without / "config.json").read_text())
    config["stream"]["timesteps"] = [1000, 500]  # it has no third step to prune
    (without / "config.json").write_text(json.dumps(config))
    assert load_editor(without, True).mask_cache == MaskCacheConfig(pruned_steps=(1,))


@pytest.mark.parametrize(
    ("gain", "background", "missing"),
    [
        (4.0, 28.0, []),
        (4.1, 28.1, []),
        (3.999, 28.0, ["gain"]),
        (4.0, 27.999, ["background_psnr"]),
        (float("nan"), 28.0, ["gain"]),
        (4.0, float("nan"), ["background_psnr"]),
        (None, 40.0, ["gain"]),
        (9.0, None, ["background_psnr"]),
        (1.0, 1.0, ["gain", "background_psnr"]),
    ],
)
def test_the_gate_asks_for_gain_and_for_the_source_s_background(
    gain: float | None, background: float | None, missing: list[str]
) -> None:
    mean = {"gain": gain, "background_psnr": background, "edited_psnr": 99.0}
    others = {"background_psnr_truth": 99.0, "background_ssim": 99.0, "source_psnr": 99.0}
    known = {name: value for name, value in (mean | others).items() if value is not None}
    config = EvaluateConfig(min_gain_db=4, min_background_db=28)
    assert [reason.split()[0] for reason in shortfalls(known, config)] == missing
    worse = known | dict.fromkeys(others, 0.0)
    assert [reason.split()[0] for reason in shortfalls(worse, config)] == missing


def test_shortfalls_name_what_is_missing() -> None:
    config = EvaluateConfig(min_gain_db=4, min_background_db=28)
    assert shortfalls({"gain": 4.0, "background_psnr": 30.0}, config) == []
    low = {"gain": 3.0, "background_psnr": 30.0}
    assert shortfalls(low, config) == ["gain 3.0 dB is below 4 dB"]
    assert len(shortfalls({}, config)) == 2
    assert len(shortfalls({"gain": float("nan"), "background_psnr": 30.0}, config)) == 1


def test_table_shows_what_there_is() -> None:
    rows = table_rows({"gain": 5.23, "fps": 11.0, "other": 1.0})
    assert [row[:2] for row in rows] == [("gain", "5.2 dB"), ("fps", "11.00")]
    assert "| gain | 5.2 dB |" in markdown_table({"gain": 5.23})
    units = {name: value for name, value, _ in table_rows(dict.fromkeys(EVERY, 1.256))}
    decibels = ("gain", "edited_psnr", "source_psnr", "background_psnr")
    levels = ("temporal_inside", "temporal_outside")
    assert units == dict.fromkeys(EVERY, "1.26") | dict.fromkeys(decibels, "1.3 dB") | (
        dict.fromkeys(levels, "1.26 levels")
    )


EVERY = (
    *("gain", "success", "edited_psnr", "edited_ssim", "source_psnr", "background_psnr"),
    *("background_ssim", "temporal_inside", "temporal_outside", "recomputed", "fps"),
)


def test_picture_holds_four_rows_a_clip(tiny_model: Path, heldout: str) -> None:
    clips: list[EditedClip] = []
    evaluate(load_editor(tiny_model, True), heldout, EvaluateConfig(), on_clip=clips.append)
    picture = side_by_side(clips)
    one = side_by_side(clips[:1])
    assert picture.height == 2 * one.height
    pixels, top = np.asarray(picture), 0
    for clip in clips:
        rows = (clip.source, clip.edit, clip.truth, recomputed_view(clip))
        for row, pictures in enumerate(rows):
            for column, frame in enumerate((0, 5, 10, 15, 20)):
                y, x = top + 22 + row * (32 + 4), 96 + column * (48 + 4)
                cell = pixels[y : y + 32, x : x + 48]
                bare = slice(20, None) if row == 0 else slice(None)  # below the frame's number
                assert np.array_equal(cell[bare], pictures[frame][bare]), (row, column)
        top += one.height
    view = recomputed_view(clips[0])
    kept = clips[0].recomputed
    assert np.array_equal(view[kept], clips[0].edit[kept])
    assert (view[~kept] == (40, 44, 52)).all()


@pytest.mark.parametrize(
    ("gains", "found"),
    [
        ((3.0, 9.0, 5.0), {2: "Typical", 1: "Best", 0: "Failed: below 4 dB"}),
        ((9.0, None, 5.0, 7.0), {3: "Typical", 0: "Best", 2: "The worst"}),
        ((1.0, 2.0), {1: "Typical", 0: "Failed: below 4 dB"}),  # none is shown twice
        ((4.0, 6.0, 5.0), {2: "Typical", 1: "Best", 0: "The worst"}),  # on the border
        ((None, None), {0: "Nothing to do"}),
    ],
)
def test_a_typical_the_best_and_the_worst_clip_are_shown(
    gains: tuple[float | None, ...], found: dict[int, str]
) -> None:
    clips = [{} if gain is None else {"gain": gain} for gain in gains]
    assert list(chosen(clips, success_db=4.0).items()) == list(found.items())  # in this order


def test_clips_are_edited_again_as_they_were(tiny_model: Path, heldout: str) -> None:
    editor, config = load_editor(tiny_model), EvaluateConfig()
    seen: list[EditedClip] = []
    evaluate(editor, heldout, config, on_clip=seen.append)
    again = edit_again(editor, heldout, config, [1, 0])
    for clip, before in zip(again, reversed(seen), strict=True):
        assert clip.instruction == before.instruction
        assert np.array_equal(clip.edit, before.edit)
