"""data/video, times: clocks, rates, orders and ends of packets and frames that are only made up."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.video import Damage, VideoError, VideoInfo, VideoWriter, decode, probe, reading
from data.video.source.clock import (
    Clock,
    Repairer,
    Repairs,
    Runs,
    Segment,
    SoundSegments,
    make_clock,
    picture_segments,
)
from data.video.source.rate import Rate, find_rate
from data.video.source.survey import _cut_off, _lead, _stated_end, _tick, survey
from tests.data.conftest import MakeVideo

TENTH = Fraction(1, 10)


def packet(pts: int | None, dts: int | None = None, duration: int | None = None) -> Any:
    return SimpleNamespace(pts=pts, dts=dts, duration=duration)


def test_a_run_ends_where_decoding_goes_back_by_more_than_a_second() -> None:
    runs = Runs(TENTH)
    stamps = [(0, 0), (99, 10), (20, None), (0, 12), (5, 10), (None, None), (30, 9), (9, 8), (0, 0)]
    assert [runs.feed(packet(*both)) for both in stamps] == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_a_picture_is_cut_where_nothing_is_stamped_for_longer_than_a_hole() -> None:
    times = np.array([0.2, 0.0, 0.1, 1.2, 5.0, 5.1, 0.0, 0.1])
    found = picture_segments(times, np.array([0] * 6 + [1] * 2), hole=1.0, step=0.1)
    spans = [(s.run, s.start, s.end) for s in found]
    assert spans == [(0, 0.0, pytest.approx(1.3)), (0, 5.0, 5.1 + 0.1), (1, 0.0, 0.2)]


def test_sound_is_cut_where_it_is_silent_for_longer_than_a_hole() -> None:
    sound = SoundSegments(TENTH, hole=3.0)
    for stamps in [
        (0, 0, 10), (10, 10, 10), (None, None, 5), (5, 5, 10),  # the last ends before the others
        (50, 50, 10),  # 3 s after them
        (91, 91, 200),  # and more; its length is not believed
        (0, 0, None),  # anew
    ]:  # fmt: skip
        sound.feed(packet(*stamps))
    spans = [(s.run, s.start, s.end) for s in sound.segments]
    assert spans == [(0, 0.0, 6.0), (0, pytest.approx(9.1), pytest.approx(12.1)), (1, 0.0, 0.0)]


SHIFTED = {7: [Segment(0, 0, 1), Segment(0, 5, 6, -3.0), Segment(1, 0, 1, 10.0)]}


def test_a_stamp_is_moved_with_its_segment_from_its_first_on() -> None:
    clock = Clock(hole=1.0, segments=SHIFTED)
    times, runs = np.array([0, 0.5, 5, 5.5, -0.2, 0, 0.5]), np.array([0, 0, 0, 0, 0, 1, 1])
    assert clock.shifts(7, times, runs).tolist() == [0, 0, -3, -3, 0, 10, 10]
    assert not clock.shifts(8, times, runs).any()
    repairer = Repairer(TENTH, SHIFTED[7])
    moved = []
    for both in [(0, 0), (49, 44), (50, 45), (None, 55), (55, None), (3, 3), (0, 50), (9, 0)]:
        given = packet(*both)
        repairer.repair(given)
        moved.append((given.pts, given.dts))
    assert moved == [
        (0, 0), (49, 44), (20, 15), (None, 25), (25, None), (103, 103), (100, 150),
        (9, 0),  # of a run that nobody knows of
    ]  # fmt: skip
    stream: Any = SimpleNamespace(time_base=TENTH, index=7)
    assert clock.reader(stream)._shifts == repairer._shifts


@pytest.mark.parametrize(
    ("picture", "sounds", "repairs", "places"),
    [
        # anew: right after what came before, and nothing was closed
        ([(0, 0, 2), (1, 0, 2)], [], Repairs(1, 0, 0.0), [[0, 2]]),
        # a hole, and one that is none
        ([(0, 0, 2), (0, 50, 52)], [], Repairs(0, 1, 48.0), [[0, 2]]),
        ([(0, 0, 2), (0, 12, 14)], [], Repairs(), [[0, 12]]),
        ([(0, 0, 2), (0, 12.5, 14)], [], Repairs(0, 1, 10.5), [[0, 2]]),
        # two holes, one in which the first clock has gone on
        ([(0, 0, 2), (0, 50, 52), (0, 100, 101)], [], Repairs(0, 2, 96.0), [[0, 2, 4]]),
        # a still while somebody speaks
        ([(0, 0, 2), (0, 50, 52)], [[(0, 0, 52)]], Repairs(), [[0, 50], [0]]),
        ([(0, 0, 2), (0, 50, 52)], [[(0, 0, 39)]], Repairs(0, 1, 48.0), [[0, 2], [0]]),
        # together: neither begins before the other's last part has ended, by whole frames
        ([(0, 0, 2), (1, 0, 2)], [[(0, 0, 2.2), (1, 0, 2)]], Repairs(1, 0, 0.0), [[0, 2.2]] * 2),
        ([(0, 0, 2), (1, 0, 2)], [[(0, 0, 2.04), (1, 0, 2)]], Repairs(1, 0, 0.0), [[0, 2]] * 2),
        # sound in more parts goes with the picture whose stamps are its own, else on
        (
            [(0, 0, 2), (0, 50, 52)],
            [[(0, 0, 1), (0, 1.2, 2), (0, 50, 52), (0, 500, 501)]],
            Repairs(0, 1, 48.0),
            [[0, 2], [0, 1.2, 2, 4]],
        ),
        # and before the picture, with it
        ([(0, 0, 2)], [[(0, 70, 71)]], Repairs(), [[0], [0]]),
    ],
)  # fmt: skip
def test_each_part_is_put_where_it_belongs(
    picture: list[Any], sounds: list[list[Any]], repairs: Repairs, places: list[list[float]]
) -> None:
    streams = [[Segment(*part) for part in parts] for parts in (picture, *sounds)]
    heard = dict(enumerate(streams[1:], 1))
    clock = make_clock((0, streams[0]), heard, hole=10.0, step=0.1)
    assert clock.repairs == repairs
    assert bool(clock.repairs) == (repairs != Repairs())
    found = [[s.clock_start for s in clock.segments[n]] for n in range(len(streams))]
    assert found == [pytest.approx(starts) for starts in places]


NTSC = Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("times", "stated", "wanted"),
    [
        ([n / 24 for n in range(100)], [], (24, True, True)),
        ([n / float(NTSC) for n in range(100)], [], (NTSC, True, True)),
        ([n / 24 for n in range(9)], [None, Fraction(48)], (48, True, False)),
        ([n / 500 for n in range(9)], [Fraction(500)], (500, False, False)),
        ([n / 7 for n in range(9)], [], (7, True, True)),
        ([0.0], [None, Fraction(2000), Fraction(25), Fraction(30)], (25, True, True)),
        ([3.0, 3.0], [Fraction(25)], (25, True, True)),
        ([0.0, 0.5], [Fraction(25)], (2, True, True)),  # two are enough to tell
        ([0.0], [None, Fraction(0), Fraction(1001)], None),
        ([0.0], [Fraction(1000)], (1000, True, True)),
    ],
)  # fmt: skip
def test_a_rate_is_that_of_the_times_else_the_first_that_is_stated(
    times: list[float],
    stated: list[Fraction | None],
    wanted: tuple[Fraction, bool, bool] | None,
) -> None:
    """`wanted`: its rate, which is also that of most frames, whether a grid, whether constant."""
    found = find_rate(np.array(times), stated, Fraction(1, 90_000))
    assert found == (wanted and Rate(*wanted, bulk=wanted[0]))


@pytest.mark.parametrize("nominal", [12, 15, 16, 24, 25, 30, 48, 50, 60, 100, 120, 240])
def test_the_rates_of_cameras_are_known_though_no_file_states_them(nominal: int) -> None:
    """Television's, a thousandth slower, as exactly as the others."""
    television = [Fraction(1000 * nominal, 1001)] if nominal in (24, 30, 48, 60, 120, 240) else []
    for rate in (Fraction(nominal), *television):
        milliseconds = np.round(np.arange(400) * 1000 / float(rate)) / 1000
        found = find_rate(milliseconds, [], Fraction(1, 1000))
        assert found is not None
        assert (found.fps, found.grid) == (rate, True)


@pytest.mark.parametrize(
    ("base", "tick"),
    [
        (Fraction(1, 1000), Fraction(1, 1000)), (Fraction(1, 999), Fraction(1, 90_000)),
        (Fraction(1, 10**6), Fraction(1, 10**6)), (Fraction(1, 10**6 + 1), Fraction(1, 90_000)),
        (Fraction(1001, 24000), Fraction(1, 90_000)),
    ],
)  # fmt: skip
def test_times_are_kept_to_what_the_source_s_are(base: Fraction, tick: Fraction) -> None:
    assert _tick(base) == tick


def test_sound_leads_by_whole_frames_and_never_by_less_than_it_does() -> None:
    rate = Rate(Fraction(16), True, True, Fraction(16))
    sounds = (None, Fraction(2), Fraction(9, 10), Fraction(88, 100), Fraction(1, 2))
    leads = [_lead(sound, Fraction(1), rate) * 16 for sound in sounds]
    assert leads == [0, 0, 0, 2, 8]


def test_the_end_is_an_mp4_s_to_state() -> None:
    def stated(name: str, **about: Any) -> Fraction:
        container: Any = SimpleNamespace(format=SimpleNamespace(name=name))
        return _stated_end(container, SimpleNamespace(time_base=Fraction(1, 16), **about))

    assert stated("mov,mp4,m4a", duration=32, start_time=16) == 3
    assert stated("mov,mp4,m4a", duration=32, start_time=None) == 2
    assert stated("mov,mp4,m4a", duration=None, start_time=16) == 0
    assert stated("matroska,webm", duration=32, start_time=16) == 0


@pytest.mark.parametrize(
    ("stream_s", "file_s", "shown", "told"),
    [
        (100, None, 97.9, "97.9 of 100.0 s are there"), (100, None, 98.1, None),
        (None, 10, 8.9, "8.9 of 10.0 s are there"), (None, 10, 9.1, None),
        (100, 10, 97.9, "97.9 of 100.0 s are there"), (None, None, 0.0, None),
    ],
)  # fmt: skip
def test_a_file_without_a_count_is_cut_off_by_its_seconds(
    stream_s: int | None, file_s: int | None, shown: float, told: str | None
) -> None:
    stream: Any = SimpleNamespace(
        frames=0, duration=stream_s and 16 * stream_s, time_base=Fraction(1, 16)
    )
    container: Any = SimpleNamespace(duration=file_s and file_s * 10**6)
    for repairs, wanted in ((Repairs(), told), (Repairs(back=1), None)):
        scan: Any = SimpleNamespace(clock=Clock(1.0, repairs=repairs))
        assert _cut_off(container, stream, scan, shown) == wanted


def test_a_rate_that_varies_is_told_by_its_mean(make_video: MakeVideo) -> None:
    found = survey(make_video())
    varying = replace(found, rate=replace(found.rate, constant=False))
    many = replace(varying, packets=10, first=Fraction(1), end=Fraction(5))
    assert many.fps == Fraction(5, 2)
    assert replace(many, packets=1).fps == replace(many, rate=found.rate).fps == 16


def test_what_is_told_of_a_file_is_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        look=SimpleNamespace(width=1, height=2, rotation=90, matrix=9), fps=Fraction(3), packets=10,
        undecodable=4, first=Fraction(2), end=Fraction(7), has_audio=True, codec="c",
        rate=SimpleNamespace(bulk=Fraction(5), constant=False), tick=Fraction(1, 7),
    )  # fmt: skip
    monkeypatch.setattr(reading, "survey", lambda path: found)
    assert probe("x") == VideoInfo(
        width=1, height=2, fps=Fraction(3), frames=6, duration=5.0, has_audio=True, codec="c",
        rotation=90, bulk_fps=Fraction(5), variable=True, matrix=9, tick=Fraction(1, 7),
    )  # fmt: skip


def frames(*stamps: int | None) -> list[Any]:
    return [
        SimpleNamespace(pts=s, dts=None, time_base=TENTH, interlaced_frame=False, planes=[])
        for s in stamps
    ]


def of_a_file(**changes: Any) -> Any:
    """Ten frames a second from the second second on, of which one was heard alone."""
    grid = changes.pop("grid", True)
    interlaced = changes.pop("interlaced", False)
    about = {
        "rate": Rate(Fraction(10), grid, True, Fraction(10)),
        "first": Fraction(2), "origin": Fraction(1), "stamped": True, "reorder": 0, "packets": 3,
        "undecodable": 0, "longest": Fraction(1), "clock": Clock(5.0), "cut_off": None,
        "look": SimpleNamespace(interlaced=interlaced),
    }  # fmt: skip
    return SimpleNamespace(**about | changes)


@pytest.mark.parametrize(
    ("stamps", "about", "wanted"),
    [
        ([20, 21, 22], {}, ["1", "1.1", "1.2"]),
        ([20, 21, 21], {}, ["1", "1.1", "1.2"]),  # a stamp that is there twice
        ([20, 21, 21], {"grid": False}, ["1", "1.1", "1.1125"]),  # an eighth of a frame later
        ([20, 24, 25], {"rate": Rate(Fraction(4), True, True, Fraction(4))}, ["1", "1.5", "1.75"]),
        ([20, None, 22], {}, ["1", "1.1", "1.2"]),
        ([None, None, None], {"stamped": False}, ["1", "1.1", "1.2"]),
        ([20, 99, 22], {"stamped": False}, ["1", "1.1", "1.2"]),  # of a decoder's own making
        ([20, 22, 21], {"reorder": 2}, ["1", "1.1", "1.2"]),
        ([20, 22, 21], {"reorder": 0}, ["1", "1.2", "1.3"]),
    ],
)  # fmt: skip
def test_frames_come_in_the_picture_s_order_each_after_the_other(
    stamps: list[int | None], about: dict[str, Any], wanted: list[str]
) -> None:
    given = frames(*stamps)
    found = list(decode._on_clock(iter(given), of_a_file(**about)))
    assert [time for time, _ in found] == [Fraction(time) for time in wanted]
    assert [frame for _, frame in found] == given


@pytest.mark.parametrize(
    ("stamps", "about", "said"),
    [
        ([20, 80, 81], {"grid": False}, None),
        ([20, 81, 82], {"grid": False}, "nothing can be decoded from 1.0 to 7.1 s"),
        (range(20, 121), {"packets": 0}, None),
        (range(20, 122), {"packets": 0}, "more frames than its 0 packets can hold"),
        (range(20, 127), {"packets": 3}, None),
        (range(20, 128), {"packets": 3}, "more frames than its 3 packets can hold"),
        ([], {}, "has a video stream but no frame"),
        ([20, 21], {}, "is damaged: 1 frames are lost"),
        ([20, 21], {"undecodable": 1}, None),
        ([20, 21], {"packets": 4, "interlaced": True}, None),  # a packet for each field
        ([20, 21], {"packets": 7, "interlaced": True}, "is damaged: 5 frames are lost"),
        (range(20, 120), {"packets": 204, "interlaced": True}, None),
        (range(20, 120), {"packets": 205, "interlaced": True}, "is damaged: 105 frames are lost"),
        ([20, 21, 22], {"cut_off": "3 of 9 frames are there"}, "is cut off: 3 of 9 frames"),
    ],
)  # fmt: skip
def test_a_strict_reading_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, stamps: Any, about: dict[str, Any], said: str | None
) -> None:
    monkeypatch.setattr(decode, "_decoded", lambda *_: iter(frames(*stamps)))
    if said is None:
        assert len(list(decode.decode("x", of_a_file(**about), strict=True))) == len(stamps)
    else:
        with pytest.raises(VideoError, match=f"^x: .*{said}"):
            list(decode.decode("x", of_a_file(**about), strict=True))


def test_damage_is_told_in_words_only_where_there_is_some() -> None:
    assert not Damage()
    assert str(Damage()) == ""
    assert str(Damage(packets=1, frames=2, missing=3, sound=4)) == (
        "3 frames are lost, 1 packets could not be decoded, 2 frames are shown broken, "
        "4 packets of sound are lost"
    )
    for name in ("packets", "frames", "missing", "sound"):
        assert Damage(**{name: 1})


@pytest.mark.parametrize(
    ("last", "source", "missing", "wanted"),
    [
        (90, None, 0, (95, False)),  # a frame of a twentieth, in hundredths
        (40, 1, 0, (45, True)),  # the source goes on for long
        (40, 1, 3, (45, False)),  # nobody cut it short: its frames could not be read
        (80, 1, 0, (110, False)),  # the source's last, as long as it was shown
    ],
)
def test_a_video_ends_with_its_last_frame_or_as_its_source_does(
    last: int, source: int | None, missing: int, wanted: tuple[int, bool]
) -> None:
    found = source and SimpleNamespace(
        end=Fraction(2), length=Fraction(3, 10), origin=Fraction(9, 10)
    )
    made: Any = SimpleNamespace(
        fps=Fraction(20), _tick=Fraction(1, 100), _found=found, damage=Damage(missing=missing)
    )
    assert VideoWriter._end(made, last) == wanted
