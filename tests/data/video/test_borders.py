"""data/video, borders: how many parts, clocks, bytes and ticks still count, of made-up ones."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.video import VideoError, VideoWriter, decode, sound
from data.video.source import survey as survey_module
from data.video.source.clock import Segment, _place_beside, make_clock
from data.video.source.survey import survey
from tests.data.conftest import MakeVideo
from tests.data.video.test_times_by_hand import TENTH, of_a_file


@pytest.mark.parametrize(("overlap", "back"), [(1.0, 0), (1.1, 1)])
def test_parts_may_overlap_by_as_much_as_frames_are_reordered(overlap: float, back: int) -> None:
    parts = [Segment(0, 0.0, 2.0), Segment(1, 2.0 - overlap, 4.0)]
    assert make_clock((0, parts), {}, hole=10.0, step=0.1).repairs.back == back


@pytest.mark.parametrize(("clocks", "holes"), [(4, 3), (5, 9)])
def test_the_last_four_clocks_are_known_again(clocks: int, holes: int) -> None:
    """Of cameras that are cut together in turns, each twice: with more of them none is."""
    parts = [
        Segment(n, 1000.0 * (n % clocks) + n, 1000.0 * (n % clocks) + n + 1)
        for n in range(2 * clocks)
    ]
    found = make_clock((0, parts), {}, hole=10.0, step=0.1).repairs
    assert found.back + found.ahead == holes


@pytest.mark.parametrize(("parts", "ahead"), [(200, 0), (201, 200)])
def test_stamps_that_start_anew_again_and_again_say_nothing(parts: int, ahead: int) -> None:
    """Not even where nothing is missing: they are then put one after the other."""
    picture = [Segment(n, 2.0 * n, 2.0 * n + 1) for n in range(parts)]
    assert make_clock((0, picture), {}, hole=10.0, step=0.1).repairs.ahead == ahead


def test_each_part_of_a_sound_goes_with_its_own_part_of_the_picture() -> None:
    picture = [Segment(n, 100.0 * n, 100.0 * n + 1, -float(n)) for n in range(4)]
    sound_parts = [Segment(n, 100.0 * n, 100.0 * n + 1) for n in range(4)]
    _place_beside(sound_parts, picture, 10.0)
    assert [part.shift for part in sound_parts] == [0, -1, -2, -3]


@pytest.mark.parametrize(
    ("turn", "aspect", "resized"), [(0, 1, False), (90, 1, False), (0, 2, True)]
)
def test_a_turned_picture_keeps_its_pixels(
    make_video: MakeVideo, turn: int, aspect: int, resized: bool
) -> None:
    path = make_video(rotation=turn, pixel_aspect=Fraction(aspect))
    assert survey(path).look.resized is resized


@pytest.mark.parametrize(("beside", "shift"), [(7, -7.0), (8, -800.0)])
def test_sound_is_looked_for_beside_the_next_eight_parts_of_the_picture(
    beside: int, shift: float
) -> None:
    """Else it begins with the picture."""
    picture = [Segment(n, 100.0 * n, 100.0 * n + 1, -float(n)) for n in range(9)]
    sound = [Segment(0, 100.0 * beside, 100.0 * beside + 1)]
    _place_beside(sound, picture, 10.0)
    assert sound[0].shift == shift


@pytest.mark.parametrize(("megabytes", "taken"), [(300, 3), (100, 3), (64, 5), (16, 17), (1, 17)])
def test_few_large_frames_wait_for_their_stamps(megabytes: int, taken: int) -> None:
    """A quarter of a gigabyte of them, but two; sixteen at most. Then each takes the earliest."""
    given: list[Any] = []

    def frames() -> Any:
        plane = SimpleNamespace(buffer_size=megabytes << 19)
        for stamp in reversed(range(20)):
            given.append(SimpleNamespace(pts=stamp, dts=None, time_base=TENTH, planes=[plane] * 2))
            yield given[-1]

    ordered = decode._in_order(frames(), of_a_file(reorder=16))
    assert next(ordered) == ((20 - taken) * TENTH, given[0])
    assert len(given) == taken


@pytest.mark.parametrize(
    "other",
    [{"width": 5}, {"height": 5}, {"format": "gray"}, {"colorspace": 5}, {"color_range": 2}],
)
def test_a_deinterlacer_takes_frames_of_one_kind(other: dict[str, Any]) -> None:
    def frame(**about: Any) -> Any:
        about = {"width": 4, "height": 2, "format": "x", "colorspace": 1, "color_range": 1} | about
        return SimpleNamespace(**about | {"format": SimpleNamespace(name=about["format"])})

    made: Any = decode._Deinterlacer.__new__(decode._Deinterlacer)
    made._kind = decode._kind(frame())
    assert made.takes(frame())
    assert not made.takes(frame(**other))


def test_a_last_frame_is_shown_for_a_tick_at_least() -> None:
    made: Any = SimpleNamespace(fps=Fraction(300), _tick=Fraction(1, 100), _found=None)
    assert VideoWriter._end(made, 7) == (8, False)


@pytest.mark.parametrize(
    ("stated", "step"),
    [
        ((Fraction(50), None, Fraction(25)), Fraction(1, 50)),
        ((None, Fraction(30), Fraction(25)), Fraction(1, 30)),
        ((Fraction(1, 2), Fraction(2000), Fraction(1)), Fraction(1)),  # no rates of a video
        ((None, Fraction(0), Fraction(1001)), Fraction(1, 25)),
    ],
)
def test_until_frames_are_known_a_frame_is_what_the_file_states(
    monkeypatch: pytest.MonkeyPatch, stated: tuple[Fraction | None, ...], step: Fraction
) -> None:
    names = ("average_rate", "guessed_rate", "base_rate")
    stream = SimpleNamespace(**dict(zip(names, stated, strict=True)))
    container = SimpleNamespace(streams=SimpleNamespace(audio=[]))

    def scanned(*given: Any) -> None:
        assert given == (container, stream, [], float(step), "x")
        raise VideoError("as told")

    monkeypatch.setattr(survey_module, "open_video", lambda path: nullcontext(container))
    monkeypatch.setattr(survey_module, "video_stream", lambda *_: stream)
    monkeypatch.setattr(survey_module, "scan_packets", scanned)
    with pytest.raises(VideoError, match="as told"):
        survey_module._survey("x")


@pytest.mark.parametrize(
    ("said", "length"), [(0.0, Fraction(1, 8)), (0.5, Fraction(1, 2)), (999.0, Fraction(30))]
)
def test_a_last_frame_is_shown_as_long_as_its_packet_says_else_as_the_others(
    monkeypatch: pytest.MonkeyPatch, make_video: MakeVideo, said: float, length: Fraction
) -> None:
    path = make_video("in.mkv", fps=8)
    real = survey_module.scan_packets
    monkeypatch.setattr(
        survey_module, "scan_packets", lambda *given: replace(real(*given), length=said)
    )
    found = survey_module._survey(path)
    assert (found.length, found.end) == (length, Fraction(15, 8) + length)


def test_a_file_is_looked_at_once_until_it_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its size, its age, or where it lies: one may be put in its place with the same dates."""
    looked: list[Any] = []
    monkeypatch.setattr(survey_module, "_survey", lambda path: looked.append(path) or len(looked))
    path, other = tmp_path / "a", tmp_path / "b"

    def found(size: int, age: int) -> Any:
        path.write_bytes(bytes(size))
        os.utime(path, ns=(age, age))
        return survey(path), survey(str(path))

    assert [found(3, 7), found(3, 7), found(4, 7), found(4, 8)] == [(1, 1), (1, 1), (2, 2), (3, 3)]
    other.write_bytes(bytes(4))
    os.utime(other, ns=(8, 8))
    other.replace(path)
    assert survey(path) == 4


def test_a_source_whose_tracks_cannot_be_taken_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody interrupts: files are not left open until they are collected."""
    closed: list[bool] = []
    opened = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(sound, "open_video", lambda source: opened)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sound, "_lane", fails)
    plan: Any = SimpleNamespace(tracks=[SimpleNamespace(index=0)])
    nothing: Any = None
    with pytest.raises(KeyboardInterrupt):
        sound.Carrier("x", nothing, plan, nothing, nothing)
    assert closed == [True]


@pytest.mark.parametrize(
    ("container", "last", "wanted"),
    [("mp4", 2, [2, 5]), ("mov", 9, [2, 9]), ("matroska", 9, [2, 5]), ("mp4", 0, [2, 5])],
)
def test_a_track_lasts_as_long_as_what_is_shown_last(
    container: str, last: int, wanted: list[int]
) -> None:
    """Which in the order of decoding may come before another: an MP4 counts lengths in that."""
    muxed: list[Any] = []
    output = SimpleNamespace(format=SimpleNamespace(name=container), mux=muxed.extend)
    made: Any = SimpleNamespace(_lengths={0: 5, 1: 2, 2: 3}, _output=output)
    VideoWriter._mux(made, [SimpleNamespace(pts=n, duration=0) for n in (1, 0)], last)
    assert [packet.duration for packet in muxed] == wanted
    assert made._lengths == {2: 3}
