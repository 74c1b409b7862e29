from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.footage.material import HELDOUT_LIST, prepare
from data.sample import Pair
from pipelines.bench.sharpness.detail import blurred, compare, figures, pairs_by_kind, table
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
    sizes = {"height": 48, "width": 80, "frames": 2}
    kinds = [kind for kind, _ in pairs_by_kind(footage, ("night", "add"), **sizes)]
    assert sorted(kinds) == ["add", "night"]
    with pytest.raises(ValueError, match="no pair of 400 is of kind nonsense"):
        list(pairs_by_kind(footage, ("nonsense",), **sizes))
