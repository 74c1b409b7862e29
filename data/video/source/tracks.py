"""What of a video's other tracks an output can take: sound, subtitles; and what it cannot.

Decided from the source's header alone, so that it can be said before any work.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av

from data.video.source.container import first_shown, is_picture
from data.video.source.survey import Survey

# What players find in an MP4; the muxer accepts more (raw PCM, for one) than they play.
PLAYED_IN_MP4 = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}
PLAYED_IN_MOV = {"aac", "mp3", "ac3", "eac3", "alac"}  # and every kind of PCM
MAX_RATE = 96_000  # of AAC, samples a second
BIT_RATE = 96_000  # of AAC, a channel
CUSTOM = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
# Said of a file itself, not of what it shows.
OF_THE_FILE = {"major_brand", "minor_version", "compatible_brands", "encoder", "timecode"}
# Text is text: MP4 and Matroska only frame it differently.
TEXT = {"mov_text", "subrip", "srt", "text"}


@dataclass(frozen=True)
class Track:
    """A stream of the source and what becomes of it."""

    index: int
    kind: str  # audio or subtitle
    name: str  # as it is told to people
    codec: str | None  # what it is converted to; None: copied packet by packet

    @property
    def converted(self) -> bool:
        return self.codec is not None


@dataclass(frozen=True)
class TrackPlan:
    tracks: tuple[Track, ...]
    converted: tuple[str, ...]  # said of each track that changes
    left_out: tuple[str, ...]  # names of those that are not carried
    metadata: dict[str, str]
    chapters: tuple[Any, ...]  # as PyAV gives and takes them, in the output's time
    timecode: str | None


def plan_tracks(
    container: Any, found: Survey, output_format: str, *, fragmented: bool = False
) -> TrackPlan:
    """`output_format` is mp4, mov or matroska. A fragmented one takes sound only."""
    tracks: list[Track] = []
    converted: list[str] = []
    left_out: list[str] = []
    shown = [s for s in container.streams.video if not is_picture(s)]
    for stream in container.streams:
        name, codec = _name(stream), None
        if stream.type == "audio":
            codec = _sound_codec(stream, output_format)
        elif stream.type == "subtitle" and not fragmented and not found.clock.repairs:
            codec = _subtitle_codec(stream, output_format)
        elif (stream.type == "video" and stream is first_shown(shown)) or (
            stream.type == "data" and "timecode" in stream.metadata
        ):
            continue
        if codec is None:
            left_out.append(name)
            continue
        tracks.append(Track(stream.index, stream.type, name, codec or None))
        if codec and stream.type == "audio":
            converted.append(f"{name} becomes {codec.upper()}")
    chapters = container.chapters()
    if chapters and (fragmented or found.clock.repairs):
        left_out.append("chapters")
        chapters = []
    return TrackPlan(
        tracks=tuple(tracks),
        converted=tuple(converted),
        left_out=tuple(left_out),
        metadata={k: v for k, v in container.metadata.items() if k.lower() not in OF_THE_FILE},
        chapters=tuple(_moved(chapter, found.origin) for chapter in chapters),
        timecode=_timecode(container),
    )


def _moved(chapter: Any, origin: Fraction) -> Any:
    base = chapter["time_base"] or Fraction(1, av.time_base)
    shift = round(origin / base)
    return {
        **chapter,
        "start": max(0, chapter["start"] - shift),
        "end": max(0, chapter["end"] - shift),
    }


def _timecode(container: Any) -> str | None:
    owners = [container, *container.streams]
    return next((o.metadata["timecode"] for o in owners if "timecode" in o.metadata), None)


def _name(stream: Any) -> str:
    kinds = {"audio": "sound", "subtitle": "subtitles", "video": "second video"}
    kind = kinds.get(stream.type, f"{stream.type} track")
    if stream.type == "video" and is_picture(stream):
        return "cover picture"
    known = stream.codec_context is not None and stream.type != "data"
    codec = stream.codec_context.codec.canonical_name if known else _tag(stream)
    layout = _layout(stream) if known and stream.type == "audio" else ""
    language = stream.metadata.get("language", "und")
    about = [word for word in (codec, layout, language) if word not in ("", "und")]
    return f"{kind} ({' '.join(about)})" if about else kind


def _tag(stream: Any) -> str:
    return str(getattr(stream, "codec_tag", None) or "").strip("\0")


def _sound_codec(stream: Any, output_format: str) -> str | None:
    """What the sound is converted to; empty: copied; None: it can be neither."""
    if stream.codec_context is None:
        return None
    codec = stream.codec_context.codec.canonical_name
    wanted = {
        "mp4": codec in PLAYED_IN_MP4,
        "mov": codec in PLAYED_IN_MOV or codec.startswith("pcm_"),
    }.get(output_format, True)
    if wanted and _holds(stream, output_format):
        return ""
    for name in ("aac", "flac", "alac"):
        played = {"mp4": PLAYED_IN_MP4, "mov": PLAYED_IN_MOV}.get(output_format, {name})
        if name in played and _encodes(name, stream):
            return name
    return None


def _subtitle_codec(stream: Any, output_format: str) -> str | None:
    if stream.codec_context is None:
        return None
    codec = stream.codec_context.codec.canonical_name
    if output_format == "matroska":
        if codec == "mov_text":
            return "subrip"
        return "" if _holds(stream, output_format) else None
    if codec == "mov_text":
        return ""
    return "mov_text" if codec in TEXT else None


def _holds(stream: Any, output_format: str) -> bool:
    """Whether a muxer takes the stream as it is: it is asked."""
    try:
        with av.open(io.BytesIO(), "w", format=output_format) as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _encodes(codec: str, stream: Any) -> bool:
    try:
        with av.open(io.BytesIO(), "w", format="matroska") as trial:
            add_sound(trial, codec, stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def add_sound(output: Any, codec: str, stream: Any) -> Any:
    """A stream of `output` that encodes what `stream` decodes to, with all its channels."""
    added = output.add_stream(codec, rate=min(stream.rate, MAX_RATE))
    added.layout = _layout(stream)
    if codec == "aac":
        added.bit_rate = BIT_RATE * max(1, stream.channels)
    return added


def _layout(stream: Any) -> str:
    """The channels' names, by FFmpeg's custom where the source only says how many there are."""
    name = str(stream.layout.name)
    return CUSTOM.get(stream.channels, name) if name.endswith("channels") else name


def describe(stream: Any, added: Any) -> None:
    """Language, title and role of a track, for players that let one choose."""
    for key in ("language", "title"):
        if key in stream.metadata:
            added.metadata[key] = stream.metadata[key]
    added.disposition = stream.disposition
