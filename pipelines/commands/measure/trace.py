"""`liveedit trace`: where a slow chunk's time went, by what the serve setting `traces` wrote."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from infra.runtime.errors import UserError
from pipelines.commands.show import console

BAR = 36  # characters for a chunk's whole time
ROOT = "chunk"
SOURCE = "front.receive"  # the source's own time; what counts begins when it ends
SENT = "front.pace"  # and ends when this begins


@dataclass(frozen=True)
class TraceSpan:
    name: str
    began: float  # seconds
    ended: float

    @property
    def ms(self) -> float:
        return 1000 * (self.ended - self.began)


@dataclass
class Way:
    """One chunk's trace."""

    about: dict[str, Any] = field(default_factory=dict)
    spans: list[TraceSpan] = field(default_factory=list)

    @property
    def latency_ms(self) -> float:
        """From its last source frame until its first edited one was sent."""
        return float(self.about["latency_ms"])


def trace(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Of JSON lines, or the folder that holds them.")
    ],
    session: Annotated[
        str | None, typer.Option(metavar="ID", help="Only chunks of this session.")
    ] = None,
    nth: Annotated[int, typer.Option(help="Show the slowest but so many.", min=1)] = 1,
) -> None:
    """Show the slowest chunk's way through front, link, queue, device and codec beside what is
    usual.
    """
    ways = read_ways(file)
    if session is not None:
        ways = [way for way in ways if way.about["session"] == session]
    if not ways:
        told = f" of session {session}" if session else ""
        raise UserError(f"{file} holds no whole chunk{told}; serve with traces={file} and edit")
    if nth > len(ways):
        raise UserError(f"--nth {nth}: {file} holds {len(ways)} chunks")
    slow = sorted(ways, key=lambda way: -way.latency_ms)[nth - 1]
    console.print(_table(slow, ways))


def read_ways(path: Path) -> list[Way]:
    """The whole chunks in a file of spans, or in all files of a folder. A line that was cut off,
    as by a killed process, and chunks without their root are left out.

    Raises UserError for what is no such file.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    ways: dict[str, Way] = defaultdict(Way)
    for file in files:
        try:
            lines = file.read_text().splitlines()
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror}); give a file or folder of spans, which "
                "`liveedit serve traces=FOLDER` writes"
            ) from error
        for number, line in enumerate(lines, 1):
            try:
                span = json.loads(line)
                name, trace_id = span["name"], span["context"]["trace_id"]
                began, ended = (_seconds(span[key]) for key in ("start_time", "end_time"))
            except (ValueError, LookupError, TypeError) as error:
                if number == len(lines):
                    continue
                raise UserError(
                    f"{file}:{number} is no span ({error}); name a file that the serve setting "
                    "traces made"
                ) from error
            if name == ROOT:
                ways[trace_id].about = span["attributes"]
            else:
                ways[trace_id].spans.append(TraceSpan(name, began, ended))
    return [way for way in ways.values() if way.about and way.spans]


def _table(slow: Way, ways: list[Way]) -> Table:
    about = slow.about
    usual = _quantile([way.latency_ms for way in ways], 0.5)
    title = (
        f"chunk {about['chunk']} of session {about['session']}: {slow.latency_ms:.1f} ms from its "
        f"last source frame to its first edited one; P50 of {len(ways)} chunks {usual:.1f} ms\n"
        f"{about['size']} edited at {about['work_size']}, {about['fps']:g} fps, {about['mode']}, "
        f"{about['rung']}, {about['steps']} steps, {about['recomputed']:.0%} recomputed"
    )
    view = Table(title=title, title_justify="left")
    for name in ("", "ms", "P50", "P99"):
        view.add_column(name, justify="right" if name else "left")
    view.add_column("from the last source frame on", no_wrap=True)
    times: dict[str, list[float]] = defaultdict(list)
    for way in ways:
        for span in way.spans:
            times[span.name].append(span.ms)
    spans = sorted(slow.spans, key=lambda span: (span.began, span.ended))
    start = next((span.ended for span in spans if span.name == SOURCE), spans[0].began)
    end = next((span.began for span in spans if span.name == SENT), spans[-1].ended)
    for span in spans:
        known = times[span.name]
        columns = (span.ms, _quantile(known, 0.5), _quantile(known, 0.99))
        view.add_row(span.name, *(f"{ms:.1f}" for ms in columns), _bar(span, start, end))
    return view


def _bar(span: TraceSpan, start: float, end: float) -> str:
    if span.name in (SOURCE, SENT) or end <= start:
        return ""
    scale = BAR / (end - start)
    first, last = round((span.began - start) * scale), round((span.ended - start) * scale)
    return " " * first + "█" * max(1, last - first)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
