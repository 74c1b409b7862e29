"""Small videos of every awkward kind, written with PyAV, and a real S3 server."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import s3fs

from data.sample import EncodedPair, Pair
from data.shards import write_dataset
from data.store import Store
from data.synthetic import make_pair

MakeVideo = Callable[..., Path]


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that can be told apart after lossy coding: gray level 12 n + 4 and a bright corner."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (12 * np.arange(count) + 4)[:, None, None, None]
    frames[:, : height // 4, : width // 4] = (250, 30, 30)  # red upper left corner
    return frames


def edited_middle(frames: np.ndarray) -> np.ndarray:
    """The same, uint8 [..., height, width, 3], with a blue square in the middle."""
    out = frames.copy()
    height, width = frames.shape[-3:-1]
    out[..., height // 3 : height // 2, width // 3 : width // 2, :] = (20, 30, 240)
    return out


def number_of(frame: np.ndarray) -> int:
    """Which frame of `numbered` this is, from its lower right quarter."""
    height, width = frame.shape[:2]
    level = frame[height // 2 :, width // 2 :].mean()
    return round((level - 4) / 12)


def write_raw(
    path: Path,
    frames: np.ndarray,
    *,
    fps: Fraction | int = 16,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[Fraction] | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    audio: str | None = None,
    audio_seconds: float | None = None,
    beeps: Sequence[float] = (),
    gop: int | None = None,
) -> Path:
    """A video straight through PyAV, independent of the writer under test."""
    with av.open(str(path), "w") as output:
        options = {"crf": "4"} if codec == "libx264" else {}
        stream = output.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if codec not in ("libx264", "ffv1"):
            stream.bit_rate = 4_000_000
        if gop is not None:
            stream.gop_size = gop
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = None
        if audio is not None:
            sound = output.add_stream(audio, rate=48000)
            sound.layout = "mono"
        for n, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            if times is None:
                frame.pts, frame.time_base = n, 1 / Fraction(fps)
            else:
                frame.pts, frame.time_base = round(times[n] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            seconds = audio_seconds or len(frames) / float(fps)
            time = np.arange(int(48000 * seconds)) / 48000
            wave = np.sin(time * 2 * np.pi * 440)
            if beeps:  # heard for an eighth of a second from each, instead of all the time
                wave *= np.any([(time >= t) & (time < t + 0.125) for t in beeps], axis=0)
            block = av.AudioFrame.from_ndarray(
                (wave * 8000).astype(np.int16)[None], format="s16", layout="mono"
            )
            block.sample_rate, block.pts, block.time_base = 48000, 0, Fraction(1, 48000)
            output.mux(sound.encode(block))
            output.mux(sound.encode(None))
    return path


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    def make(name: str = "in.mp4", frames: np.ndarray | None = None, **options: object) -> Path:
        return write_raw(tmp_path / name, numbered(16) if frames is None else frames, **options)  # type: ignore[arg-type]

    return make


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one bucket; `root` is where it keeps its files."""

    endpoint: str
    bucket: str
    root: Path
    process: subprocess.Popen[bytes]


ACCESS_KEY, SECRET_KEY = "liveedit-test", "a-secret-for-tests-only"


def start_s3(root: Path) -> S3Server:
    """Starts nanio, a small real S3 server: it checks signatures, ranges and multipart uploads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (root / "bucket").mkdir(parents=True)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port)),
            *("--data-dir", str(root), "--log-level", "error", "--no-access-log"),
        ],
        env={**os.environ, "NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": SECRET_KEY},
    )
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return S3Server(f"http://127.0.0.1:{port}", "bucket", root, process)
        assert process.poll() is None, "the S3 server ended while starting"
        assert time.monotonic() < deadline, "the S3 server did not start within a minute"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = start_s3(tmp_path_factory.mktemp("s3"))
    yield server
    server.process.terminate()
    server.process.wait(10)


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with this process pointed at it the way every AWS tool is."""
    point_at(s3_process.endpoint, monkeypatch)
    yield s3_process
    s3fs.S3FileSystem.clear_instance_cache()


def point_at(
    endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    key: str | None = ACCESS_KEY,
    secret: str | None = SECRET_KEY,
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if key is not None and secret is not None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3fs.S3FileSystem.clear_instance_cache()


def small_pair(seed: int) -> Pair:
    return make_pair(seed, height=32, width=48, frames=5)


def small_encoded(seed: int) -> EncodedPair:
    rng = np.random.default_rng(seed)
    return EncodedPair(
        source=rng.standard_normal((2, 16, 4, 6)).astype(np.float32),
        target=rng.standard_normal((2, 16, 4, 6)).astype(np.float16),
        text=rng.standard_normal((24, 8)).astype(np.float32),
        instruction=f"edit number {seed}",
        fps=16.0,
        video_shape=(5, 32, 48),
        origin={"seed": seed},
    )


def write_small(uri: Path, count: int = 7, per_shard: int = 3, **options: object) -> Path:
    samples = [functools.partial(small_pair, seed) for seed in range(count)]
    write_dataset(uri, samples, made_by={"by": "test"}, samples_per_shard=per_shard, **options)  # type: ignore[arg-type]
    return uri


class Far(Store):
    """A store on this disk whose shards are fetched, as S3's are."""

    remote = True

    def fetch(self, name: str, local: Path) -> Path:
        return local if local.exists() else Path(shutil.copy(self.root / name, local))
