from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data.video import (
    Damage,
    VideoError,
    VideoInfo,
    VideoWriter,
    probe,
    read_frames,
    read_timed,
)
from modeling.editor import StreamingEditor
from pipelines.stages import edit_file as edit_module
from pipelines.stages.edit_file import (
    check_edit,
    edit_file,
    edit_video,
    expected_frames,
    reported,
    resize,
)
from tests.known_editors import block_clip, expected_edit, known_editor


@pytest.fixture(scope="module")
def editor(tiny_model: Path) -> StreamingEditor:
    return StreamingEditor.load(tiny_model)


SAME = 3  # mean levels that H.264 costs the middle of a block; another frame costs 20 and more


def frames(count: int, height: int, width: int) -> np.ndarray:
    """A bright square that moves over a gradient, uint8 [count, height, width, 3]."""
    video = np.tile(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, 1, 3))
    video = np.repeat(video[None], count, axis=0)
    for n in range(count):
        video[n, 4:12, (3 * n) % (width - 8) : (3 * n) % (width - 8) + 8] = 250
    return video


def write(path: Path, video: np.ndarray, fps: Fraction) -> Path:
    with VideoWriter(path, video.shape[2], video.shape[1], fps) as writer:
        writer.write(video)
    return path


def with_sound(path: Path, seconds: float) -> Path:
    """A video of 30 frames a second with a tone, of a codec that is not H.264."""
    with av.open(str(path), "w") as out:
        picture = out.add_stream("mpeg4", rate=30)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=16000)
        for image in frames(int(seconds * 30), 48, 64):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(picture.encode(None))
        tone = np.sin(np.arange(int(seconds * 16000)) / 16).astype(np.float32)
        for first in range(0, len(tone), 1024):
            block = av.AudioFrame.from_ndarray(
                tone[None, first : first + 1024], format="fltp", layout="mono"
            )
            block.sample_rate, block.pts = 16000, first
            out.mux(sound.encode(block))
        out.mux(sound.encode(None))
    return path


@pytest.mark.parametrize(("count", "height", "width"), [(9, 48, 64), (23, 33, 51), (1, 40, 30)])
def test_length_rate_and_size_are_kept(
    editor: StreamingEditor, tmp_path: Path, count: int, height: int, width: int
) -> None:
    fps = Fraction(30000, 1001)
    source = write(tmp_path / "in.mp4", frames(count, height, width), fps)
    seen: list[int] = []
    report = edit_video(editor, source, tmp_path / "out.mp4", "x", progress=seen.append)
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height, info.fps) == (width, height, fps)
    assert len(list(read_frames(tmp_path / "out.mp4"))) == report.frames == seen[-1] == count
    assert 0 < report.recomputed <= 1


def test_sound_and_other_codecs(editor: StreamingEditor, tmp_path: Path) -> None:
    source = with_sound(tmp_path / "in.mkv", 1.0)
    edit_video(editor, source, tmp_path / "out.mp4", "x")
    before, after = probe(source), probe(tmp_path / "out.mp4")
    assert before.codec == "mpeg4"
    assert after.has_audio
    assert after.fps == before.fps
    assert len(list(read_frames(tmp_path / "out.mp4"))) == 30
    with av.open(str(tmp_path / "out.mp4")) as file:
        samples = sum(frame.samples for frame in file.decode(audio=0))
    assert samples == pytest.approx(16000, abs=2 * 1024)  # a packet's padding at either end
    assert after.duration == pytest.approx(before.duration, abs=0.4 / 30)


def test_side_by_side_holds_the_source_beside_the_edit(
    editor: StreamingEditor, tmp_path: Path
) -> None:
    video = frames(13, 48, 64)
    source = write(tmp_path / "in.mp4", video, Fraction(16))
    edit_video(editor, source, tmp_path / "out.mp4", "x", side_by_side=True)
    edit_video(editor, source, tmp_path / "alone.mp4", "x")
    both = np.stack(list(read_frames(tmp_path / "out.mp4"))).astype(int)
    alone = np.stack(list(read_frames(tmp_path / "alone.mp4"))).astype(int)
    assert both.shape == (13, 48, 128, 3)
    assert_same(both[:, :, :64], video)
    assert_same(both[:, :, 64:], alone)


def test_seed_and_size_change_the_edit(editor: StreamingEditor, tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", frames(9, 48, 64), Fraction(16))

    def edited(name: str, **options: str | int) -> np.ndarray:
        edit_video(editor, source, tmp_path / name, "x", **options)  # type: ignore[arg-type]
        return np.stack(list(read_frames(tmp_path / name)))

    first = edited("a.mp4")
    assert np.array_equal(first, edited("b.mp4"))
    assert not np.array_equal(first, edited("c.mp4", seed=1))
    assert not np.array_equal(first, edited("d.mp4", work_size="full"))
    assert not np.array_equal(first, edited("e.mp4", detail="off"))


def exact(path: Path, video: np.ndarray, fps: Fraction = Fraction(16)) -> Path:
    """A file that holds these very frames."""
    with VideoWriter(
        path, video.shape[2], video.shape[1], fps, codec="ffv1", pixel_format="bgr0"
    ) as out:
        out.write(video)
    return path


def read(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path))).astype(int)


def middles(video: np.ndarray) -> np.ndarray:
    """A pixel of each block of `block_clip`: 4:2:0 blurs the colours of their borders."""
    return video[:, 3::8, 3::8].astype(int)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """The same pictures, but for what H.264 costs."""
    assert found.shape == wanted.shape
    error = np.abs(middles(found) - middles(wanted)).mean(axis=(1, 2, 3))
    assert error.max() < SAME, f"levels off, by frame: {error.round(1).tolist()}"
    shift = (middles(found) - middles(wanted)).mean(axis=(1, 2))
    assert np.abs(shift).max() < SAME, "colours are shifted"


@pytest.mark.parametrize("prompt", ["leave it", "paint it red", "green and blue"])
@pytest.mark.parametrize(("count", "height", "width"), [(1, 48, 64), (23, 41, 67), (33, 64, 96)])
def test_the_file_holds_the_edit_in_its_place_time_and_colours(
    tmp_path: Path, prompt: str, count: int, height: int, width: int
) -> None:
    video = block_clip(count, height, width, seed=count)
    source = exact(tmp_path / "in.mkv", video)
    edit_video(known_editor(), source, tmp_path / "out.mp4", prompt, work_size="full")
    found, wanted = read(tmp_path / "out.mp4"), expected_edit(video, prompt)
    assert_same(found, wanted)
    # A neighbouring frame, a mirrored picture, another colour order are all far away.
    others = [np.roll(wanted, 1, 0), wanted[:, ::-1], wanted[:, :, ::-1], wanted[..., ::-1]]
    for other in others[count == 1 :]:
        assert np.abs(middles(found) - middles(other)).mean() > 5 * SAME


@pytest.mark.parametrize("prompt", ["leave it", "paint it red"])
def test_an_edit_at_another_size_is_shown_at_the_source_s(tmp_path: Path, prompt: str) -> None:
    video = block_clip(9, 32, 48).repeat(2, 1).repeat(2, 2)  # blocks of 16, edited as blocks of 8
    source = exact(tmp_path / "in.mkv", video)
    report = edit_video(
        known_editor(), source, tmp_path / "out.mp4", prompt, work_size="48x32", detail="off"
    )
    assert (report.height, report.width) == (32, 48)
    small = np.stack([resize(frame, 32, 48) for frame in video])
    wanted = np.stack([resize(frame, 64, 96) for frame in expected_edit(small, prompt)])
    assert_same(read(tmp_path / "out.mp4"), wanted)


def test_the_report_is_of_this_edit(tmp_path: Path) -> None:
    source = exact(tmp_path / "in.mkv", block_clip(21, 48, 64))
    editor = known_editor()
    report = edit_video(editor, source, tmp_path / "out.mp4", "paint it red", work_size="64x48")
    stream = editor.open("paint it red", height=48, width=64)
    shares = [chunk.recomputed for chunk in stream.push(block_clip(21, 48, 64))]
    assert report.recomputed == pytest.approx(np.mean(shares))
    assert shares[0] != shares[1]
    assert (report.frames, report.height, report.width) == (21, 48, 64)
    assert report.fps == report.frames / report.seconds


def test_an_editor_may_hold_frames_back(tmp_path: Path) -> None:
    """Frames stay beside their own edits, and progress counts what is written."""
    video = block_clip(11, 34, 50)
    source = exact(tmp_path / "in.mkv", video, Fraction(25))
    sizes, seen = set(), []

    def late(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        held = []
        for frame in frames:
            sizes.add(frame.shape)
            held.append(255 - frame)
            if len(held) > 6:
                yield held.pop(0)
        yield from held

    out = tmp_path / "out.mp4"
    done = edit_file(late, source, out, (34, 50), side_by_side=True, progress=seen.append)
    assert (done, seen, sizes) == (11, list(range(1, 12)), {(34, 50, 3)})
    found = read(out)
    assert probe(out).fps == 25
    assert_same(found[:, :, :50], video)
    assert_same(found[:, :, 50:], 255 - video)


def test_a_variable_rate_keeps_every_frame_at_its_time(tmp_path: Path) -> None:
    # 16 frames in the first half of two seconds and 8 in the second.
    times = [Fraction(n, 16) for n in range(16)] + [1 + Fraction(n, 8) for n in range(8)]
    video = block_clip(24, 32, 48)
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264rgb", rate=12, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb24"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(video, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    edit_file(lambda frames: frames, source, tmp_path / "out.mp4", (32, 48))
    found = list(read_timed(tmp_path / "out.mp4"))
    assert [float(t) for t, _ in found] == pytest.approx([float(t) for t in times], abs=1e-3)
    assert_same(np.stack([picture for _, picture in found]), video)


def test_a_file_is_of_the_rate_that_is_asked_for_else_of_that_of_most_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the mean of a screen recording, which stands still most of the time."""
    source = write(tmp_path / "in.mp4", block_clip(8, 32, 48), Fraction(8))
    info, told = probe(source), []

    class Writer(VideoWriter):
        def __init__(self, file: Path, width: int, height: int, fps: float, **more: Any) -> None:
            told.append((fps, more["tick"]))
            super().__init__(file, width, height, fps, **more)

    monkeypatch.setattr(edit_module, "VideoWriter", Writer)
    for asked, bulk in ((None, None), (None, Fraction(16)), (4, Fraction(16))):
        monkeypatch.setattr(edit_module, "probe", lambda path, b=bulk: replace(info, bulk_fps=b))
        edit_file(lambda frames: frames, source, tmp_path / "out.mp4", (32, 48), fps=asked)
    assert told == [(8, info.tick), (16, info.tick), (4, None)]


def test_reader_writer_and_report_share_their_damage_and_strictness_is_heard_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.mp4", block_clip(3, 32, 48), Fraction(8))
    told: dict[str, Any] = {}

    def noting(name: str, real: Any, *given: Any, **named: Any) -> Any:
        told[name] = named
        return real(*given, **named)

    for name in ("read_timed", "VideoWriter"):
        monkeypatch.setattr(edit_module, name, partial(noting, name, getattr(edit_module, name)))
    where = source, tmp_path / "out.mp4", (32, 48)
    report = reported(lambda frames: frames, *where, [0.5, 1.0], work=(16, 24), strict=True)
    assert told["read_timed"]["damage"] is told["VideoWriter"]["damage"] is report.damage
    assert told["read_timed"]["strict"]  # not hours later, when all is edited
    assert (report.frames, report.recomputed, report.height, report.width) == (3, 0.75, 16, 24)


def test_a_rate_that_is_asked_for_is_constant(tmp_path: Path) -> None:
    video = block_clip(20, 32, 48)
    source = write(tmp_path / "in.mp4", video, Fraction(20))
    done = edit_file(lambda frames: frames, source, tmp_path / "out.mp4", (32, 48), fps=10)
    assert done == 10
    assert probe(tmp_path / "out.mp4").fps == 10
    assert_same(read(tmp_path / "out.mp4"), video[::2])
    # Not on the ticks of the source, on which no third of a second lies.
    edit_file(lambda frames: frames, source, tmp_path / "slow.mp4", (32, 48), fps=3)
    times = [time for time, _ in read_timed(tmp_path / "slow.mp4")]
    assert times == [Fraction(n, 3) for n in range(3)]


def test_strict_refuses_a_damaged_source_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", block_clip(40, 32, 48), Fraction(20))
    whole = source.read_bytes()
    middle = whole.index(b"mdat") + 1200
    source.write_bytes(whole[:middle] + bytes(400) + whole[middle + 400 :])
    out, damage = tmp_path / "out.mp4", Damage()
    edit_file(lambda frames: frames, source, out, (32, 48), damage=damage)
    assert damage
    out.unlink()
    with pytest.raises(VideoError, match=r"in\.mp4: .*damaged"):
        edit_file(lambda frames: frames, source, out, (32, 48), strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_strict_hears_what_is_found_after_the_last_frame(tmp_path: Path) -> None:
    """As sound is that is copied beside the last frames."""
    source = write(tmp_path / "in.mp4", block_clip(5, 32, 48), Fraction(20))
    out, told = tmp_path / "out.mp4", Damage()

    def edit(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        yield from frames
        told.sound += 1

    with pytest.raises(VideoError, match=r"in\.mp4: is damaged: .*without --strict"):
        edit_file(edit, source, out, (32, 48), strict=True, damage=told)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    assert edit_file(edit, source, out, (32, 48), damage=told) == 5


def test_expected_frames_is_what_will_come() -> None:
    def info(frames: int | None, duration: float) -> VideoInfo:
        return VideoInfo(64, 48, Fraction(25), frames, duration, False, "h264", 0)

    assert expected_frames(info(7, 99.0)) == 7
    assert expected_frames(info(None, 2.0)) == 50
    assert expected_frames(info(None, 0.0)) == 1
    assert expected_frames(info(7, 2.0), fps=10) == 20  # at a rate of its own


def test_mistakes_are_named_before_anything_is_written(
    editor: StreamingEditor, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.mp4", frames(9, 48, 64), Fraction(16))
    out = tmp_path / "out.mp4"
    with pytest.raises(ValueError, match="prompt is empty"):
        edit_video(editor, source, out, "  ")
    with pytest.raises(ValueError, match="is the source itself"):
        edit_video(editor, source, source, "x")
    with pytest.raises(ValueError, match="no folder"):
        edit_video(editor, source, tmp_path / "nowhere" / "out.mp4", "x")
    with pytest.raises(VideoError, match="no such file"):
        edit_video(editor, tmp_path / "nothing.mp4", out, "x")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4: not a readable video"):
        edit_video(editor, text, out, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "text.mp4"]


@pytest.mark.parametrize(
    ("output", "prompt", "match"),
    [
        ("out.mp4", " ", "prompt is empty"),
        ("in.mp4", "x", "is the source itself"),
        ("nowhere/out.mp4", "x", "no folder"),
        ("out.gif", "x", "cannot hold"),
    ],
)
def test_what_needs_no_model_to_be_seen_is_seen_without_one(
    output: str, prompt: str, match: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.mp4"
    source.touch()
    with pytest.raises(ValueError, match=match):
        check_edit(source, tmp_path / output, prompt)
    check_edit(source, tmp_path / "out.mp4", "x")


def test_interrupted_edit_leaves_the_older_result(editor: StreamingEditor, tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", frames(33, 48, 64), Fraction(16))
    out = tmp_path / "out.mp4"
    out.write_bytes(b"older")

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_video(editor, source, out, "x", progress=stop)
    assert out.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_resize_there_and_back_is_close() -> None:
    image = frames(1, 64, 96)[0]
    assert resize(image, 64, 96) is image
    back = resize(resize(image, 128, 192), 64, 96).astype(int)
    assert np.abs(back - image).mean() < 2
