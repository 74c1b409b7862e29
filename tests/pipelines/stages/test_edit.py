from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import VideoError, VideoInfo, VideoWriter, probe, read_frames
from modeling.editor import StreamingEditor
from pipelines.stages.edit import edit_video, model_size, resize


@pytest.fixture(scope="module")
def editor(tiny_model: Path) -> StreamingEditor:
    return StreamingEditor.load(tiny_model)


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
    assert samples == pytest.approx(16000, abs=2 * 1024)


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
    assert np.abs(both[:, :, :64] - video).mean() < 6
    assert np.abs(both[:, :, 64:] - alone).mean() < 6


def test_seed_and_size_change_the_edit(editor: StreamingEditor, tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", frames(9, 48, 64), Fraction(16))

    def edited(name: str, **options: str | int) -> np.ndarray:
        edit_video(editor, source, tmp_path / name, "x", **options)  # type: ignore[arg-type]
        return np.stack(list(read_frames(tmp_path / name)))

    first = edited("a.mp4")
    assert np.array_equal(first, edited("b.mp4"))
    assert not np.array_equal(first, edited("c.mp4", seed=1))
    assert not np.array_equal(first, edited("d.mp4", size="source"))


def test_model_size_keeps_area_and_aspect() -> None:
    def info(width: int, height: int) -> VideoInfo:
        return VideoInfo(width, height, Fraction(16), 1, 1.0, False, "h264", 0)

    assert model_size("native", info(832, 480), (128, 192)) == (112, 208)
    assert model_size("native", info(480, 832), (480, 832)) == (832, 480)
    assert model_size("native", info(1920, 80), (128, 192)) == (32, 768)
    assert model_size("native", info(4000, 20), (16, 32)) == (16, 320)
    assert model_size("source", info(51, 33), (128, 192)) == (33, 51)
    assert model_size("96x160", info(51, 33), (128, 192)) == (96, 160)
    for wrong in ("big", "96", "0x64", "96x", "8x8", "-16x16"):
        with pytest.raises(ValueError, match="native, source, or height x width"):
            model_size(wrong, info(64, 64), (128, 192))


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
