"""data/video, passes over made-up packets: the scan, the decoding, and what is shown when."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import pytest

from data.video import Damage, VideoError, decode, reading
from data.video.source import scan
from data.video.source.rate import Rate

TENTH = Fraction(1, 10)
BAD = av.error.InvalidDataError(errno.EINVAL, "bad data")


class Packet(bytes):
    """Content whose first bit of interest is VP8's "show frame", with what a demuxer says of it."""

    pts: int | None
    dts: int | None
    duration: int | None
    is_discard: bool
    stream: Any
    frames: list[Any]
    error: Exception | None

    @property
    def size(self) -> int:
        return len(self)

    def decode(self) -> list[Any]:
        if self.error is not None:
            raise self.error
        return self.frames


def packet(
    pts: int | None,
    *,
    dts: int | None = None,
    duration: int | None = 1,
    content: bytes = b"\x10",
    discard: bool = False,
    of: Any = None,
    error: Exception | None = None,
    corrupt: bool = False,
    frames: int = 1,
    late: int | None = None,
) -> Packet:
    """`late` is the stamp of the frame that a decoder gives for it, of one that it was given
    before."""
    made = Packet(content)
    made.pts, made.dts, made.duration, made.is_discard = pts, dts, duration, discard
    made.stream, made.error = of, error
    given = pts if late is None else late
    made.frames = [SimpleNamespace(pts=given, is_corrupt=corrupt)] * frames
    return made


def scanned(
    monkeypatch: pytest.MonkeyPatch, given: list[Packet], *, reordered: bool = False,
    codec: str = "h264", container: str = "mov",
) -> scan.Scan:  # fmt: skip
    context = SimpleNamespace(has_b_frames=int(reordered), name=codec)
    stream = SimpleNamespace(index=0, time_base=TENTH, codec_context=context)
    sounds = {n: SimpleNamespace(index=n, time_base=TENTH) for n in (1, 2)}
    for one in given:
        one.stream = sounds.get(one.stream, stream)
    monkeypatch.setattr(scan, "packets", lambda *_: iter(given))
    file = SimpleNamespace(format=SimpleNamespace(name=container))
    return scan.scan_packets(file, stream, list(sounds.values()), 0.1, "x")


def in_a_row(*stamps: int, **about: Any) -> list[Packet]:
    return [packet(stamp, **about) for stamp in stamps]


ROW = {
    "times": [0, 0.1, 0.2, 0.3], "length": 0.1, "count": 4, "trimmed": 0, "reorder": 0,
    "disordered": False, "sound_start": None, "first": Fraction(0), "undecodable": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "about", "found"),
    [
        (in_a_row(0, 1, 2, 3), {}, {}),
        # of an edit list; at the end a demuxer gives an empty one
        ([*in_a_row(0, 1, 2, 3), packet(4, discard=True)], {}, {"trimmed": 1}),
        ([*in_a_row(0, 1, 2, 3), packet(4, content=b"")], {}, {}),
        # that others refer to and nobody sees: of VP8 alone
        ([*in_a_row(0, 1, 2, 3), packet(4, content=b"\0")], {"codec": "vp8"}, {}),
        (in_a_row(0, 1, 2, 3, content=b"\0"), {}, {}),
        # stamps are in the file's order unless frames are reordered; else they lie
        (in_a_row(0, 2, 1, 3), {}, {"reorder": 16, "disordered": True}),
        (in_a_row(0, 2, 1, 3), {"reordered": True}, {}),
        (in_a_row(0, 1, 2, 3), {"reordered": True}, {"reorder": 16}),
        # the length is that of what is shown last, not of what is last in the file
        (
            [packet(0), packet(1), packet(3, duration=5), packet(2, duration=2)],
            {"reordered": True},
            {"length": 0.5},
        ),
        ([*in_a_row(0, 1, 2), packet(3, duration=None)], {}, {"length": 0.0}),
        ([*in_a_row(0, 1, 2), packet(3, duration=9999)], {}, {"length": 30.0}),
        ([*in_a_row(0, 1, 2), packet(3, duration=9999)], {"container": "mpegts"}, {"length": 10.0}),
        ([*in_a_row(0, 1, 2), packet(3, duration=9999)], {"container": "mpeg"}, {"length": 10.0}),
        # entered in its middle: two need what is not there
        (
            [packet(0, error=BAD), packet(1, frames=0), packet(2), packet(3)],
            {},
            {"undecodable": 2, "first": Fraction(1, 5)},
        ),
        # and where the stamps start anew before the first that can be
        (
            [packet(100, error=BAD), packet(101, frames=0), packet(0), packet(1)],
            {},
            {"times": [10, 10.1, 10.2, 10.3], "first": Fraction(51, 5), "undecodable": 2},
        ),
        (
            [packet(100, frames=0), packet(0, late=100), packet(1), packet(2)],
            {},
            {"times": [10, 10.1, 10.2, 10.3], "first": Fraction(10)},
        ),
        # sound: the earliest, and none before the beginning
        (
            [packet(5, of=1), *in_a_row(0, 1, 2, 3), packet(4, of=2)],
            {},
            {"sound_start": Fraction(2, 5)},
        ),
        ([packet(-5, of=1), *in_a_row(0, 1, 2, 3)], {}, {"sound_start": Fraction(0)}),
        # without stamps
        ([packet(None) for _ in range(4)], {}, {"times": [], "length": 0.0, "first": None}),
        ([packet(None, dts=n) for n in range(4)], {}, {"first": None}),
    ],
)  # fmt: skip
def test_what_a_pass_over_the_packets_finds(
    monkeypatch: pytest.MonkeyPatch,
    given: list[Packet],
    about: dict[str, Any],
    found: dict[str, Any],
) -> None:
    made = scanned(monkeypatch, given, **about)
    for name, value in (ROW | found).items():
        seen = getattr(made, name)
        assert (pytest.approx(value) if name in ("times", "length") else value) == (
            seen.tolist() if name == "times" else seen
        ), name


def test_the_last_frame_is_that_of_the_last_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose stamps start anew, below those before."""
    given = [*in_a_row(100, 101), packet(0), packet(2, duration=7), packet(1, duration=3)]
    assert scanned(monkeypatch, given, reordered=True).length == pytest.approx(0.7)


def test_a_file_of_no_frame_or_of_too_many_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, why in (
        ([packet(0, error=BAD)], "bad data"),
        ([], "its video stream holds nothing"),
    ):
        with pytest.raises(VideoError, match=rf"x: has a video stream but no frame \({why}\)"):
            scanned(monkeypatch, given)
    monkeypatch.setattr(scan, "MAX_FRAMES", 3)
    assert scanned(monkeypatch, in_a_row(0, 1, 2)).count == 3
    with pytest.raises(VideoError, match="x: has more than 3 frames; cut it first"):
        scanned(monkeypatch, in_a_row(0, 1, 2, 3))


def decoded(
    monkeypatch: pytest.MonkeyPatch, given: list[Packet], damage: Damage, strict: bool
) -> tuple[int, Any]:
    stream = SimpleNamespace(codec_context=SimpleNamespace(options={"a": "b"}))
    monkeypatch.setattr(decode, "open_video", nullcontext)
    monkeypatch.setattr(decode, "video_stream", lambda *_: stream)
    monkeypatch.setattr(decode, "packets", lambda *_: iter(given))
    repairer = SimpleNamespace(repair=lambda packet: None)
    found: Any = SimpleNamespace(clock=SimpleNamespace(reader=lambda stream: repairer))
    return len(list(decode._decoded("x", found, damage, strict))), stream


def test_what_cannot_be_decoded_is_counted_once_there_was_a_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [packet(0, error=BAD), packet(1), packet(2, error=OSError("gone")),
             packet(3, corrupt=True), packet(4, frames=2)]  # fmt: skip
    damage = Damage()
    count, stream = decoded(monkeypatch, given, damage, strict=False)
    assert (count, damage) == (4, Damage(packets=1, frames=1))
    assert (stream.thread_type, stream.codec_context.options) == ("AUTO", {"a": "b"})
    with pytest.raises(VideoError, match=r"x: damaged after frame 1 \(gone\); check that it plays"):
        decoded(monkeypatch, given, Damage(), strict=True)
    count, stream = decoded(monkeypatch, given[:2], Damage(), strict=True)
    assert count == 1  # what is before the first frame is no damage
    assert stream.codec_context.options["err_detect"] == "explode+crccheck+bitstream+buffer"
    full = [packet(0), packet(1, error=av.error.MemoryError(errno.ENOMEM, "no memory"))]
    with pytest.raises(VideoError, match="x: no memory for frame 1; give a smaller video"):
        decoded(monkeypatch, full, Damage(), strict=False)


@pytest.mark.parametrize(
    ("times", "fps", "wanted"),
    [
        ([10, 11, 12], None, [("1", 0, 1), ("1.1", 1, 1), ("1.2", 2, 1)]),
        ([10, 11, 12], 10, [("1", 0, 1), ("1.1", 1, 1), ("1.2", 2, 1)]),
        ([10, 11, 12], 20, [("1", 0, 2), ("1.1", 1, 2), ("1.2", 2, 2)]),
        ([10, 11, 12, 13], 5, [("1", 0, 1), ("1.2", 2, 1)]),
        ([10, 11, 12], 5, [("1", 0, 1), ("1.2", 2, 1)]),  # the last is on the screen then
        ([10, 14, 15], 10, [("1", 0, 4), ("1.4", 1, 1), ("1.5", 2, 1)]),  # a still
        # late by a quarter of a frame it still counts, by more it does not
        ([10, "11.25", 12], 10, [("1", 0, 1), ("1.1", 1, 1), ("1.2", 2, 1)]),
        ([10, "11.26", 12], 10, [("1", 0, 2), ("1.2", 2, 1)]),
        ([10], 1, [("1", 0, 1)]),  # what is shorter than a tick is shown for one
    ],
)
def test_at_each_tick_the_frame_on_the_screen_is_shown(
    monkeypatch: pytest.MonkeyPatch,
    times: list[Any],
    fps: int | None,
    wanted: list[tuple[str, int, int]],
) -> None:
    found: Any = SimpleNamespace(rate=Rate(Fraction(10), True, True, Fraction(10)), length=TENTH)
    stored = [(Fraction(time) / 10, number) for number, time in enumerate(times)]
    asked: list[Any] = []

    def frames(path: Any, of: Any, **about: Any) -> Any:
        asked.append(about)
        return iter(stored)

    monkeypatch.setattr(reading, "decode", frames)
    damage = Damage()
    shown = list(reading._shown("x", found, fps, damage, True))
    assert shown == [(Fraction(time), number, count) for time, number, count in wanted]
    assert asked == [{"damage": damage, "strict": True}]
