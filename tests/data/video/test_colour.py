"""data/video/source/colour.py, upright.py: what a frame's colours mean, as players take them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from data.pairs import PairList
from data.video import VideoWriter, differences, read_frames
from data.video.source.colour import to_screen
from tests.data.conftest import edited_middle

BT709, BT601, UNTAGGED, BT2020 = 1, 6, 2, 9
RED, SKIN, GREY, WHITE = (220, 30, 20), (200, 120, 90), (128, 128, 128), (255, 255, 255)


def patches(height: int, width: int, colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """One column a colour, uint8 [height, width, 3]."""
    picture = np.zeros((height, width, 3), np.uint8)
    step = width // len(colours)
    for n, colour in enumerate(colours):
        picture[:, n * step : (n + 1) * step] = colour
    return picture


def measured(picture: np.ndarray, count: int) -> np.ndarray:
    """The middle of each column, float [count, 3]."""
    step = picture.shape[1] // count
    rows = slice(picture.shape[0] // 4, -picture.shape[0] // 4)
    columns = [
        picture[rows, n * step + step // 4 : (n + 1) * step - step // 4] for n in range(count)
    ]
    return np.array([c.reshape(-1, 3).mean(axis=0) for c in columns])


def write_tagged(
    path: Path, picture: np.ndarray, *, matrix: int, tag: int, frames: int = 3
) -> Path:
    """Lossless, made with one matrix and tagged with one that may be another, or none."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv444p"
        context = stream.codec_context
        context.colorspace, context.color_range = tag, ColorRange.MPEG
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv444p", dst_colorspace=matrix, dst_color_range="MPEG"
        )
        for n in range(frames):
            frame.colorspace, frame.pts = tag, n
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [(720, 1280, BT709), (480, 640, BT601), (576, 720, BT601), (1280, 720, BT709)],
)
def test_untagged_colours_are_read_by_size(
    tmp_path: Path, height: int, width: int, matrix: int
) -> None:
    picture = patches(height, width, (RED, SKIN, GREY))
    path = write_tagged(tmp_path / "a.mp4", picture, matrix=matrix, tag=UNTAGGED, frames=1)
    back = measured(next(read_frames(path)), 3)
    np.testing.assert_allclose(back, [RED, SKIN, GREY], atol=2)


@pytest.mark.parametrize("matrix", [BT709, BT601])
def test_a_tag_counts_more_than_the_size(tmp_path: Path, matrix: int) -> None:
    picture = patches(96, 192, (RED, SKIN, GREY))
    path = write_tagged(tmp_path / "a.mp4", picture, matrix=matrix, tag=matrix)
    np.testing.assert_allclose(measured(next(read_frames(path)), 3), [RED, SKIN, GREY], atol=2)


@pytest.mark.parametrize(("first", "second"), [(BT709, UNTAGGED), (UNTAGGED, BT709)])
def test_a_pair_is_read_by_one_rule(tmp_path: Path, first: int, second: int) -> None:
    """The same picture, once with its tag and once without: only the edit differs."""
    picture = patches(96, 192, (RED, SKIN, (30, 230, 40)))
    for name, frame, tag in (("a", picture, first), ("b", edited_middle(picture), second)):
        write_tagged(tmp_path / f"{name}.mp4", frame, matrix=BT709, tag=tag, frames=9)
    entry = {"instruction": "x", "source_path": "a.mp4", "edited_path": "b.mp4"}
    (tmp_path / "pairs.json").write_text(json.dumps([entry]))
    (pair,) = PairList(tmp_path / "pairs.json", fps=16, frames=9, height=96, width=192)
    same = pair.source[0].astype(int)[:24] - pair.target[0][:24]  # above the edit
    assert np.abs(same).max() <= 2
    share = (edited_middle(picture) != picture).any(axis=-1).mean()
    assert pair.mask.mean() == pytest.approx(share, abs=0.02)


def test_both_untagged_files_of_a_pair_are_read_by_the_larger(tmp_path: Path) -> None:
    """An edit that came out smaller than its HD source is still BT.709."""
    source, edit = patches(720, 1280, (RED, SKIN)), patches(360, 640, (RED, SKIN))
    write_tagged(tmp_path / "a.mp4", source, matrix=BT709, tag=UNTAGGED, frames=9)
    write_tagged(tmp_path / "b.mp4", edit, matrix=BT709, tag=UNTAGGED, frames=9)
    entry = {"instruction": "x", "source_path": "a.mp4", "edited_path": "b.mp4"}
    (tmp_path / "pairs.json").write_text(json.dumps([entry]))
    (pair,) = PairList(tmp_path / "pairs.json", fps=16, frames=9, height=96, width=176)
    assert pair.mask.mean() == 0
    np.testing.assert_allclose(measured(pair.target[0], 2), [RED, SKIN], atol=2)


def write_hdr(path: Path, signal: np.ndarray, transfer: int) -> Path:
    """10 bit BT.2020 from RGB signals, float [height, width, 3] in 0 to 1."""
    rgb = np.round(np.clip(signal, 0, 1) * 65535).astype(np.uint16)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], "yuv444p10le"
        context = stream.codec_context
        context.colorspace, context.color_range = BT2020, ColorRange.MPEG
        context.color_trc, context.color_primaries = transfer, BT2020
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb48le")
        frame = frame.reformat(format="yuv444p10le", dst_colorspace=BT2020, dst_color_range="MPEG")
        for n in range(3):
            frame.pts = n
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


# BT.709 to BT.2020 in linear light, as ITU-R BT.2087 prints it.
WIDER = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def pq(colours: np.ndarray) -> np.ndarray:
    """SDR colours on a white of 203 nits as PQ signals (ST 2084)."""
    light = (colours / 255) ** 2.4 @ WIDER.T * 203 / 10_000
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    return ((c1 + c2 * light**m1) / (1 + c3 * light**m1)) ** m2


def hlg(colours: np.ndarray) -> np.ndarray:
    """The same as HLG signals for a screen of 1000 nits (BT.2100)."""
    shown = (colours / 255) ** 2.4 @ WIDER.T * 203 / 1000
    luminance = np.maximum(shown @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
    scene = shown * luminance ** (1 / 1.2 - 1)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


@pytest.mark.parametrize(("name", "transfer", "signal"), [("PQ", 16, pq), ("HLG", 18, hlg)])
def test_hdr_becomes_sdr(tmp_path: Path, name: str, transfer: int, signal: object) -> None:
    colours = (RED, SKIN, GREY, (20, 90, 30), (60, 140, 200), WHITE)
    picture = patches(64, 384, colours)
    path = write_hdr(tmp_path / "a.mp4", signal(picture.astype(float)), transfer)  # type: ignore[operator]
    back = measured(next(read_frames(path)), 6)
    np.testing.assert_allclose(back[:5], colours[:5], atol=4)
    # White is where the shoulder for highlights begins to bend, and stays grey.
    np.testing.assert_allclose(back[5], 244, atol=2)
    assert f"HDR ({name}) is mapped to SDR BT.709" in differences(path)


def test_highlights_keep_their_order_up_to_1000_nits() -> None:
    nits = np.array([100, 203, 300, 400, 600, 990])
    light = nits / 10_000
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    signal = ((c1 + c2 * light**m1) / (1 + c3 * light**m1)) ** m2
    grey = np.repeat(np.round(signal * 65535).astype(np.uint16)[None, :, None], 3, axis=2)
    shown = to_screen(grey, "pq", "bt2020")[0, :, 0].astype(int)
    assert (np.diff(shown) > 0).all(), shown
    assert shown[0] == pytest.approx(255 * (100 / 203) ** (1 / 2.4), abs=1)
    assert shown[-1] == 255


# To BT.709 in linear light, as printed by others (BT.2087; ICC's of Display P3).
NARROWER = {
    "bt709": np.eye(3),
    "bt2020": np.linalg.inv(WIDER),
    "p3": np.array([[1.2249, -0.2249, 0], [-0.0421, 1.0421, 0], [-0.0196, -0.0786, 1.0982]]),
}


def on_screen(signal: np.ndarray, transfer: str, primaries: str) -> np.ndarray:
    """What the module's first lines say of signals [..., 3] in 0 to 1, at full precision."""
    if transfer == "pq":
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        root = signal ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * 10_000 / 203
    elif transfer == "hlg":
        high = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(signal <= 0.5, signal**2 / 3, high)
        luminance = scene @ [0.2627, 0.6780, 0.0593]
        light = scene * luminance[..., None] ** 0.2 * 1000 / 203
    else:
        light = signal**2.4
    light = np.maximum(light @ NARROWER[primaries].T, 0)
    if transfer != "sdr":
        largest = light.max(axis=-1, keepdims=True)
        over, top = (largest - 0.8) / 0.2, (1000 / 203 - 0.8) / 0.2
        bent = 0.8 + 0.2 * over * (1 + over / top**2) / (1 + over)
        light = light * np.where(largest < 0.8, 1, bent / np.maximum(largest, 1e-9))
    return np.asarray(255 * np.minimum(light, 1) ** (1 / 2.4))


@pytest.mark.parametrize("primaries", NARROWER)
@pytest.mark.parametrize("transfer", ["pq", "hlg", "sdr"])
def test_every_signal_is_shown_as_the_standards_say(transfer: str, primaries: str) -> None:
    """More rows than are worked on at a time, each channel the largest somewhere."""
    signal = np.random.default_rng(0).uniform(0.02, 1, (37, 60, 3)) ** 1.3
    signal[0] = np.linspace(0, 1, 60)[:, None]  # greys, from black to the brightest
    shown = to_screen(np.round(signal * 65535).astype(np.uint16), transfer, primaries)
    off = np.abs(shown - on_screen(signal, transfer, primaries))
    assert off[0].max() <= 1
    # Where a channel is nearly clipped away, a rounding of the matrix is some levels.
    assert np.quantile(off, 0.99) <= 1.5


def test_a_wide_gamut_comes_back_to_bt709(tmp_path: Path) -> None:
    picture = patches(64, 192, (RED, SKIN, GREY))
    light = (picture / 255) ** 2.4 @ WIDER.T
    path = write_hdr(tmp_path / "a.mp4", light ** (1 / 2.4), BT709)
    np.testing.assert_allclose(measured(next(read_frames(path)), 3), [RED, SKIN, GREY], atol=3)


def test_what_goes_out_is_tagged_as_it_is(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "o.mp4", 64, 48, 16) as writer:
        writer.write(np.full((2, 48, 64, 3), 90, np.uint8))
    with av.open(str(tmp_path / "o.mp4")) as container:
        frame = next(container.decode(video=0))
        tags = (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
    assert tags == (1, 1, 1, 1)


def test_transparency_is_shown_on_black(tmp_path: Path) -> None:
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[..., 0], picture[:, :24, 3] = 200, 255  # red, seen on the left, gone on the right
    picture[:8, :, 3] = 128
    with av.open(str(tmp_path / "a.mov"), "w") as output:
        stream = output.add_stream("qtrle", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "argb"
        frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="argb")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    shown = next(read_frames(tmp_path / "a.mov")).astype(int)
    assert shown[20, 10].tolist() == [200, 0, 0]
    assert shown[20, 40].tolist() == [0, 0, 0]
    assert abs(shown[2, 10, 0] - 100) <= 1
    assert any("transparency" in line for line in differences(tmp_path / "a.mov"))
