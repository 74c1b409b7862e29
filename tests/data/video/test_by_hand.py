"""data/video, its small decisions: clocks, counts, pixels and places with the answer known."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type

from data.video import Damage, VideoWriter, read_timed
from data.video.decode import decode
from data.video.differs import _of_the_rate
from data.video.output import part_name
from data.video.sound import _Converted
from data.video.source.boxes import index_lie
from data.video.source.clock import Repairs, Segment, make_clock
from data.video.source.rate import find_rate
from data.video.source.survey import _cut_off, survey
from data.video.source.upright import Scaler, Turn
from tests.data.conftest import MakeVideo, numbered


def test_two_clocks_that_take_turns_are_each_known_again() -> None:
    """As of two cameras cut together: one hole was closed, the second clock then goes on."""
    turns = [(0, 10), (1000, 1010), (20, 30), (1020, 1030), (40, 50)]
    picture = [Segment(n, float(start), float(end)) for n, (start, end) in enumerate(turns)]
    clock = make_clock((0, picture), {}, hole=10, step=0.1)
    assert [s.clock_start for s in clock.segments[0]] == pytest.approx([0, 10, 20, 30, 40])
    assert clock.repairs == Repairs(back=0, ahead=1, closed_s=990.0)


@pytest.mark.parametrize(
    ("there", "trimmed", "told"),
    [
        (90, 10, None),  # an edit list leaves the others out
        (88, 10, None),
        (80, 10, "80 of 90 frames are there"),
        (97, 0, "97 of 100 frames are there"),
        (98, 0, None),
    ],
)
def test_a_file_is_cut_off_if_more_than_a_few_of_its_shown_frames_are_missing(
    there: int, trimmed: int, told: str | None
) -> None:
    stream: Any = SimpleNamespace(frames=100)
    scan: Any = SimpleNamespace(count=there, trimmed=trimmed)
    assert _cut_off(None, stream, scan, 4.0) == told


@pytest.mark.parametrize(("promised", "missing"), [(20, 4), (16, 0), (10, 0)])
def test_only_frames_that_did_not_come_are_missing(
    make_video: MakeVideo, promised: int, missing: int
) -> None:
    source, damage = make_video(), Damage(missing=1)
    found = replace(survey(source), packets=promised)
    assert len(list(decode(source, found, damage=damage))) == 16
    assert damage.missing == 1 + missing


def test_a_picture_shrinks_by_the_mean_of_what_it_covers() -> None:
    """And grows smoothly: between two pixels lies what lies between them."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    small = Scaler((16, 16), Fraction(1))(frame)
    means = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - means).max() < 3
    ramp = np.repeat(np.linspace(20, 230, 8).astype(np.uint8)[None, :, None], 8, axis=0)
    coarse = av.VideoFrame.from_ndarray(np.repeat(ramp, 3, axis=2), format="rgb24")
    steps = np.diff(Scaler((64, 64), Fraction(1))(coarse)[32, 8:-8, 0].astype(int))
    assert steps.min() >= 1
    assert steps.max() <= 7


@pytest.mark.parametrize("page", [0, 255])
def test_the_page_shows_as_far_as_a_place_is_transparent(page: int) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., :3], pixels[:, :, 3] = 100, [255, 0, 51]
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
    shown = Scaler(None, Fraction(1), page=page)(frame)
    assert shown[0, :, 1].tolist() == [100, page, 20 + page * 4 // 5]


@pytest.mark.parametrize(
    ("places", "constant"),
    [
        (range(100), True),
        ([n for n in range(101) if n != 50], True),  # one frame was dropped
        ([*range(45), *range(55, 100)], True),  # ten of a hundred
        ([*range(45), *range(56, 100)], False),
        ([n for n in range(100) if n % 3 != 1], False),  # of a film whose doubles were left out
        ([*range(50), *range(100, 150)], False),
    ],
)
def test_a_rate_with_more_than_a_few_places_left_out_is_not_constant(
    places: Sequence[int], constant: bool
) -> None:
    times = np.array(places) / 24
    found = find_rate(times, [Fraction(24)], Fraction(1, 90_000))
    assert found is not None
    assert (found.fps, found.grid, found.constant, found.bulk) == (24, True, constant, 24)


@pytest.mark.parametrize(
    ("off", "tick", "grid"),
    [
        (0.019, Fraction(1, 90_000), True),  # a clock that is read a little late, in fine stamps
        (0.021, Fraction(1, 90_000), False),
        (0.19, Fraction(1, 100), True),  # stamps of a hundredth round by a quarter of a frame
        (0.21, Fraction(1, 100), False),
    ],
)
def test_stamps_may_lie_beside_their_places(off: float, tick: Fraction, grid: bool) -> None:
    places = np.arange(40.0)
    places[[11, 23]] += off
    found = find_rate(places / 24, [Fraction(24)], tick)
    assert found is not None
    assert found.grid is grid


def test_stamps_lie_beside_a_place_of_most_and_not_of_the_first() -> None:
    """Which is as late here as another one is early."""
    places = np.arange(40.0)
    places[[0, 11]] += [0.015, -0.015]
    found = find_rate(places / 24, [Fraction(24)], Fraction(1, 90_000))
    assert found is not None
    assert found.grid


@pytest.mark.parametrize(
    ("constant", "rate", "told"),
    [
        (True, 24, ""),
        (True, 12, "it is constant 24"),
        (False, 24, "it is variable, on average 24"),  # most frames lie elsewhere
    ],
)
def test_a_rate_becomes_another_also_from_one_that_varies_around_it(
    constant: bool, rate: int, told: str
) -> None:
    found: Any = SimpleNamespace(rate=SimpleNamespace(constant=constant), fps=Fraction(24))
    line = _of_the_rate(found, Fraction(rate))
    assert bool(line) == bool(told)
    assert line.endswith(told)


def test_frames_of_one_tick_are_written_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    times = [Fraction(0), Fraction(1, 200), Fraction(1, 100), Fraction(1, 2)]
    with VideoWriter(path, 64, 48, 10) as out:
        out.write(numbered(4), times)
    assert [time for time, _ in read_timed(path)] == [Fraction(n, 10) for n in (0, 1, 2, 5)]


def test_sound_that_overlaps_by_half_or_more_gives_way_to_what_came_first() -> None:
    """Frames of a second, in parts of a file that overlap: an encoder would put all in a row."""
    heard: list[float] = []
    lane: Any = _Converted.__new__(_Converted)
    lane.carrier = SimpleNamespace(found=SimpleNamespace(origin=Fraction(0)))
    lane.added, lane.output = SimpleNamespace(encode=float), SimpleNamespace(mux=heard.append)
    lane._end = -math.inf

    class Frame(SimpleNamespace):
        def __float__(self) -> float:
            return float(self.pts * self.time_base)

    for start in (0.0, 1.0, 1.4, 1.6, 2.0, 2.2, 2.5):
        frame = Frame(
            pts=round(start * 100), time_base=Fraction(1, 100), samples=100, sample_rate=100
        )
        lane.take(SimpleNamespace(decode=lambda frame=frame: [frame]))
    assert heard == [0.0, 1.0, 1.6, 2.2]


def test_two_processes_do_not_write_one_part() -> None:
    part = part_name(Path("folder") / "out.mp4")
    assert (part.parent, part.suffix) == (Path("folder"), ".mp4")
    assert str(os.getpid()) in part.name


@pytest.mark.parametrize("wide", [False, True])
def test_an_index_is_followed_through_boxes_of_either_size(wide: bool) -> None:
    def box(kind: bytes, content: bytes) -> bytes:
        if wide:
            return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
        return struct.pack(">I4s", 8 + len(content), kind) + content

    content = box(b"stsz", struct.pack(">3I", 0, 1, 150_000_000))
    for kind in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        content = box(kind, content)
    found = index_lie(io.BytesIO(struct.pack(">I4s", 8, b"ftyp") + content))
    assert str(found).startswith("its index states 150000000 frames")


def test_a_matrix_that_says_nothing_turns_nothing() -> None:
    frame: Any = SimpleNamespace(side_data={Type.DISPLAYMATRIX: bytes(36)})
    picture = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(Turn(frame)(picture), picture)
