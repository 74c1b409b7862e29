from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.bench import clip as clip_module
from data.bench.cases import CASES, CUT_AT, FPS, VERSION, Case
from data.bench.clip import OWN_FOOTAGE, BenchClip, _pool, make_clip, published_checksums
from data.bench.scene import Scene, Shot, on_canvas
from data.drawing import SHAPES
from data.footage import regions
from data.footage.camera import Path as Camera
from data.footage.material import Footage, FootageError, Material, prepare, read_heldout
from data.footage.objects import PAINTS, Thing
from data.kinds import COLOURS, Figure
from data.synthetic import is_heldout
from infra.runtime.errors import UserError

SMALL = (64, 112)


@pytest.fixture(scope="session")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Footage:
    folder = tmp_path_factory.mktemp("bench-footage")
    return prepare(OWN_FOOTAGE, folder, height=128, width=224, fps=FPS)["heldout"]


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def clip(name: str, footage: Footage | None = None) -> BenchClip:
    return make_clip(case(name), footage, SMALL)


def test_the_benchmark_is_what_its_page_says() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 120
    assert Counter(case.half for case in CASES) == {"drawn": 60, "natural": 60}
    assert len({(case.half, case.kind) for case in CASES}) == 20
    assert set(Counter(case.speed for case in CASES).values()) == {40}
    traits = Counter(trait for case in CASES for trait in case.traits)
    assert (traits["occluded"], traits["scene cut"], traits["60 s"]) == (17, 14, 4)
    assert {case.frames / FPS for case in CASES if case.long} == {60}
    assert sum(case.kind == "nothing" for case in CASES) == 15
    assert set(published_checksums()) == {case.name for case in CASES}


# Every backdrop of the shipped footage, every way of changing a picture, both halves.
SAMPLED = [
    "drawn-01-recolor", "drawn-16-reshape", "drawn-34-stripes", "drawn-45-outline",
    "drawn-51-nothing", "natural-01-tone", "natural-10-fog", "natural-14-weather",
    "natural-18-style", "natural-23-light", "natural-27-hue", "natural-32-recolor",
    "natural-40-remove", "natural-47-add", "natural-49-background", "natural-52-two-edits",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_clips_are_the_published_ones(name: str, footage: Footage) -> None:
    assert make_clip(case(name), footage).checksum() == published_checksums()[name]


def changed(clip: BenchClip) -> np.ndarray:
    """Where source and truth differ, bool [F, H, W]."""
    return np.asarray((clip.source != clip.truth).any(axis=-1))


def test_what_is_added_stays_where_it_is_on_the_screen(footage: Footage) -> None:
    named = next(one for one in CASES if one.what == "add" and one.speed == "fast")
    made = make_clip(named, footage, SMALL)
    still = np.eye(2, 3)
    assert np.array_equal(made.edited, np.broadcast_to(still, made.edited.shape))
    assert np.abs(made.camera - still).max(axis=(1, 2)).min() > 0.1  # as the camera does not


def test_a_minute_is_made_as_its_parts_are(footage: Footage) -> None:
    """The stretches in which a long clip is made leave no seam: its motion goes on across them."""
    made = make_clip(case("natural-30-recolor"), footage, (32, 48))
    assert len(made.source) == 960
    assert made.cuts == (238, 476, 714, 952)
    steps = np.abs(made.source[1:].astype(int) - made.source[:-1]).mean(axis=(1, 2, 3))
    inner = np.delete(steps, [cut - 1 for cut in made.cuts])
    assert steps[[cut - 1 for cut in made.cuts]].min() > inner.max()


@pytest.mark.parametrize("name", ["drawn-53-nothing", "natural-57-nothing"])
def test_nothing_to_do_is_nothing(name: str, footage: Footage) -> None:
    made = clip(name, footage)
    assert np.array_equal(made.source, made.truth)
    assert not changed(made).any()


def test_what_is_to_be_left_alone_is_not_in_the_picture() -> None:
    for number in range(50, 60):
        named = case(f"drawn-{number}-nothing")
        made = make_clip(named, None, SMALL)
        color = next(word for word in made.instruction.split() if word in COLOURS)
        away = np.abs(made.source.astype(int) - COLOURS[color]).sum(axis=-1)
        assert away.min() > 30, made.instruction


def test_drawn_edits_are_of_combinations_that_no_training_shows() -> None:
    for one in CASES:
        if one.half == "drawn" and one.kind in ("recolor", "reshape") and not one.long:
            made = make_clip(one, None, (16, 32))
            words = made.instruction.split()
            color = next(n for n, word in enumerate(words) if word in COLOURS)
            assert is_heldout(one.kind, words[color + 1], words[color], words[-1])


@pytest.mark.parametrize("name", ["drawn-04-recolor", "natural-31-recolor", "natural-40-remove"])
def test_something_hides_the_edited_thing_in_the_middle(name: str, footage: Footage) -> None:
    area = changed(clip(name, footage)).mean(axis=(1, 2))
    assert case(name).occluded
    assert area.argmin() in range(18, 40)
    assert area.min() < 0.85 * max(area[0], area[-1])


@pytest.mark.parametrize("name", ["drawn-02-recolor", "natural-11-fog", "natural-42-remove"])
def test_a_scene_cut_changes_the_whole_picture(name: str, footage: Footage) -> None:
    made = clip(name, footage)
    steps = np.abs(made.source[1:].astype(int) - made.source[:-1]).mean(axis=(1, 2, 3))
    assert made.cuts == (CUT_AT,)
    assert steps.argmax() == CUT_AT - 1
    assert np.flatnonzero(np.isnan(made.camera).any(axis=(1, 2))).tolist() == [CUT_AT - 1]
    assert changed(made)[CUT_AT:].any()
    assert changed(made)[:CUT_AT].any()


@pytest.mark.parametrize(("size", "unit"), [((64, 128), 64), ((128, 64), 128 / 3)])
def test_things_are_as_large_in_upright_clips(size: tuple[int, int], unit: float) -> None:
    """Shares of the shorter side, which counts for two thirds where it is the width."""
    way = np.zeros((2, 2)), np.zeros(2)
    for half, kind in (("natural", Thing), ("drawn", Figure)):
        of = next(one for one in CASES if one.half == half)
        thing = clip_module._thing(of, "star", "red", 0.2, way, size)
        assert isinstance(thing, kind)
        assert thing.radius == pytest.approx(0.2 * unit)


def test_faster_clips_move_more() -> None:
    def pace(speed: str) -> float:
        of = [one for one in CASES if one.half == "drawn" and one.speed == speed and not one.long]
        steps = [np.abs(np.diff(make_clip(one, None, (32, 64)).source.astype(int), axis=0)).mean()
                 for one in of[:6] if not one.cut]  # fmt: skip
        return float(np.mean(steps))

    still, slow, fast = (pace(speed) for speed in ("still", "slow", "fast"))
    assert still < 0.5 * slow
    assert 1.5 * slow < fast


def test_shipped_footage_is_licensed_and_kept_from_training() -> None:
    files = {path.name for path in OWN_FOOTAGE.iterdir() if path.suffix in (".jpg", ".mp4")}
    assert read_heldout(OWN_FOOTAGE) == files
    licences = (OWN_FOOTAGE / "LICENCES.md").read_text()
    assert all(name in licences for name in files)
    training = Path(OWN_FOOTAGE).parents[1] / "footage"
    listed = read_heldout(training)
    assert listed is not None
    assert files <= listed
    assert sum(path.stat().st_size for path in OWN_FOOTAGE.iterdir()) < 6e6


def test_clips_do_not_depend_on_the_order_of_a_folder(footage: Footage) -> None:
    case = next(case for case in CASES if case.half == "natural")
    turned: Any = SimpleNamespace(materials=footage.materials[::-1])
    pools = [_pool(case, found) for found in (footage, turned)]
    assert [m.name for m in pools[0]] == [m.name for m in pools[1]]
    assert len(pools[0]) > 1


def test_without_footage_a_natural_clip_says_what_is_missing() -> None:
    with pytest.raises(FootageError, match="natural-10-fog is filmed from footage"):
        clip("natural-10-fog")


def test_a_stretch_is_a_part_of_the_whole(footage: Footage) -> None:
    """Frames made in two goes are those made in one, over a cut too."""
    from data.bench.clip import _names, _shots

    one = case("natural-32-recolor")
    rng = np.random.default_rng(0)
    scene = Scene(tuple(_shots(one, footage, SMALL, _names(one, rng), rng)), *SMALL)
    whole = scene.render(20, 40)
    assert np.array_equal(whole, np.concatenate([scene.render(20, 31), scene.render(31, 40)]))


def test_an_empty_folder_or_one_without_colour_says_what_is_missing(tmp_path: Path) -> None:
    empty: Any = SimpleNamespace(materials=())
    with pytest.raises(
        FootageError, match=r"natural-10-fog is filmed from footage, and none is he"
    ):
        clip("natural-10-fog", empty)
    made = {}
    for name, colour in (("g", (90, 90, 90)), ("b", (200, 40, 40))):
        path = tmp_path / f"{name}.npy"
        np.save(path, np.full((1, 9, 16, 3), colour, np.uint8))
        made[name] = Material(name, "photo", (str(path),))
    for name in ("natural-06-black-and-white", "natural-26-hue", "natural-50-background"):
        needy = case(name)
        found: Any = SimpleNamespace(materials=(made["g"],))
        with pytest.raises(FootageError, match=f"{name} needs footage in colour, and what is held"):
            _pool(needy, found)
        found = SimpleNamespace(materials=tuple(made.values()))
        assert [material.name for material in _pool(needy, found)] == ["b"]
    assert [material.name for material in _pool(case("natural-10-fog"), found)] == ["b", "g"]


def test_checksums_that_are_damaged_or_of_other_cases_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checksums.json"
    monkeypatch.setattr(clip_module, "CHECKSUMS", path)
    read = published_checksums.__wrapped__
    for content in (None, "{"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=r"checksums cannot be read \(.*restore the file"):
            read()
    path.write_text(json.dumps({"version": VERSION + 1, "clips": {}}))
    with pytest.raises(ValueError, match=f"is of version {VERSION + 1}, the cases of {VERSION}"):
        read()
    path.write_text(json.dumps({"version": VERSION, "clips": {"a": "b"}}))
    assert read() == {"a": "b"}


def test_a_checksum_is_of_words_and_both_videos_to_the_pixel() -> None:
    video = np.zeros((2, 3, 4, 3), np.uint8)
    other = video.copy()
    other[1, 2, 3, 2] = 1
    still = np.eye(2, 3)[None]
    plain = BenchClip(case("drawn-01-recolor"), "paint it", video, video, still, still, ())
    changed = [{"instruction": "paint"}, {"source": other}, {"truth": other}]
    sums = {replace(plain, **change).checksum() for change in changed}  # type: ignore[arg-type]
    assert len({plain.checksum(), *sums}) == 4
    assert len(plain.checksum()) == 16
    assert replace(plain, edited=still + 1, cuts=(1,)).checksum() == plain.checksum()


def test_where_what_is_seen_was_in_the_frame_before() -> None:
    """A view pans by (4, 2) pixels of a backdrop at 2 a pixel; its thing moves and turns."""
    frames = 3
    centres = np.array([[50.0, 40.0], [54.0, 42.0], [58.0, 44.0]])
    path = Camera(centres, np.full(frames, 2.0), np.zeros(frames), mirrored=False)
    turns = np.array([0.0, np.pi / 2, np.pi / 2])
    things = (
        Thing("star", "red", 3, np.zeros((frames, 2)), np.zeros(frames)),
        Thing("star", "red", 3, np.array([[10.0, 8.0], [13.0, 6.0], [13.0, 9.0]]), turns),
    )
    pictures, shown = np.zeros((1, 80, 100, 3), np.uint8), np.zeros(frames, int)
    shot = Shot(pictures, shown, 1, path, things, edited=1)
    scene = Scene((shot, shot.cut(0, 2)), 16, 24)
    camera, thing = scene.camera_motion(), scene.thing_motion()
    assert thing is not None
    panned = np.array([[1, 0, 2], [0, 1, 1]])  # what comes to the left was on the right of it
    np.testing.assert_allclose(camera[[0, 1, 3]], [panned] * 3, atol=1e-9)
    assert np.isnan(camera[2]).all()
    assert np.isnan(thing[2]).all()
    np.testing.assert_allclose(thing[0] @ (13, 6, 1), (10, 8), atol=1e-9)  # the middle
    np.testing.assert_allclose(thing[0] @ (13, 7, 1), (11, 8), atol=1e-9)  # a quarter turn back
    np.testing.assert_allclose(thing[1], [[1, 0, 0], [0, 1, -3]], atol=1e-9)
    assert (scene.frames, scene.cuts) == (5, (3,))
    assert [part.frames for part in scene.stretch(1, 4)] == [2, 1]
    assert [part.frames for part in scene.stretch(3, 5)] == [2]
    assert Scene((replace(shot, edited=None),), 16, 24).thing_motion() is None


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("natural-30-recolor", "thing"), ("natural-35-replace", "thing"),
        ("drawn-34-stripes", "thing"), ("drawn-45-outline", "thing"),
        ("drawn-16-reshape", "thing"), ("natural-40-remove", "camera"),
        ("natural-10-fog", "camera"), ("natural-47-add", "screen"),
        ("natural-52-two-edits", "camera"),
    ],
)  # fmt: skip
def test_what_is_edited_moves_with_what_it_is_on(name: str, of: str) -> None:
    camera, thing = np.full((2, 2, 3), 7.0), np.full((2, 2, 3), 5.0)
    camera[1] = np.nan  # a cut
    scene: Any = SimpleNamespace(thing_motion=lambda: thing)
    found = clip_module._edited_motion(case(name), scene, camera)
    still = np.stack([np.eye(2, 3), np.full((2, 3), np.nan)])
    wanted = {"thing": thing, "camera": camera, "screen": still}[of]
    np.testing.assert_array_equal(found, wanted)


def test_a_clip_holds_what_it_names_and_nothing_else_that_is_like_it() -> None:
    """Else it would not be known which one is meant. Of every case, drawn on a plain backdrop."""
    size, unit = (32, 60), 32
    for number, one in enumerate(CASES):
        rng = np.random.default_rng(number)
        named = clip_module._names(one, rng)
        shot = on_canvas(size, 9, one.speed, rng)
        filled = clip_module._filled(shot, one, size, named, rng)
        things: list[Any] = list(filled.things)
        paints = [thing.color if one.half == "drawn" else thing.paint for thing in things]
        about = [named["shape"], named["color"]]
        asked = one.what.split()[0] in clip_module.THING_EDITS or one.kind == "background"
        assert (filled.edited is not None) == asked, one.name
        if filled.edited is not None:
            thing = things.pop(filled.edited)
            assert [thing.shape, paints.pop(filled.edited)] == about, one.name
            assert 0.17 * unit <= thing.radius <= 0.24 * unit
        assert not set(about) & {*paints, *(thing.shape for thing in things)}, one.name
        assert all(thing.radius < 0.19 * unit for thing in things)
        if one.occluded:  # in the middle of the clip the last one is where the one before it is
            over, under = filled.things[-1], filled.things[-2]
            np.testing.assert_allclose(over.centres[4], under.centres[4])
            passing = np.hypot(*np.diff(over.centres, axis=0).T) * FPS  # pixels a second
            np.testing.assert_allclose(passing, 2.2 * under.radius)
        assert len(things) <= 1 + one.occluded
        assert things or one.kind != "nothing", one.name


def test_what_is_asked_for_is_another_thing_than_there_is() -> None:
    asked_for: dict[str, set[str]] = {}
    for number, one in enumerate(CASES * 4):
        named = clip_module._names(one, np.random.default_rng(number))
        paints = set(PAINTS if one.half == "natural" else COLOURS)
        others = SHAPES.keys() - {named["shape"]}
        may = {
            "replace": others, "reshape": others,
            "remove": {""}, "stripes": {"white", "black"},
            "outline": {"white", "black", *paints} - {named["color"]},
        }  # fmt: skip
        what = one.what.split()[0]
        assert named["to"] in may.get(what, paints - {named["color"]}), one.name
        asked_for.setdefault(what, set()).add(named["to"])
        assert named["color"] in paints
        asked = "recolor" if one.kind == "nothing" else one.kind
        combination = (asked, named["shape"], named["color"], named["to"])
        assert one.half == "natural" or is_heldout(*combination), one.name
    for what in ("stripes", "outline"):
        assert asked_for[what] >= {"white", "black"}


def test_hues_are_asked_for_by_how_much_there_is_of_them() -> None:
    picture = np.full((1, 40, 70, 3), 128, np.uint8)
    end = 0
    for n, hue in enumerate(regions.HUES, 1):  # a column of the first, two of the next, ...
        picture[0, :, end : end + n] = regions.HUES[hue]
        end += n
    still = np.zeros(3)
    path = Camera(np.tile([35.0, 20.0], (3, 1)), still + 1, still, mirrored=False)
    scene = Scene((Shot(picture, np.zeros(3, int), 1, path),), 40, 70)
    shares = {hue: regions.hue_weight(picture.astype(float), hue).mean() for hue in regions.HUES}
    order = sorted(shares, key=shares.__getitem__)
    given = {"color": "white", "to": "black", "place": "there"}
    for what, kind, color in (
        ("hue", "hue", order[-1]),
        ("drain", "hue", order[-1]),
        ("nothing hue", "nothing", order[0]),
        ("nothing", "nothing", "white"),
        ("recolor", "recolor", "white"),
    ):
        one = replace(CASES[-1], what=what, kind=kind)
        for seed in range(8):
            found = clip_module._hue_names(one, scene, given, np.random.default_rng(seed))
            assert (found["color"], found["place"]) == (color, "there")
            assert found["to"] != color
