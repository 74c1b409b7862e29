"""Videos into frames and back: any codec, rate, aspect, orientation and colour, in bounded memory.

`probe` says what a file is, `read_timed` and `read_frames` decode it frame by frame, `differences`
says what will not come out as it went in, and `VideoWriter` is the way back.

Imports of this tree the errors alone.
"""

from data.video.decode import Damage
from data.video.differs import differences
from data.video.errors import VideoError
from data.video.reading import (
    VideoInfo,
    check_whole,
    probe,
    read_frames,
    read_own,
    read_timed,
)
from data.video.writer import VideoWriter

__all__ = [
    "Damage",
    "VideoError",
    "VideoInfo",
    "VideoWriter",
    "check_whole",
    "differences",
    "probe",
    "read_frames",
    "read_own",
    "read_timed",
]
