"""data/video/source/container.py, boxes.py: which files are opened, under whatever name."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.video import VideoError, VideoWriter, probe
from data.video.source import boxes
from data.video.source.boxes import MAX_FRAMES, index_lie
from data.video.source.container import DEMUX_ERRORS, packets
from tests.data.conftest import MakeVideo, numbered
from tests.data.video.test_clock import edited, shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("self.mp4", "ffconcat version 1.0\nfile self.mp4\n"),
        ("list.mp4", "ffconcat version 1.0\nfile in.mp4\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nin.ts\n#EXT-X-ENDLIST\n"),
        ("a.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"),
    ],
)
def test_lists_of_other_files_are_not_opened(
    make_video: MakeVideo, tmp_path: Path, name: str, content: str
) -> None:
    make_video("in.mp4")
    make_video("in.ts")
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(VideoError, match=rf"{name}: not a readable video"):
        probe(path)


@pytest.mark.parametrize("name", ["12:30:45.mp4", "pipe:0.mp4", "-dash.mp4", "a%03d.mp4"])
def test_no_name_is_an_address(
    make_video: MakeVideo, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_video()
    monkeypatch.chdir(tmp_path)
    source.rename(name)
    assert [n for _, n in shown(Path(name))] == list(range(16))
    out = edited(Path(name), Path(f"to-{name}"))
    assert [n for _, n in shown(out)] == list(range(16))


LIES = {
    "samples of one size": (b"stsz", ">3I", (0, 1, 150_000_000)),
    "samples of all sizes": (b"stsz", ">3I", (0, 0, 4_000_000_000)),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_promises_what_cannot_be_is_not_built(
    make_video: MakeVideo, tmp_path: Path, lie: str
) -> None:
    """FFmpeg would make a table of all those frames: gigabytes, of a file of two thousand bytes."""
    name, layout, values = LIES[lie]
    path = make_video()
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, data.index(name) + 4, *values)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=rf"in.mp4: .*states {values[2]} frames, more than a file"):
        probe(path)
    with pytest.raises(VideoError, match="more than a file of"):
        probe(io.BytesIO(data))


def box(kind: bytes, *inside: bytes) -> bytes:
    return struct.pack(">I", 8 + sum(map(len, inside))) + kind + b"".join(inside)


@pytest.mark.parametrize(
    ("handler", "count", "fits"),
    [
        (b"vide", MAX_FRAMES, True),
        (b"vide", MAX_FRAMES + 1, False),  # for days of video there would be bytes enough
        (b"soun", MAX_FRAMES + 1, True),  # three minutes and a half
        (b"soun", 4 * (3 * 10**6 + 140), True),
        (b"soun", 4 * (3 * 10**6 + 140) + 1, False),
    ],
)
def test_a_track_has_so_many_frames_at_most(handler: bytes, count: int, fits: bool) -> None:
    stated = box(b"stsz", struct.pack(">3I", 0, 0, count))
    media = box(
        b"mdia", box(b"hdlr", bytes(8) + handler + bytes(12)), box(b"minf", box(b"stbl", stated))
    )
    data = box(b"ftyp", b"isom") + box(b"moov", box(b"trak", media)) + box(b"mdat")
    data += box(b"free", bytes(3 * 10**6 + 140 - len(data) - 8))
    assert len(data) == 3 * 10**6 + 140
    lie = index_lie(io.BytesIO(data))
    assert lie is None if fits else f"states {count} frames" in str(lie)


def test_the_same_in_a_fragment(make_video: MakeVideo, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with path.open("wb") as file, VideoWriter(file, 64, 48, 16, fragmented=True) as writer:
        writer.write(numbered(16))
    assert [number for _, number in shown(path)] == list(range(16))
    data = bytearray(path.read_bytes())
    struct.pack_into(">2I", data, data.index(b"trun") + 4, 0, 170_000_000)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="states 170000000 frames"):
        probe(path)


def test_a_place_that_cannot_be_read_is_passed_over_unless_nothing_else_comes() -> None:
    """Damage in many places is not the end; so many errors in a row are."""

    class Damaged:
        def __init__(self, *parts: int) -> None:
            self.parts = [n for errors in parts for n in (*range(-errors, 0), errors)]

        def demux(self, streams: list[Any]) -> Iterator[int]:
            while self.parts:
                if (part := self.parts.pop(0)) < 0:
                    raise OSError("damaged")
                yield part

    few = [DEMUX_ERRORS - n for n in (1, 2, 3)]
    assert list(packets(Damaged(*few), [])) == few  # type: ignore[arg-type]
    assert list(packets(Damaged(1, DEMUX_ERRORS, 2), [])) == [1]  # type: ignore[arg-type]


def test_a_browser_need_not_load_the_whole_file_before_it_starts(tmp_path: Path) -> None:
    for name, first in (("a.mp4", True), ("a.mov", True), ("a.mkv", False)):
        with VideoWriter(tmp_path / name, 16, 16, 8) as writer:
            writer.write(numbered(2, 16, 16))
        data = (tmp_path / name).read_bytes()
        assert (0 < data.find(b"moov") < data.find(b"mdat")) == first


FTYP = box(b"ftyp", b"isom")
MANY = 2_000_000  # more than a file of some hundred bytes holds, and no more than a track may have


def in_a_track(*inside: bytes) -> bytes:
    for kind in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        inside = (box(kind, *inside),)
    return FTYP + inside[0]


def counted(kind: bytes, count: int) -> bytes:
    """A box that states a number of frames where its kind has it."""
    return box(kind, bytes({b"trun": 4}.get(kind, 8)), struct.pack(">I", count))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (in_a_track(counted(b"stsz", 3)), None),
        (in_a_track(counted(b"stsz", MANY)), f"states {MANY} frames"),
        (in_a_track(counted(b"stz2", MANY)), f"states {MANY} frames"),
        (FTYP + box(b"moof", box(b"traf", counted(b"trun", MANY))), f"states {MANY} frames"),
        (in_a_track(*[counted(b"stsz", 149)] * 3), None),
        (in_a_track(*[counted(b"stsz", 150)] * 3), "states 150 frames"),  # each alone could be
        (FTYP + box(b"moov", box(b"cmov", box(b"cmvd", struct.pack(">I", 64 * 2**20)))), None),
        (
            FTYP + box(b"moov", box(b"cmov", box(b"cmvd", struct.pack(">I", 64 * 2**20 + 1)))),
            "its index is 67108865 bytes unpacked",
        ),
        # a length of 0 is up to the end
        (FTYP + struct.pack(">I", 0) + b"mdat" + counted(b"stsz", MANY), None),
        (FTYP + struct.pack(">I", 0) + b"moov" + counted(b"stsz", MANY), f"states {MANY} frames"),
        # what is shorter than its own head is no box, and what follows none either
        (FTYP + struct.pack(">I", 7) + b"moov" + counted(b"stsz", MANY), None),
        (FTYP + box(b"mdat", counted(b"stsz", MANY)), None),  # pictures, not an index
        (box(b"RIFF") + in_a_track(counted(b"stsz", MANY)), None),  # another kind of file
        (b"", None),
    ],
)
def test_an_index_is_believed_as_far_as_it_can_be_true(data: bytes, said: str | None) -> None:
    lie = index_lie(io.BytesIO(data))
    assert lie is None if said is None else said in str(lie)


@pytest.mark.parametrize(
    "first", b"ftyp styp moov moof mdat wide free skip pnot sidx".split(), ids=bytes.decode
)
def test_a_file_of_boxes_may_begin_with_any_of_these(first: bytes) -> None:
    data = box(first, b"isom") + in_a_track(counted(b"stsz", MANY))
    assert f"states {MANY} frames" in str(index_lie(io.BytesIO(data)))


def test_an_index_of_too_many_parts_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "MAX_BOXES", 3)
    assert index_lie(io.BytesIO(box(b"free") * 3)) is None
    assert index_lie(io.BytesIO(box(b"free") * 4)) == "its index has more than 3 parts"
