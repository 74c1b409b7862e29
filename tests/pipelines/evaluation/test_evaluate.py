from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.config.pipeline import ConfigError, EvaluateConfig
from pipelines.evaluation.evaluate import (
    EditedClip,
    evaluate,
    load_editor,
    markdown_table,
    shortfalls,
    spread_mask,
    table_rows,
)
from pipelines.evaluation.metrics import clip_metrics
from pipelines.evaluation.picture import recomputed_view, side_by_side
from pipelines.stages.encode import encode_dataset


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


def test_picture_holds_four_rows_a_clip(tiny_model: Path, heldout: str) -> None:
    clips: list[EditedClip] = []
    evaluate(load_editor(tiny_model, True), heldout, EvaluateConfig(), on_clip=clips.append)
    picture = side_by_side(clips)
    one = side_by_side(clips[:1])
    assert picture.height == 2 * one.height
    assert one.height > 4 * 32
    assert one.width > 5 * 48
    pixels = np.asarray(one)
    source = clips[0].source[0]
    found = [
        (y, x)
        for y in range(one.height - 32)
        for x in range(90, 100)
        if np.array_equal(pixels[y + 20 : y + 32, x : x + 48], source[20:])
    ]
    assert len(found) >= 1
    view = recomputed_view(clips[0])
    kept = clips[0].recomputed
    assert np.array_equal(view[kept], clips[0].edit[kept])
    assert (view[~kept] == (40, 44, 52)).all()
