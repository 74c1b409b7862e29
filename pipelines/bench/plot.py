"""A measurement as one picture: where a chunk's time goes, every chunk timed, and the sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, RIGHT = 1200, 170, 1150
INK, FAINT = (40, 44, 52), (215, 218, 224)
PARTS = {
    "encode": (116, 173, 209),
    "D": (69, 117, 180),
    "decode": (253, 174, 97),
    "other": (190, 190, 190),
}
LINES = [(69, 117, 180), (215, 48, 39)]


def plot(report: dict[str, Any], path: Path) -> None:
    """Write `path`; its ending decides the format."""
    _Sheet(report).draw().save(path)


class _Sheet:
    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.variants: dict[str, Any] = report["variants"]
        sessions = len(report["sessions"]["tried"])
        self.bars_top = 90
        self.lines_top = self.bars_top + 70 * len(self.variants) + 60
        self.sessions_top = self.lines_top + 320
        height = self.sessions_top + 40 * sessions + (60 if sessions else -20)
        self.image = Image.new("RGB", (WIDTH, height), "white")
        self.canvas = ImageDraw.Draw(self.image)

    def draw(self) -> Image.Image:
        config, machine = self.report["config"], self.report["hardware"]
        self._text(
            20,
            20,
            f"{config['model']}, {config['vae']} VAE, {config['width']}x{config['height']}, "
            f"{machine.get('gpu') or machine['cpu']}",
            size=22,
        )
        self._bars()
        self._chunks()
        if self.report["sessions"]["tried"]:
            self._sessions()
        return self.image

    def _bars(self) -> None:
        """Median of each part of a chunk, one bar a variant."""
        top, y = self.bars_top, self.bars_top
        self._text(20, top - 32, "Median of a chunk, ms", size=16)
        x = LEFT + 130.0
        for name, colour in PARTS.items():
            self.canvas.rectangle((x, top - 28, x + 14, top - 14), fill=colour)
            x = self._text(x + 20, top - 32, name, size=16) + 24
        full = max(entry["V"]["p50_ms"] for entry in self.variants.values())
        for name, entry in self.variants.items():
            parts = {part: entry[part]["p50_ms"] for part in PARTS if part != "other"}
            parts["other"] = max(0.0, entry["V"]["p50_ms"] - sum(parts.values()))
            self._text(20, y + 14, name, size=16)
            x, scale = float(LEFT), (RIGHT - LEFT - 130) / full
            for part, ms in parts.items():
                end = x + ms * scale
                self.canvas.rectangle((x, y, end, y + 44), fill=PARTS[part])
                label = f"{ms:.0f}"
                if end - x > self._width(label, 15) + 6:
                    self._text(x + 4, y + 13, label, size=15, fill="white")
                x = end
            fps = entry["V"]["fps"]
            self._text(x + 8, y + 13, f"{entry['V']['p50_ms']:.0f} ms, {fps:.1f} FPS", size=15)
            y += 70

    def _chunks(self) -> None:
        """V of each timed chunk, in order."""
        top, bottom = self.lines_top + 10, self.lines_top + 250
        self._text(20, top - 42, "V of each timed chunk, ms", size=16)
        runs = {name: [c["V"] for c in v["chunks"]] for name, v in self.variants.items()}
        highest = 1.1 * max(max(values) for values in runs.values())
        for share in (0.0, 0.5, 1.0):
            y = bottom - share * (bottom - top)
            self.canvas.line((LEFT, y, RIGHT, y), fill=FAINT)
            label = f"{share * highest:.0f}"
            self._text(LEFT - 10 - self._width(label, 14), y - 9, label, size=14)
        x = LEFT + 130.0
        for (name, values), colour in zip(runs.items(), LINES, strict=False):
            self.canvas.rectangle((x, top - 38, x + 14, top - 24), fill=colour)
            x = self._text(x + 20, top - 42, name, size=16) + 24
            step = (RIGHT - LEFT) / (len(values) - 1)
            points = [
                (LEFT + i * step, bottom - value / highest * (bottom - top))
                for i, value in enumerate(values)
            ]
            self.canvas.line(points, fill=colour, width=2)
            for px, py in points:
                self.canvas.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)

    def _sessions(self) -> None:
        """P99 latency of concurrent sessions beside their deadline."""
        sessions = self.report["sessions"]
        deadline, y = sessions["deadline_ms"], self.sessions_top
        timed = [entry for entry in sessions["tried"] if not entry.get("out_of_memory")]
        longest = max([deadline, *(entry["p99_ms"] for entry in timed)])
        scale = (RIGHT - LEFT - 110) / longest
        self._text(20, y - 32, f"P99 of concurrent sessions, deadline {deadline:.0f} ms", size=16)
        for entry in sessions["tried"]:
            self._text(20, y + 4, f"{entry['sessions']} sessions", size=15)
            if entry.get("out_of_memory"):
                self._text(LEFT + 8, y + 4, "out of memory", size=15)
            else:
                end = LEFT + entry["p99_ms"] * scale
                colour = PARTS["D"] if entry["holds"] else LINES[1]
                self.canvas.rectangle((LEFT, y, end, y + 28), fill=colour)
                self._text(end + 8, y + 4, f"{entry['p99_ms']:.0f} ms", size=15)
            y += 40
        x = LEFT + deadline * scale
        self.canvas.line((x, self.sessions_top - 6, x, y - 6), fill=INK, width=2)

    def _text(
        self, x: float, y: float, text: str, *, size: int, fill: tuple[int, ...] | str = INK
    ) -> float:
        """Write `text`; the x where it ends."""
        self.canvas.text((x, y), text, fill=fill, font=ImageFont.load_default(size))
        return x + self._width(text, size)

    def _width(self, text: str, size: int) -> float:
        return self.canvas.textlength(text, font=ImageFont.load_default(size))
