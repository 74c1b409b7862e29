"""Half an hour of video: exact to the frame, with sound in its place, in little memory."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import probe

FPS = Fraction(24000, 1001)
FRAMES = round(1800 * FPS)
# Bytes more than a process that has only imported; all frames are 126 MiB.
LIMIT = 80 * 2**20

PASS_THROUGH = """
import resource, sys
from data.video import VideoWriter, probe, read_timed
path, out = sys.argv[1:]
unit = 1 if sys.platform == "darwin" else 1024
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
info = probe(path)
with VideoWriter(
    out, info.width, info.height, info.fps, preset="ultrafast", audio_from=path, tick=info.tick
) as writer:
    for time, frame in read_timed(path):
        writer.write(frame[None], [time])
print(writer.count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - start)
"""


def write_long(path: Path) -> Path:
    """Matroska, whose stamps are whole milliseconds: 23.976 does not fit into them."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        sound = output.add_stream("aac", rate=8000)
        sound.layout, sound.bit_rate = "mono", 8000
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        heard = 0
        for n in range(FRAMES):
            frame.pts, frame.time_base = n, 1 / FPS
            output.mux(stream.encode(frame))
            while heard / 8000 < n / FPS:
                silence.pts = heard
                output.mux(sound.encode(silence))
                heard += 1024
        output.mux(stream.encode(None))
        output.mux(sound.encode(None))
    return path


@pytest.mark.slow
def test_half_an_hour_is_exact_to_the_frame(tmp_path: Path) -> None:
    source, out = write_long(tmp_path / "in.mkv"), tmp_path / "out.mp4"
    run = subprocess.run(
        [sys.executable, "-c", PASS_THROUGH, source, out],
        check=True,
        capture_output=True,
        text=True,
    )
    count, used = map(int, run.stdout.split())
    assert count == FRAMES
    assert used < LIMIT
    info = probe(out)
    assert (info.fps, info.frames) == (FPS, FRAMES)
    assert info.duration == pytest.approx(float(FRAMES / FPS), abs=1e-3)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        stamps = sorted(p.pts for p in container.demux(stream) if p.size)
        times = [stamp * stream.time_base * FPS for stamp in stamps]
    assert times == list(range(FRAMES))
