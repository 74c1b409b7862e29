"""What will differ between a video and its edit, in one line a difference, before any work."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from data.video.output import output_format
from data.video.source.container import Source, open_video
from data.video.source.survey import Survey, survey
from data.video.source.tracks import plan_tracks

NAMED = {"mp4": "MP4", "mov": "QuickTime", "matroska": "Matroska"}
NAMES = {"pq": "HDR (PQ)", "hlg": "HDR (HLG)", "sdr": "wide gamut"}


def differences(
    source: Source, output: Path | None = None, *, fps: Fraction | float | None = None
) -> list[str]:
    """Lines such as "HDR (HLG) is mapped to SDR"; none when all stays as it is.

    Args:
        output: Where the edit goes; None is a fragmented MP4, as a server streams it.
        fps: The rate that was asked for, if any.

    Raises:
        VideoError: `source` cannot be read, or `output` has a suffix that stands for nothing.
    """
    found = survey(source)
    lines = [*_of_the_stream(found), *_of_the_picture(found)]
    if fps is not None:
        lines.append(_of_the_rate(found, Fraction(fps).limit_denominator(100_000)))
    kind = "mp4" if output is None else output_format(output)
    with open_video(source) as container:
        plan = plan_tracks(container, found, kind, fragmented=output is None)
    lines += [f"{converted}, which {NAMED[kind]} players know" for converted in plan.converted]
    if plan.left_out:
        lines.append(f"left out: {', '.join(plan.left_out)}")
    return [line for line in lines if line]


def _of_the_stream(found: Survey) -> list[str]:
    lines = []
    repairs = found.clock.repairs
    if repairs.back:
        lines.append(f"time stamps start anew {_times(repairs.back)}: the parts follow each other")
    if repairs.ahead:
        lines.append(
            f"time stamps jump ahead {_times(repairs.ahead)}, by {repairs.closed_s:,.0f} s in all: "
            "the holes are closed"
        )
    if found.disordered:
        lines.append("time stamps are out of order: frames keep the order of the picture")
    if found.undecodable:
        lines.append(
            f"the picture starts in the middle: its first {found.undecodable} frames need others "
            "that are not in the file"
        )
    if found.cut_off is not None:
        lines.append(f"the file is cut off: {found.cut_off}")
    return lines


def _of_the_picture(found: Survey) -> list[str]:
    look, lines = found.look, []
    if look.tones is not None:
        lines.append(f"{NAMES[look.tones[0]]} is mapped to SDR BT.709")
    if look.interlaced:
        lines.append("interlaced: made whole, one frame for two fields")
    if look.transparent:
        lines.append("transparency is not kept: it is shown over a plain page")
    if look.resized:
        lines.append(f"pixels become square: {look.width}x{look.height}")
    return lines


def _of_the_rate(found: Survey, fps: Fraction) -> str:
    constant = found.rate.constant
    if constant and found.fps == fps:
        return ""
    kind = "constant" if constant else "variable, on average"
    return f"the rate becomes {float(fps):g} frames a second; it is {kind} {float(found.fps):.4g}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
