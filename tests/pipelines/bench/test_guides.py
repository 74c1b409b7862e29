"""Which guide serves which VAE: of two that are known, and of none that has errors of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.sample import Pair
from modeling.config import WIDEST_BLUR
from modeling.detail.guide import blurred
from modeling.detail.noise_gate import only_edited
from modeling.detail.resample import resize
from modeling.detail.transfer import transfer
from modeling.model_dir import load_model, read_card, read_config, save_model
from modeling.pixels import from_uint8, to_uint8
from pipelines.bench.sharpness.detail import figures
from pipelines.bench.sharpness.guides import Guides, _Case, compare_guides, round_trip
from pipelines.commands.measure.detail import _guides
from tests.modeling.detail.test_transfer import picture

WORK = (48, 80)


class Blurring(nn.Module):
    """A VAE that loses what a Gaussian of `pixels` does, and errs by so many levels in the mean,
    each time anew. Its latents are pixels; it wants whole latents."""

    def __init__(self, pixels: float, errors: float = 0.0) -> None:
        super().__init__()
        self.pixels, self.errors = pixels, errors
        self.weight = nn.Parameter(torch.zeros(()))
        self.draw = np.random.default_rng(0)

    def encode(self, pixels: Tensor) -> tuple[Tensor, None]:
        assert pixels.shape[1] % 4 == 1
        return pixels, None

    def decode(self, latents: Tensor) -> tuple[Tensor, None]:
        frames = blurred(to_uint8(latents[0]).permute(0, 2, 3, 1), self.pixels)
        errors = torch.from_numpy(self.draw.laplace(0, self.errors, frames.shape))
        return from_uint8((frames + errors).clamp(0, 255)).permute(0, 3, 1, 2)[None], None


@pytest.fixture(scope="module")
def made() -> list[tuple[str, Pair]]:
    source = picture(96, 160).repeat(2, 1, 1, 1)
    paler = (source.int() * 3 // 5 + 30).to(torch.uint8)
    square = source.clone()
    square[:, 30:60, 60:100] = 20
    mask = np.ones((2, 96, 160), bool)
    return [
        (kind, Pair(source.numpy(), target.numpy(), mask, kind, 16.0, {}))
        for kind, target in (("tone", paler), ("object", square))
    ]


@pytest.mark.parametrize("pixels", [0.0, 0.5, 0.9])
def test_a_vae_that_only_blurs_needs_no_decoding(
    made: list[tuple[str, Pair]], pixels: float
) -> None:
    guides = compare_guides(Blurring(pixels), made, WORK)  # type: ignore[arg-type]
    assert guides.blur == pytest.approx(pixels)
    assert guides.serves
    assert guides.background > 60
    assert list(guides.rows) == ["tone", "object"]
    for found in guides.rows.values():
        assert found["decoded"]["psnr"] > found["enlarged"]["psnr"]


def test_a_vae_that_errs_needs_the_source_decoded_again(made: list[tuple[str, Pair]]) -> None:
    guides = compare_guides(Blurring(0.5, errors=14), made, WORK)  # type: ignore[arg-type]
    assert guides.background < 45
    assert not guides.serves
    assert guides.told()["kinds"] == ["object", "tone"]


def entry(psnr: float) -> dict[str, float]:
    return {"psnr": psnr}


@pytest.mark.parametrize(
    ("decoded", "blurred", "background", "serves"),
    [(42, 41, 45, True), (42, 40.9, 45, False), (42, 41, 44.9, False), (40, 41, 60, True)],
)
def test_the_rule(decoded: float, blurred: float, background: float, serves: bool) -> None:
    rows = {
        kind: {
            "decoded": entry(decoded + more),
            "blurred": entry(blurred - more),
            "nothing edited, blurred": entry(background + more),
        }
        for kind, more in (("one", 3.0), ("two", -3.0))
    }
    guides = Guides(0.5, 40.24, rows)
    assert guides.serves is serves
    assert guides.told() == {
        "blur": 0.5,
        "background_db": background,
        "loss_db": pytest.approx(decoded - blurred),
        "near_db": 40.2,
        "kinds": ["one", "two"],
    }


def test_the_blur_is_the_best_for_all_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loses ten dB a pixel from 0.2 on, the second thirty from 0.8."""

    class Case:
        def __init__(self, kind: str, pair: Any, vae: Any, work: Any) -> None:
            self.kind, (self.most, self.best, self.slope) = kind, pair

        def near(self, pixels: float) -> float:
            return self.most - self.slope * abs(pixels - self.best)

        def rows(self, pixels: float) -> dict[str, float]:
            return {"blur": pixels}

    monkeypatch.setattr("pipelines.bench.sharpness.guides._Case", Case)
    made: Any = [("one", (50.0, 0.2, 10.0)), ("two", (30.0, 0.8, 30.0))]
    guides = compare_guides(Blurring(0.0), made, WORK)  # type: ignore[arg-type]
    assert guides.blur == 0.8
    assert guides.near == pytest.approx((44 + 30) / 2)
    assert guides.rows == {"one": {"blur": 0.8}, "two": {"blur": 0.8}}
    made = [("one", (50.0, 99.0, 0.1))]
    assert compare_guides(Blurring(0.0), made, WORK).blur == WIDEST_BLUR  # type: ignore[arg-type]


def test_a_pair_is_compared_with_what_the_vae_makes_of_both_its_videos(
    made: list[tuple[str, Pair]],
) -> None:
    """Of a VAE without loss, whose guide is exact when nothing is blurred."""
    (_, pair), _ = made
    case = _Case("tone", pair, Blurring(0.0), WORK)  # type: ignore[arg-type]
    source, truth = torch.from_numpy(pair.source), torch.from_numpy(pair.target)
    small, edit = resize(source, *WORK), resize(truth, *WORK)
    assert torch.equal(case.seen, small)
    assert torch.equal(case.edit, edit)
    assert case.near(0.0) == 99.0 > case.near(1.0)
    rows = case.rows(0.0)
    assert rows["enlarged"] == figures(resize(edit, 96, 160), truth, case.changed)
    shown = transfer(source, small, only_edited(small, edit))
    assert rows["decoded"] == figures(shown, truth, case.changed)
    assert rows["nothing edited, blurred"]["psnr"] == 99.0
    assert list(rows) == ["enlarged", "decoded", "blurred", "nothing edited, blurred"]


def test_a_round_trip_is_of_whole_latents_and_of_all_frames() -> None:
    frames = picture(32, 48).repeat(4, 1, 1, 1)
    frames[3] = 7
    found = round_trip(Blurring(0.0), frames)  # type: ignore[arg-type]
    assert torch.equal(found, frames)
    with pytest.raises(ValueError, match="80x47 is no whole number of 16 pixels"):
        compare_guides(Blurring(0.0), [], (47, 80))  # type: ignore[arg-type]


def test_the_answer_is_told_and_recorded(made: list[tuple[str, Pair]], tmp_path: Path) -> None:
    demo = load_model("demo")
    config = replace(demo.config, stream=replace(demo.config.stream, guide_blur=0.5))
    path = save_model(tmp_path / "model", config, vae=demo.vae, card={"name": "random"})
    rows, said = _guides(iter(made), path, (96, 160), "1/2", "cpu", write=True)
    assert list(rows) == ["tone", "object"]
    assert said.endswith(f"decode it again; recorded in {path}")
    assert read_config(path).stream.guide_blur is None
    told = read_card(path)["guide"]
    assert (told["work_size"], told["kinds"]) == ("80x48", ["object", "tone"])
