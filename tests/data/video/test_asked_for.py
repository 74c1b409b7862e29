"""data/video: what a writer and a reader are asked for arrives, and what cannot be is refused."""

from __future__ import annotations

import errno
import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from data.video import VideoError, VideoWriter, read_frames, reading
from data.video import writer as writing_module
from data.video.errors import writing
from data.video.output import check_output
from data.video.source.colour import is_tagged, mapping, usual_matrix
from data.video.source.container import MAX_PIXELS, MAX_SIDE, video_stream
from data.video.source.upright import pixel_aspect, shown_size
from tests.data.conftest import MakeVideo, numbered


@pytest.mark.parametrize(
    ("given", "options", "gop", "threads"),
    [
        ({}, {"crf": "18", "preset": "medium"}, 250, 0),
        ({"crf": 3, "preset": "fast"}, {"crf": "3", "preset": "fast"}, 250, 0),
        ({"fragmented": True}, {"crf": "18", "preset": "medium", "tune": "zerolatency"}, 30, 0),
        ({"reproducible": True}, {"crf": "18", "preset": "medium", "tune": "zerolatency"}, 250, 1),
        ({"codec": "ffv1"}, {}, 250, 0),
    ],
)
def test_what_a_writer_is_asked_for_arrives_at_the_encoder(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: dict[str, Any],
    options: dict[str, str],
    gop: int,
    threads: int,
) -> None:
    asked: dict[str, Any] = {}
    real = av.open

    def noting(*arguments: Any, **named: Any) -> Any:
        output = real(*arguments, **named)

        def add_stream(codec: str, **about: Any) -> Any:
            asked.update(about, codec=codec, stream=output.add_stream(codec, **about))
            return asked["stream"]

        class Output:
            def __getattr__(self, name: str) -> Any:
                return add_stream if name == "add_stream" else getattr(output, name)

        return Output()

    monkeypatch.setattr(writing_module.av, "open", noting)
    tick = Fraction(1, 600)
    with VideoWriter(
        tmp_path / "out.mkv", 64, 48, Fraction(30000, 1001), tick=tick, **given
    ) as out:
        context = asked["stream"].codec_context
        assert (asked["options"], context.gop_size, context.thread_count) == (options, gop, threads)
        assert asked["codec"] == {"ffv1": "ffv1"}.get(given.get("codec", ""), "libx264")
        assert (asked["rate"], context.time_base) == (Fraction(30000, 1001), tick)
        out.write(numbered(2))
        assert out.count == 2


@pytest.mark.parametrize(
    ("name", "fragmented", "container", "flags"),
    [
        ("a.mp4", False, "mp4", "faststart"), ("a.mov", False, "mov", "faststart"),
        ("a.mkv", False, "matroska", None), (None, False, "mp4", None),
        ("a.m4v", False, "mp4", "faststart"), ("A.MOV", False, "mov", "faststart"),
        (None, True, "mp4", "frag_keyframe+empty_moov+default_base_moof"),
        ("a.mp4", True, "mp4", "frag_keyframe+empty_moov+default_base_moof"),
    ],
)  # fmt: skip
def test_a_container_is_opened_by_its_name_and_in_pieces_where_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str | None, fragmented: bool,
    container: str, flags: str | None,
) -> None:  # fmt: skip
    asked: list[tuple[Any, str, Any]] = []
    monkeypatch.setattr(
        writing_module.av, "open", lambda file, mode, **about: asked.append((file, mode, about))
    )
    out = VideoWriter.__new__(VideoWriter)
    out._path = None if name is None else tmp_path / name
    out._target = file = io.BytesIO() if name is None else tmp_path / f".{name}"
    out._open_output(fragmented)
    options = {} if flags is None else {"movflags": flags}
    where = file if name is None else f"file:{file}"
    assert asked == [(where, "w", {"format": container, "options": options})]


@pytest.mark.parametrize(("width", "height"), [(1, 2), (2, 1)])
def test_a_video_has_two_pixels_each_way(tmp_path: Path, width: int, height: int) -> None:
    with VideoWriter(tmp_path / "o.mkv", 2, 2, 8) as out:
        out.write(np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(VideoError, match=f"needs at least 2x2, got {width}x{height}"):
        VideoWriter(tmp_path / "p.mkv", width, height, 8)


@pytest.mark.parametrize(("fps", "fits"), [(0, False), (1000, True), (1001, False)])
def test_a_rate_is_asked_for_up_to_a_thousand(make_video: MakeVideo, fps: int, fits: bool) -> None:
    reader = read_frames(make_video(), fps=fps, count=1)
    if fits:
        assert next(reader).shape == (48, 64, 3)
    else:
        with pytest.raises(ValueError, match=rf"fps must lie in \(0, 1000\], got {fps}"):
            next(reader)


def test_a_place_that_may_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path, asked = tmp_path / "o.mp4", []

    def access(place: Path, rights: int) -> bool:
        asked.append((place, rights))
        return len(asked) > 1

    monkeypatch.setattr("data.video.output.os.access", access)
    with pytest.raises(VideoError, match=rf"o\.mp4: the folder {tmp_path} cannot be written"):
        check_output(path)
    check_output(path)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2
    with pytest.raises(
        VideoError, match=rf"is a folder; name a file in it, such as {tmp_path}/out"
    ):
        check_output(tmp_path)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left"), "x: the disk is full; free space and write again"),
        (OSError(errno.EACCES, "Permission denied", "y"), r"x: cannot be written \(Permission den"),
        (av.error.InvalidDataError(1, "bad data"), r"x: cannot be written \(bad data\)"),
    ],
)
def test_what_stops_a_writing_is_told_in_its_own_words(raised: Exception, said: str) -> None:
    with pytest.raises(VideoError, match=f"^{said}"), writing("x"):
        raise raised


@pytest.mark.parametrize(
    ("width", "height", "fits"),
    [
        (MAX_SIDE, 4096, True), (MAX_SIDE + 1, 1, False), (1, MAX_SIDE + 1, False),
        (8192, 8192, True), (8192, 8193, False),
    ],
)  # fmt: skip
def test_frames_are_read_up_to_a_size(width: int, height: int, fits: bool) -> None:
    context = SimpleNamespace(width=width, height=height)
    shown = SimpleNamespace(disposition=Disposition(0), codec_context=context)
    container: Any = SimpleNamespace(streams=SimpleNamespace(video=[shown]))
    if fits:
        assert video_stream(container, "x") is shown
        assert shown.codec_context.options == {"max_pixels": str(MAX_PIXELS)}
    else:
        with pytest.raises(VideoError, match=f"x: frames of {width}x{height} are more"):
            video_stream(container, "x")


def test_the_picture_is_the_one_that_players_show() -> None:
    def stream(disposition: Disposition, **about: Any) -> Any:
        context = SimpleNamespace(width=2, height=2)
        return SimpleNamespace(**{"codec_context": context} | about, disposition=disposition)

    def shown(*streams: Any) -> Any:
        container: Any = SimpleNamespace(streams=SimpleNamespace(video=list(streams)))
        return video_stream(container, "x")

    plain, other = stream(Disposition(0)), stream(Disposition(0))
    default = stream(Disposition.default)
    cover, thumbnail = stream(Disposition.attached_pic), stream(Disposition.timed_thumbnails)
    assert shown(cover, thumbnail, plain, other) is plain
    assert shown(plain, default) is default
    with pytest.raises(VideoError, match="x: has no video stream"):
        shown(cover, thumbnail)
    with pytest.raises(VideoError, match="x: its video codec is unknown to this ffmpeg"):
        shown(stream(Disposition(0), codec_context=None))


def test_colours_mean_what_their_tags_say() -> None:
    sizes = [(1280, 2), (1279, 576), (2, 577)]
    assert [usual_matrix(*size) for size in sizes] == [1, 6, 1]
    tags = {
        (16, 9): ("pq", "bt2020"), (16, 2): ("pq", "bt2020"), (16, 1): ("pq", "bt709"),
        (18, 12): ("hlg", "p3"), (18, 5): ("hlg", "bt709"), (18, 6): ("hlg", "bt709"),
        (1, 9): ("sdr", "bt2020"), (1, 11): ("sdr", "p3"), (1, 1): None, (2, 2): None, (6, 6): None,
    }  # fmt: skip
    frames: Any = [SimpleNamespace(color_trc=t, color_primaries=p) for t, p in tags]
    assert [mapping(frame) for frame in frames] == list(tags.values())

    def tagged(name: str, rgb: bool, matrix: int) -> bool:
        form = SimpleNamespace(name=name, is_rgb=rgb)
        frame: Any = SimpleNamespace(format=form, colorspace=matrix)
        return is_tagged(frame)

    assert [tagged("yuv420p", False, n) for n in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)] == [
        False, True, False, True, True, True, True, False, True, False,
    ]  # fmt: skip
    assert all(
        tagged(*about, 2) for about in (("gbrp", True), ("gray10le", False), ("pal8", False))
    )


def test_pixels_are_believed_up_to_a_shape() -> None:
    stated = [None, Fraction(0), Fraction(16), Fraction(17), Fraction(1, 16), Fraction(1, 17)]
    found = [pixel_aspect(SimpleNamespace(sample_aspect_ratio=aspect)) for aspect in stated]
    assert found == [1, 1, 16, 1, Fraction(1, 16), 1]
    frame = av.VideoFrame(7, 5, "rgb24")
    widths = [
        shown_size(frame, aspect)[0] for aspect in (Fraction(1), Fraction(9, 7), Fraction(1, 9))
    ]
    assert widths == [7, 8, 2]


@pytest.mark.parametrize(("codec", "page"), [("gif", 255), ("qtrle", 0)])
def test_how_colours_are_to_be_read_arrives_at_the_scaler(
    monkeypatch: pytest.MonkeyPatch, make_video: MakeVideo, codec: str, page: int
) -> None:
    made: list[Any] = []

    def scaler(size: Any, aspect: Any, **about: Any) -> Any:
        made.append((size, aspect, about))
        return lambda frame: np.zeros((1, 1, 3), np.uint8)

    path = make_video(pixel_aspect=Fraction(3, 2))
    real = reading.survey(path)
    found = SimpleNamespace(**{f: getattr(real, f) for f in real.__dataclass_fields__})
    found.codec = codec
    monkeypatch.setattr(reading, "Scaler", scaler)
    monkeypatch.setattr(reading, "survey", lambda path: found)
    list(read_frames(path, size=(9, 8), untagged=5, count=1))
    list(reading.read_timed(path, size=(7, 6)))
    assert made == [
        ((9, 8), Fraction(3, 2), {"untagged": 5, "page": page}),
        ((7, 6), Fraction(3, 2), {"untagged": None, "page": page}),
    ]


def test_a_video_of_ours_that_is_damaged_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with VideoWriter(buffer, 64, 48, 16, reproducible=True) as out:
        out.write(numbered(3))
    data = bytearray(buffer.getvalue())
    assert len(list(reading.read_own(io.BytesIO(bytes(data))))) == 3
    start = data.index(b"mdat") + 4
    data[start : start + 60] = b"\xff" * 60
    with pytest.raises(VideoError, match=r"is damaged|not a readable"):
        list(reading.read_own(io.BytesIO(bytes(data))))
