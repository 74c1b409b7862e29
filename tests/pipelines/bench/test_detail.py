from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.footage.material import HELDOUT_LIST, prepare
from data.sample import Pair
from pipelines.bench.sharpness.detail import (
    blurred,
    compare,
    figures,
    pairs_by_kind,
    save_picture,
    table,
)
from tests.modeling.detail.test_transfer import picture


def test_figures_by_hand() -> None:
    truth = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    found, changed = truth.clone(), torch.zeros(2, 8, 8, dtype=torch.bool)
    found[1, :, :4] += 10
    changed[:, :, :4] = True
    got = figures(found, truth, changed)
    assert got["psnr"] == pytest.approx(10 * np.log10(255**2 / 25))
    assert got["inside"] == pytest.approx(10 * np.log10(255**2 / 50))
    assert got["outside"] == 99
    assert got["flicker"] == 5
    # Two flat pictures: (2 a b + c) / (a^2 + b^2 + c) with c = (255 / 100)^2.
    alike = (2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025)
    second = torch.tensor([False, True])[:, None, None].expand(2, 8, 8)
    got = figures(truth + 10 * second[..., None].byte(), truth, second)
    assert got["ssim inside"] == pytest.approx(alike, abs=5e-4)
    assert got["ssim outside"] == pytest.approx(1, abs=5e-4)
    assert got["ssim"] == pytest.approx((1 + alike) / 2, abs=5e-4)
    same = {"psnr": 99, "ssim": 1, "sharpness": 0, "flicker": 0}
    assert figures(truth, truth, None) == pytest.approx(same)


def test_sharpness_is_the_share_of_the_laplacians_energy() -> None:
    """Of a point, which is 4 of its height and -1 around: as high it is as sharp."""
    truth = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    truth[:, 8, 8] = 40
    half, twice = truth // 2, truth.clone()
    twice[:, 4, 4] = 40
    line = torch.zeros_like(truth)
    line[:, :, 8] = 40  # twice of its height, and -1 on both sides, in 14 rows within the border
    assert figures(line, truth, None)["sharpness"] == pytest.approx(14 * 6 / 20)
    assert figures(half, truth, None)["sharpness"] == pytest.approx(1 / 4)
    assert figures(twice, truth, None)["sharpness"] == pytest.approx(2)
    assert "flicker" not in figures(half[:1], truth[:1], None)
    everything = torch.ones(2, 16, 16, dtype=torch.bool)
    assert "inside" not in figures(half, truth, everything)  # there is no outside


def test_the_table_has_the_mean_of_every_way_over_those_that_have_it() -> None:
    rows = {
        "tone": {"a": {"psnr": 10.0, "ssim": 0.5}, "b": {"psnr": 1.0}},
        "add": {"a": {"psnr": 25.0, "ssim": 0.25}, "b": {"psnr": 2.0, "ssim": 0.125}},
    }
    assert table(rows, "psnr").splitlines() == [
        "| psnr | a | b |", "| --- | --- | --- |",
        "| tone | 10 | 1 |", "| add | 25 | 2 |", "| mean | 17.5 | 1.5 |",
    ]  # fmt: skip
    assert table(rows, "ssim").splitlines()[2:] == [
        "| tone | 0.5 |  |", "| add | 0.25 | 0.125 |", "| mean | 0.375 | 0.125 |",
    ]  # fmt: skip
    assert table(rows, "flicker").splitlines()[-1] == "| mean |  |  |"


def test_every_ways_frames_are_those_of_its_figures(tmp_path: Path) -> None:
    source = picture(64, 96).repeat(2, 1, 1, 1)
    target, mask = 255 - source, np.zeros((2, 64, 96), bool)
    mask[:, :32] = True
    noted: dict[str, torch.Tensor] = {}
    found = compare(Pair(source.numpy(), target.numpy(), mask, "x", 16.0, {}), noted.__setitem__)
    changed = torch.from_numpy(mask)
    assert found["as it is"] == figures(source, target, changed)
    sizes = ("full", "1/2", "1/4")
    assert list(noted) == [f"{size}, {way}" for size in sizes for way in ("enlarged", "detail")]
    for way, frames in noted.items():
        assert found[way] == figures(frames, target, changed)
    save_picture(tmp_path / "p.png", [frames[0] for frames in noted.values()])
    shown = np.asarray(Image.open(tmp_path / "p.png"))
    assert np.array_equal(shown, np.concatenate([f[0] for f in noted.values()], axis=1))


def test_the_blur_is_a_gaussian_of_one_pixel() -> None:
    point = torch.zeros(1, 15, 15, 3, dtype=torch.uint8)
    point[0, 7, 7] = 255
    found = blurred(point)[0, :, :, 1].double()
    assert found[7, 7] == pytest.approx(255 / (2 * np.pi), abs=1)
    assert found[7, 8] / found[7, 7] == pytest.approx(np.exp(-0.5), abs=0.03)
    assert torch.equal(found, found.T)


def test_detail_wins_for_tone_and_the_table_says_so() -> None:
    source = picture(96, 160).repeat(2, 1, 1, 1)
    target = (source * 0.6 + 30).round().to(torch.uint8)
    mask = np.ones((2, 96, 160), bool)
    pair = Pair(source.numpy(), target.numpy(), mask, "darker", 16.0, {})
    found = compare(pair)
    for size in ("full", "1/2", "1/4"):
        with_it, without = found[f"{size}, detail"], found[f"{size}, enlarged"]
        assert with_it["psnr"] > without["psnr"] + 8, size
        assert with_it["sharpness"] == pytest.approx(1, abs=0.15)
        assert without["sharpness"] < 0.3
    enlarged = [found[f"{size}, enlarged"]["psnr"] for size in ("full", "1/2", "1/4")]
    assert enlarged == sorted(enlarged, reverse=True)
    assert enlarged[2] < enlarged[0] - 0.5
    lines = table({"tone": found, "again": found}, "psnr").splitlines()
    assert lines[2].split("|")[2:] == lines[4].split("|")[2:]


def test_kinds_are_found_or_missed_in_words(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(96, 160).numpy()[0]).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / HELDOUT_LIST).write_text("a.png\n")
    footage = prepare(tmp_path / "in", tmp_path / "out", height=48, width=80, fps=16)["heldout"]
    sizes = {"height": 48, "width": 80, "frames": 3}
    pairs = dict(pairs_by_kind(footage, ("night", "add"), **sizes))
    assert sorted(pairs) == ["add", "night"]
    assert {pair.source.shape for pair in pairs.values()} == {(3, 48, 80, 3)}
    with pytest.raises(ValueError, match="no pair of 400 is of kind nonsense"):
        list(pairs_by_kind(footage, ("nonsense",), **sizes))
