"""A look at an MP4's or MOV's index before a demuxer builds it: does it promise what can be there?

An index of a few bytes can state four thousand million frames of one size, and a demuxer then makes
a table of them. A frame has at least a byte, and a sample of sound a quarter.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

# ISO 14496-12. Those that hold others; those that state a number of frames, with its place.
HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"cmov"}
COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
UNPACKED = b"cmvd"  # a compressed index: states its size unpacked
FIRST = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip", b"pnot", b"sidx"}
MAX_UNPACKED = 64 * 2**20
MAX_BOXES = 1_000_000
MAX_FRAMES = 10_000_000  # of one track of pictures
A_BYTE = 4  # samples of sound: QuickTime counts those of 4:1 compression unpacked


def index_lie(file: BinaryIO) -> str | None:
    """What is wrong with the index of an MP4 or MOV; None also for other kinds of file."""
    file.seek(0)
    if file.read(8)[4:] not in FIRST:
        return None
    size = file.seek(0, 2)
    stated, handler = 0, b""
    for number, (kind, start, end) in enumerate(_boxes(file, 0, size)):
        if number == MAX_BOXES:
            return f"its index has more than {MAX_BOXES} parts"
        if kind == b"hdlr":
            file.seek(start + 8)
            handler = file.read(4)
        if kind in COUNTS or kind == UNPACKED:
            file.seek(start + COUNTS.get(kind, 0))
            data = file.read(min(4, end - start))
            count = int.from_bytes(data, "big")
            if kind == UNPACKED:
                if count > MAX_UNPACKED:
                    return f"its index is {count} bytes unpacked"
                continue
            stated += count
            most = MAX_FRAMES if handler == b"vide" else A_BYTE * size
            if count > most or stated > A_BYTE * size:
                return f"its index states {count} frames, more than a file of {size} bytes holds"
    return None


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end of what it holds) of every box, those inside others too."""
    ends = [end]
    while ends:
        if start + 8 > ends[-1]:
            start = ends.pop()
            continue
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head[:8])
        inside = start + 8
        if length == 1 and len(head) == 16:
            length, inside = struct.unpack(">Q", head[8:])[0], start + 16
        stop = ends[-1] if length == 0 else min(start + length, ends[-1])
        if stop < inside:
            start = ends.pop()  # no box is shorter than its head: what follows is no box
            continue
        yield kind, inside, stop
        if kind in HOLDERS:
            ends.append(stop)
            start = inside
        else:
            start = stop
