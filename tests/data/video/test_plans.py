"""data/video, plans: what becomes of each track, and what is said of what will differ."""

from __future__ import annotations

import errno
import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
from av.stream import Disposition

from data.video import Damage, differences, sound
from data.video.differs import _of_the_picture, _of_the_stream
from data.video.source import tracks
from data.video.source.clock import Clock, Repairs
from data.video.source.tracks import Track, plan_tracks
from tests.data.video.test_tracks import with_tracks


def coded(name: str) -> Any:
    return SimpleNamespace(codec=SimpleNamespace(canonical_name=name))


@pytest.mark.parametrize(
    ("output", "codec", "held", "encoders", "wanted"),
    [
        ("mp4", "aac", True, "aac", ""),
        ("mp4", "opus", True, "aac", ""),
        ("mp4", "pcm_s16le", True, "aac", "aac"),  # the muxer takes it, players do not
        ("mp4", "aac", False, "aac", "aac"),
        ("mp4", "mp2", True, "flac alac", "flac"),
        ("mp4", "mp2", True, "alac", "alac"),
        ("mp4", "mp2", True, "", None),
        ("mov", "pcm_s24le", True, "aac", ""),
        ("mov", "alac", True, "aac", ""),
        ("mov", "flac", True, "aac", "aac"),
        ("mov", "flac", True, "flac alac", "alac"),  # QuickTime plays no FLAC
        ("matroska", "pcm_s16le", True, "aac", ""),
        ("matroska", "qdm2", False, "aac", "aac"),
        ("matroska", "qdm2", False, "flac", "flac"),
    ],
)
def test_sound_is_copied_if_players_know_it_else_made_what_they_know(
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    codec: str,
    held: bool,
    encoders: str,
    wanted: str | None,
) -> None:
    monkeypatch.setattr(tracks, "_holds", lambda stream, name: held and name == output)
    monkeypatch.setattr(tracks, "_encodes", lambda name, stream: name in encoders.split())
    assert tracks._sound_codec(SimpleNamespace(codec_context=coded(codec)), output) == wanted
    assert tracks._sound_codec(SimpleNamespace(codec_context=None), output) is None


@pytest.mark.parametrize(
    ("output", "codec", "held", "wanted"),
    [
        ("mp4", "mov_text", False, ""), ("mov", "mov_text", False, ""),
        ("mp4", "subrip", True, "mov_text"), ("mov", "text", True, "mov_text"),
        ("mp4", "ass", True, None), ("mp4", "hdmv_pgs_subtitle", True, None),
        ("matroska", "mov_text", True, "subrip"), ("matroska", "ass", True, ""),
        ("matroska", "ass", False, None),
    ],
)  # fmt: skip
def test_subtitles_are_copied_or_framed_anew(
    monkeypatch: pytest.MonkeyPatch, output: str, codec: str, held: bool, wanted: str | None
) -> None:
    monkeypatch.setattr(tracks, "_holds", lambda stream, name: held)
    assert tracks._subtitle_codec(SimpleNamespace(codec_context=coded(codec)), output) == wanted
    assert tracks._subtitle_codec(SimpleNamespace(codec_context=None), output) is None


class Streams(list[Any]):
    @property
    def video(self) -> list[Any]:
        return [stream for stream in self if stream.type == "video"]


def a_file() -> Any:
    """A picture, its cover, a second picture, sound, subtitles, a time code and data, chapters."""
    streams = Streams()

    def add(kind: str, codec: str, disposition: Any = 0, **metadata: str) -> None:
        streams.append(
            SimpleNamespace(
                index=len(streams),
                type=kind,
                codec_context=coded(codec),
                metadata=metadata,
                disposition=Disposition(disposition),
                layout=SimpleNamespace(name="2 channels"),
                channels=2,
                codec_tag="tag\0",
            )
        )

    add("video", "png", Disposition.attached_pic)
    add("video", "h264")
    add("video", "h264", Disposition.default)
    add("audio", "mp2", language="deu")
    add("audio", "aac", language="und")
    add("subtitle", "mov_text")
    add("data", "none", timecode="01:00:00:00")
    add("data", "none")
    chapters = [
        {"id": 1, "start": 500, "end": 2500, "time_base": Fraction(1, 1000), "metadata": {}},
        {"id": 2, "start": 2_500_000, "end": 4_000_000, "time_base": None, "metadata": {}},
    ]
    about = {"title": "Holiday", "ENCODER": "x", "timecode": "9", "artist": "me"}
    return SimpleNamespace(streams=streams, chapters=lambda: chapters, metadata=about)


@pytest.mark.parametrize("why", ["", "fragmented", "repaired"])
def test_what_goes_along_is_planned_and_the_rest_is_named(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(tracks, "_holds", lambda stream, name: True)
    monkeypatch.setattr(tracks, "_encodes", lambda name, stream: True)
    found: Any = SimpleNamespace(
        clock=Clock(1.0, repairs=Repairs(back=int(why == "repaired"))), origin=Fraction(1)
    )
    plan = plan_tracks(a_file(), found, "mp4", fragmented=why == "fragmented")
    text = "subtitles (mov_text)"
    deu = "sound (mp2 stereo deu)"
    kept = [Track(3, "audio", deu, "aac"), Track(4, "audio", "sound (aac stereo)", None)]
    left = ["cover picture", "second video (h264)", "data track (tag)"]
    if why:
        left.insert(2, text)
        assert list(plan.left_out) == [*left, "chapters"]
        assert plan.chapters == ()
    else:
        kept.append(Track(5, "subtitle", text, None))
        assert list(plan.left_out) == left
        moved = [(c["id"], c["start"], c["end"]) for c in plan.chapters]
        assert moved == [(1, 0, 1500), (2, 1_500_000, 3_000_000)]
    assert list(plan.tracks) == kept
    assert [track.converted for track in kept[:2]] == [True, False]
    assert plan.converted == (f"{deu} becomes AAC",)
    assert plan.metadata == {"title": "Holiday", "artist": "me"}
    assert plan.timecode == "9"  # the file's own goes before a track's
    whole = a_file()
    del whole.metadata["timecode"]
    assert plan_tracks(whole, found, "mp4").timecode == "01:00:00:00"


def test_a_streamed_answer_takes_sound_only_and_says_so(tmp_path: Path) -> None:
    path = with_tracks(tmp_path / "in.mp4", [("aac", "mono", {}, True)], subtitle="mov_text")
    assert differences(path, tmp_path / "out.mp4") == []
    assert differences(path) == ["left out: subtitles (mov_text deu)"]


@pytest.mark.parametrize(
    ("about", "lines"),
    [
        ({}, []),
        (
            {"repairs": Repairs(1, 0, 0.0)},
            ["time stamps start anew once: the parts follow each other"],
        ),
        (
            {"repairs": Repairs(2, 3, 4321.6)},
            ["time stamps start anew 2 times: the parts follow each other",
             "time stamps jump ahead 3 times, by 4,322 s in all: the holes are closed"],
        ),
        (
            {"disordered": True},
            ["time stamps are out of order: frames keep the order of the picture"],
        ),
        (
            {"undecodable": 7},
            ["the picture starts in the middle: its first 7 frames need others that are not in the "
             "file"],
        ),
        ({"cut_off": "3 of 9 frames are there"}, ["the file is cut off: 3 of 9 frames are there"]),
        ({"tones": ("pq", "bt2020")}, ["HDR (PQ) is mapped to SDR BT.709"]),
        ({"tones": ("hlg", "bt2020")}, ["HDR (HLG) is mapped to SDR BT.709"]),
        ({"tones": ("sdr", "p3")}, ["wide gamut is mapped to SDR BT.709"]),
        ({"interlaced": True}, ["interlaced: made whole, one frame for two fields"]),
        ({"transparent": True}, ["transparency is not kept: it is shown over a plain page"]),
        ({"resized": True}, ["pixels become square: 854x480"]),
    ],
)  # fmt: skip
def test_each_difference_has_its_line(about: dict[str, Any], lines: list[str]) -> None:
    look = {"tones": None, "interlaced": False, "transparent": False, "resized": False}
    look |= {name: value for name, value in about.items() if name in look}
    found: Any = SimpleNamespace(
        clock=Clock(1.0, repairs=about.get("repairs", Repairs())),
        disordered=about.get("disordered", False),
        undecodable=about.get("undecodable", 0),
        cut_off=about.get("cut_off"),
        look=SimpleNamespace(width=854, height=480, **look),
    )
    assert [*_of_the_stream(found), *_of_the_picture(found)] == lines


class Noting:
    """Packets as an output is given them."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def mux(self, given: Any) -> None:
        if getattr(given, "bad", False):
            raise av.error.InvalidDataError(errno.EINVAL, "bad")
        self.taken.append(given)


def lane(kind: type[Any], **about: Any) -> Any:
    made = kind.__new__(kind)
    made.carrier = SimpleNamespace(damage=Damage(), found=SimpleNamespace(origin=Fraction(1)))
    made.output, made.added, made.shift, made.last = Noting(), None, 1000, None
    for name, value in about.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("framed", "given", "wanted"),
    [
        (True, b" words \n", b"\0\x05words"),
        (True, b"x" * 70_000, b"\xff\xff" + b"x" * 0xFFFF),
        (False, b"\0\x05words" + b"\0\0\0\x0cstyl", b"words"),
        (False, b"\0\0", None),  # what fills the time between two
    ],
)
def test_a_text_keeps_its_time_and_length(framed: bool, given: bytes, wanted: bytes | None) -> None:
    with av.open(io.BytesIO(), "w", format="matroska") as output:
        text = lane(sound._Text, framed=framed, added=output.add_mux_stream("subrip"))
    source = av.Packet(given)
    source.pts, source.dts, source.duration, source.time_base = 1250, 1250, 500, Fraction(1, 1000)
    text.take(source)
    if wanted is None:
        assert text.output.taken == []
        return
    (made,) = text.output.taken
    assert bytes(made) == wanted
    about = (made.pts, made.dts, made.duration, made.time_base)
    assert about == (250, 250, 500, Fraction(1, 1000))


def test_copied_packets_go_on_in_order_and_bad_ones_are_counted() -> None:
    copied = lane(sound._Copied)
    stamps = [(1000, 1000), (1010, None), (1010, 1005), (1020, 1010), (1015, 1012)]
    for n, (pts, dts) in enumerate(stamps):
        copied.take(SimpleNamespace(pts=pts, dts=dts, number=n, bad=False))
    copied.take(SimpleNamespace(pts=1050, dts=1050, number=9, bad=True))
    copied.take(SimpleNamespace(pts=1040, dts=1040, number=10, bad=False))
    found = [(p.number, p.pts, p.dts) for p in copied.output.taken]
    # Two that begin before the last one was heard are passed over; one that was refused was not.
    assert found == [(0, 0, 0), (1, 10, 10), (4, 15, 12), (10, 40, 40)]
    assert copied.carrier.damage.sound == 1


def test_sound_is_taken_from_a_little_before_the_beginning_as_the_picture_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {1: "audio", 2: "subtitle"}
    streams = {index: SimpleNamespace(index=index, type=kind) for index, kind in kinds.items()}
    packets = [
        SimpleNamespace(size=size, pts=pts, dts=dts, time_base=Fraction(1, 100), stream=streams[of])
        for size, pts, dts, of in [
            (1, 89, 89, 1), (1, 90, 90, 1), (0, 95, 95, 1), (1, None, None, 1), (1, None, None, 2),
            (1, None, 100, 2), (1, 150, 150, 1), (1, 200, 200, 1),
        ]
    ]  # fmt: skip
    monkeypatch.setattr(sound, "packets", lambda *_: iter(packets))
    taken: list[Fraction] = []
    lanes = SimpleNamespace(
        take=lambda p: taken.append(p.pts or p.dts), finish=lambda: taken.append(Fraction(-1))
    )
    carrier: Any = sound.Carrier.__new__(sound.Carrier)
    carrier.damage = Damage()
    carrier.input = SimpleNamespace(streams=streams, close=lambda: taken.append(Fraction(-2)))
    clock = SimpleNamespace(reader=lambda stream: SimpleNamespace(repair=lambda p: None))
    carrier.found = SimpleNamespace(origin=Fraction(1), clock=clock)
    carrier._lanes = dict.fromkeys(kinds, lanes)
    carrier._packets = carrier._read()
    carrier._waiting = next(carrier._packets, None)
    carrier.copy_until(Fraction(1, 2))
    assert taken == [90, 100]
    assert carrier.damage.sound == 1
    carrier.finish(Fraction(1))
    assert taken == [90, 100, 150, -1, -1, -2]
