"""data/footage: exact truth, whole files held out, nothing but the edit changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.footage import camera, kinds, looks, regions
from data.footage import pair as pair_module
from data.footage.camera import film
from data.footage.kinds import KINDS, Edit, Filmed
from data.footage.material import (
    Footage,
    FootageError,
    is_heldout,
    prepare,
)
from data.footage.objects import Thing, covered, draw, moving, resting
from data.footage.pair import make_footage_pair
from data.sample import Pair
from data.video import VideoWriter
from infra.runtime.errors import UserError

SIZE = {"height": 48, "width": 80}


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Footage]:
    """Two photos and a clip to train on, one photo held out."""
    folder = tmp_path_factory.mktemp("footage")
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "kept.jpg"):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 15, 3), np.uint8))
        coarse.resize((240, 144), Image.Resampling.BICUBIC).save(folder / name)
    frames = rng.integers(0, 256, (24, 96, 128, 3), np.uint8)
    with VideoWriter(folder / "c.mp4", 128, 96, 16) as writer:
        writer.write(frames)
    (folder / "heldout.txt").write_text("# not for training\nkept.jpg\n")
    return prepare(folder, tmp_path_factory.mktemp("prepared"), fps=16, **SIZE)


def made(footage: Footage, seed: int) -> Pair:
    return make_footage_pair(seed, footage, frames=9, **SIZE)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48)])
def test_footage_is_kept_as_fine_as_the_shorter_side_asks(
    tmp_path: Path, height: int, width: int
) -> None:
    Image.new("RGB", (600, 400)).save(tmp_path / "a.png")
    (tmp_path / "heldout.txt").write_text("")
    found = prepare(tmp_path, tmp_path / "made", height=height, width=width, fps=16)["train"]
    (photo,) = found.photos
    sizes = [photo.level(n).shape[1:3] for n in range(len(photo.levels))]
    assert sizes == [(336, 504), (168, 252), (84, 126), (42, 63)]  # 7 times 48, and down to it


@pytest.mark.parametrize(
    ("side", "size", "levels"),
    [
        (48, (96, 48), 2),  # just twice the smallest level: that one is made
        (48, (96, 47), 1),
        (16, (60, 48), 2),  # pairs so small that no level is
        (16, (60, 47), 1),
        (64, (80, 64), 2),  # half a pair's short side is enough
        (64, (80, 63), 1),
        (64, (60, 130), 1),  # the picture's shorter side counts, upright or wide
    ],
)
def test_a_level_is_made_as_long_as_half_of_it_is_not_too_small(
    tmp_path: Path, side: int, size: tuple[int, int], levels: int
) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    (tmp_path / "heldout.txt").write_text("")
    found = prepare(tmp_path, tmp_path / "made", height=side, width=side + 8, fps=16)["train"]
    assert [len(photo.levels) for photo in found.photos] == [levels]


@pytest.mark.parametrize("size", [(16, 16), (33, 17), (77, 101), (48, 160), (160, 48), (270, 480)])
def test_pairs_of_any_size(footage: dict[str, Footage], size: tuple[int, int]) -> None:
    """Of footage that is smaller, larger and of another shape; every kind that comes."""
    height, width = size
    for seed in range(2 if min(size) > 100 else 8):
        pair = make_footage_pair(seed, footage["train"], frames=5, height=height, width=width)
        assert pair.source.shape == pair.target.shape == (5, height, width, 3)
        assert pair.source.std() > 1


def test_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    """As two cameras leave them."""
    for folder, colour in (("one", "red"), ("other", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (60, 40), colour).save(tmp_path / folder / "IMG_1.png")
    (tmp_path / "heldout.txt").write_text("")
    found = prepare(tmp_path, tmp_path / "made", fps=16, **SIZE)["train"]
    assert [tuple(photo.level(0)[0, 0, 0]) for photo in found.photos] == [(255, 0, 0), (0, 0, 255)]


def test_a_photo_stands_as_a_viewer_shows_it(tmp_path: Path) -> None:
    """A phone held upright writes it lying down, and beside it how to turn it."""
    lying = Image.new("RGB", (80, 60), "red")
    lying.paste("blue", (0, 0, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it right by a quarter
    lying.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "heldout.txt").write_text("")
    (photo,) = prepare(tmp_path, tmp_path / "made", fps=16, **SIZE)["train"].photos
    picture = photo.level(0)[0]
    assert picture.shape == (80, 60, 3)
    assert tuple(picture[0, 30]) == (0, 0, 255)
    assert tuple(picture[79, 30]) == (255, 0, 0)


def test_one_seed_gives_one_pair(footage: dict[str, Footage]) -> None:
    one, two, other = (made(footage["train"], seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.source, two.source)
    np.testing.assert_array_equal(one.target, two.target)
    assert one.instruction == two.instruction
    assert not np.array_equal(one.source, other.source)


def test_whole_files_are_held_out(footage: dict[str, Footage]) -> None:
    seen = {made(footage["train"], seed).origin["material"] for seed in range(30)}
    assert seen == {"a.jpg", "b.png", "c.mp4"}
    assert made(footage["heldout"], 0).origin["material"] == "kept.jpg"
    by_hash = [is_heldout(f"IMG_{n}.jpg") for n in range(800)]
    assert 70 < sum(by_hash) < 130


def test_the_splits_draw_other_pairs_of_one_seed(footage: dict[str, Footage]) -> None:
    """Of the same files, too: what is held out is no training pair with another photo."""
    train = footage["train"]
    heldout = replace(train, split="heldout")
    heldout.__dict__["materials"] = train.materials
    for seed in range(4):
        one, two = made(train, seed).origin, made(heldout, seed).origin
        names = ("material", "kind", "things")
        assert [one[name] for name in names] != [two[name] for name in names]


def test_masks_say_what_differs_and_nothing_to_do_changes_nothing(
    footage: dict[str, Footage],
) -> None:
    kinds = set()
    for seed in range(120):
        pair = made(footage["train"], seed)
        kinds.add(pair.origin["kind"])
        np.testing.assert_array_equal(pair.mask, (pair.source != pair.target).any(-1))
        if pair.origin["kind"] == "nothing":
            assert not pair.mask.any()
        elif pair.origin["kind"] in ("recolor", "replace", "remove", "add"):
            assert pair.mask.any(), pair.instruction
        assert " a o" not in pair.instruction
        assert "{" not in pair.instruction
    assert kinds == {
        "look", "hue", "drain", "recolor", "replace", "remove", "add", "blur_background",
        "dark_background", "gray_background", "nothing",
    }  # fmt: skip


def test_looks_are_what_they_are_called() -> None:
    video = np.random.default_rng(1).uniform(0, 255, (2, 32, 48, 3)).astype(np.float32)
    grey = looks.colourless(video, 1.0, 1.0)
    luma = video @ np.array([0.299, 0.587, 0.114], np.float32)
    np.testing.assert_allclose(grey, np.repeat(luma[..., None], 3, -1), atol=1e-3)
    np.testing.assert_allclose(looks.negative(video, 1.0, 1.0), 255 - video)
    cells = looks.mosaic(video, 1.0, 1.0).reshape(2, 4, 8, 6, 8, 3)
    expected = video.reshape(2, 4, 8, 6, 8, 3).mean(axis=(2, 4), keepdims=True)
    np.testing.assert_allclose(cells, np.broadcast_to(expected, cells.shape), atol=1e-2)
    haze = np.abs(looks.fog(np.zeros_like(video), 1.0, 1.0)).mean(axis=(0, 2, 3))
    assert (np.diff(haze) < 0).all()  # thicker the higher
    lit = looks.light_from(np.full_like(video, 100), "left", 1.0).mean(axis=(0, 1, 3))
    assert (np.diff(lit) < 0).all()


def test_a_hue_is_turned_and_others_stay() -> None:
    video = np.zeros((1, 1, 3, 3), np.float32)
    video[0, 0] = (60, 150, 60), (200, 40, 40), (120, 120, 120)
    weight = regions.hue_weight(video, "green")
    assert weight[0, 0, :, 0] == pytest.approx([1, 0, 0])
    turned = regions.turn_hue(video, weight, "green", "purple")
    np.testing.assert_allclose(turned[0, 0, 1:], video[0, 0, 1:])
    luma, u, v = regions.TO_YUV @ turned[0, 0, 0]
    before, u0, v0 = regions.TO_YUV @ video[0, 0, 0]
    assert luma == pytest.approx(before, abs=0.1)
    angle = np.arctan2(v, u) - np.arctan2(v0, u0)
    wanted = regions.hue_angle("purple") - regions.hue_angle("green")
    assert np.cos(angle - wanted) == pytest.approx(1, abs=1e-4)


def test_what_is_drawn_last_hides_what_is_under_it() -> None:
    def thing(paint: str, x: float) -> Thing:
        return Thing("square", paint, 10, np.array([[x, 24.0]]), np.zeros(1))

    video = np.zeros((1, 48, 80, 3), np.float32)
    under, over = thing("white", 36.0), thing("black", 44.0)
    draw(video, under)
    draw(video, over)
    assert video[0, 24, 30].min() > 200
    assert video[0, 24, 42].max() < 30
    cover = covered([under, over], video.shape)[0, 24, :, 0]
    assert cover[[30, 42, 50]].tolist() == [1, 1, 1]
    assert cover[[5, 70]].tolist() == [0, 0]


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_seen_moves_as_the_drift_says(mirrored: bool) -> None:
    picture = np.zeros((1, 60, 90, 3), np.uint8)
    picture[:, 28:32, 43:47] = 255  # around (45, 30)
    centres = np.array([[45.0, 30.0], [40.0, 32.0], [52.0, 27.0]])
    path = camera.Path(centres, np.full(3, 0.5), np.zeros(3), mirrored)
    view = camera.shoot(picture, np.zeros(3, int), path, 1, 48, 80)
    bright = [np.argwhere(frame[..., 0] > 128).mean(axis=0)[::-1] for frame in view]  # (x, y)
    moved = np.array(bright) - bright[1]
    np.testing.assert_allclose(moved, camera.drift(path), atol=0.5)
    assert np.abs(moved).max() > 10


def test_a_clip_is_seen_from_end_to_end_both_ways_and_never_around() -> None:
    seen = [camera._stretch(20, 9, np.random.default_rng(seed)) for seed in range(200)]
    assert {step for _, step in seen} == {1, 2, -1, -2}
    shown = np.array([first + step * np.arange(9) for first, step in seen])
    assert (shown.min(), shown.max()) == (0, 19)


def test_a_second_edit_is_made_of_what_the_first_one_made(
    footage: dict[str, Footage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one that changes nothing the pair is that of the first alone."""
    monkeypatch.setattr(pair_module, "SECOND_LOOK", 0.0)
    alone = {seed: made(footage["train"], seed) for seed in range(12)}
    same = {n: pair for n, pair in alone.items() if pair.origin["kind"] not in ("look", "nothing")}
    assert any(pair.mask.any() for pair in same.values())
    monkeypatch.setattr(pair_module, "SECOND_LOOK", 1.0)
    monkeypatch.setattr(
        pair_module, "look", lambda scene, kind, video: Edit("leave it so", video, {"kind": kind})
    )
    for seed, pair in same.items():
        both = made(footage["train"], seed)
        assert "leave it so" in both.instruction
        np.testing.assert_array_equal(both.target, pair.target)


@pytest.mark.parametrize("kind", ["blur_background", "dark_background", "gray_background"])
def test_a_background_is_all_but_what_is_named_or_but_every_thing(kind: str) -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 48, 80, 3)).astype(np.float32)
    named, other = (
        Thing(shape, paint, 10, np.array([[x, 24.0]] * 2), np.zeros(2))
        for shape, paint, x in (("square", "red", 20.0), ("circle", "blue", 60.0))
    )
    scene = Filmed(video, [named, other], rng)
    source = scene.render()
    inside, beside = (covered([thing], source.shape)[..., 0] == 1 for thing in scene.things)
    outside = covered(scene.things, source.shape)[..., 0] == 0
    said = set()
    for _ in range(40):
        edit = KINDS[kind].edit(scene, kind, source)
        changed = np.abs(edit.target - source).max(axis=-1) > 0.01
        assert not changed[inside].any()
        assert changed[beside].any() == ("square" in edit.instruction), edit.instruction
        assert changed[outside].mean() > 0.9
        assert (edit.about["color"], edit.about["shape"]) == ("red", "square")
        said.add(edit.instruction)
    assert len(said) == 4


def test_a_piece_of_a_photo_that_is_painted_is_a_photo_no_more() -> None:
    rng = np.random.default_rng(0)
    cutout = rng.integers(0, 256, (24, 24, 3), np.uint8)
    where = np.array([[40.0, 24.0]])
    thing = Thing("square", "patterned", 10, where, np.zeros(1), cutout)
    scene = Filmed(np.zeros((1, 48, 80, 3), np.float32), [thing], rng)
    edit = KINDS["recolor"].edit(scene, "recolor", scene.render())
    painted = Filmed(scene.video, [replace(thing, paint=edit.about["to"], cutout=None)], rng)
    np.testing.assert_array_equal(edit.target, painted.render())


def test_a_view_never_leaves_the_picture(tmp_path: Path) -> None:
    for name, size in (("wide.png", (300, 60)), ("tall.png", (60, 300))):
        Image.new("RGB", size, "white").save(tmp_path / name)
    (tmp_path / "heldout.txt").write_text("")
    white = prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)["train"]
    for seed in range(300):
        rng = np.random.default_rng(seed)
        view, _ = film(white.photos[seed % 2], 9, 48, 80, rng)
        assert view.min() == 255, seed


def test_footage_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FootageError, match="holds no photo"):
        prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(FootageError, match=r"broken\.jpg: cannot be read as a photo"):
        prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)
    (tmp_path / "broken.jpg").unlink()
    Image.new("RGB", (200, 100)).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # twice that is no photo any more
    with pytest.raises(FootageError, match=r"vast\.png: cannot be read as a photo"):
        prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)


def test_a_hue_that_is_there_a_little_is_neither_edited_nor_called_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of blue there is one per cent, of green ten, of the others nothing."""
    monkeypatch.setattr(kinds, "_wording", lambda rng, kind: f"{kind} {{color}}")
    source = np.full((2, 10, 100, 3), 128.0, np.float32)
    source[:, :, :1], source[:, :, 1:11] = regions.HUES["blue"], regions.HUES["green"]
    edited, absent = set(), set()
    for seed in range(60):
        scene = Filmed(source, [], np.random.default_rng(seed))
        edited.add(kinds._by_hue(scene, "hue", source).instruction)
        kind, color = kinds._nothing(scene, "nothing", source).instruction.split()
        absent |= {color} if kind == "hue" else set()
    assert edited == {"hue green"}
    assert absent == set(regions.HUES) - {"green", "blue"}


def test_things_turn_by_the_second_whatever_the_rate() -> None:
    turned = {}
    for fps in (8, 16):
        pan = np.zeros((17, 2))
        drawn = [
            moving("star", "red", (17, 48, 80), fps, pan, np.random.default_rng(seed))
            for seed in range(8)
        ]
        turned[fps] = [(thing.angles[fps] - thing.angles[0]) for thing in drawn]  # in a second
    assert turned[8] == pytest.approx(turned[16])
    assert 0 < np.count_nonzero(turned[8]) < 8  # about half stand still
    assert np.abs(turned[8]).max() <= 0.9


@pytest.mark.parametrize(("height", "width", "unit"), [(48, 96, 48), (96, 48, 32)])
def test_things_are_as_large_in_upright_pictures(height: int, width: int, unit: int) -> None:
    """Of their shorter side, which counts for two thirds where it is the width."""
    shape, pan = (2, height, width), np.zeros((2, 2))
    draws = [np.random.default_rng(seed) for seed in range(30)]
    drawn = [moving("star", "red", shape, 8, pan, draw) for draw in draws]
    radii = np.array([thing.radius for thing in drawn]) / unit
    assert radii.min() == pytest.approx(0.13, abs=0.02)
    assert radii.max() == pytest.approx(0.24, abs=0.02)
    assert resting("star", "red", "in the middle", shape).radius == pytest.approx(0.16 * unit)
    centres = np.concatenate([thing.centres for thing in drawn])
    assert (centres >= 0.2 * unit - 1e-6).all()
    assert (centres <= np.array([width, height]) - 0.2 * unit + 1e-6).all()


def test_a_clip_of_just_as_many_frames_is_filmed_from_its_first_to_its_last() -> None:
    seen = {camera._stretch(9, 9, np.random.default_rng(seed)) for seed in range(60)}
    assert seen == {(0, 1), (8, -1)}
    for length, steps in ((17, {1, -1}), (18, {1, 2, -1, -2})):  # twice as fast from twice as many
        draws = [np.random.default_rng(seed) for seed in range(60)]
        assert {camera._stretch(length, 9, rng)[1] for rng in draws} == steps
    with pytest.raises(UserError, match="a clip of 8 frames is too short for pairs of 9"):
        camera._stretch(8, 9, np.random.default_rng(0))
    assert camera._stretch(1, 9, np.random.default_rng(0)) == (0, 0)  # a photo


def test_clips_that_are_long_enough_are_filmed_beside_photos(footage: dict[str, Footage]) -> None:
    def drawn(frames: int, photos: bool = True) -> list[str]:
        of = replace(footage["train"])
        of.__dict__["photos"] = footage["train"].photos if photos else ()
        rng = np.random.default_rng(0)
        return [pair_module._material(of, frames, rng).name for _ in range(200)]

    share = drawn(24).count("c.mp4") / 200
    assert 0.3 < share < 0.5
    assert set(drawn(25)) == {"a.jpg", "b.png"}
    assert set(drawn(24, photos=False)) == {"c.mp4"}
    with pytest.raises(FootageError, match="the train split holds no photo and no clip of 25 fr"):
        drawn(25, photos=False)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_to_do_and_a_look_get_no_second_edit(
    footage: dict[str, Footage], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(pair_module, "SECOND_LOOK", 1.0)
    for kind, second in (("nothing", False), ("look", False), ("add", True)):
        alone = {name: replace(KINDS[name], weight=float(name == kind)) for name in KINDS}
        monkeypatch.setattr(pair_module, "KINDS", alone)
        pair = made(footage["train"], seed)
        assert ("second" in pair.origin) == second
        assert pair.mask.any() == (kind != "nothing")
