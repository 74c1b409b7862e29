"""The report as pictures: gain by kind, quality over a minute, and middle frames of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from pipelines.evaluation.bench.judged import Judged

_LABEL, _TITLE, _GAP = 150, 20, 4  # pixels
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
BLUE, RED = "#4575b4", "#d73027"


def plot(report: dict[str, Any], path: Path) -> None:
    """Write `path`: gain of every kind with its interval, and PSNR over the clips of 60 s."""
    series = report["psnr_by_second"]
    kinds = {name: v["gain"] for name, v in report["kinds"].items() if "gain" in v}
    figure = Figure(figsize=(15 if series else 8, 1.5 + 0.3 * max(len(kinds), 6)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if series else 1, squeeze=False)[0]
    means = np.array([value["mean"] for value in kinds.values()])
    away = np.array(
        [[v["mean"] - v["low"], v["high"] - v["mean"]] for v in kinds.values()]
    ).reshape(-1, 2)
    axes[0].barh(list(kinds), means, xerr=away.T.clip(0), color=BLUE, ecolor="#333333", capsize=2)
    axes[0].axvline(report["settings"]["success_db"], color=RED, linewidth=1, label="success")
    axes[0].axvline(0, color="#333333", linewidth=1)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("gain in the edited region over doing nothing, dB (mean, 95 %)")
    axes[0].legend(loc="lower right")
    if series:
        for name, values in series.items():
            axes[1].plot(values, label=name)
        axes[1].set_xlabel("second")
        axes[1].set_ylabel("PSNR against the truth, dB")
        axes[1].legend()
    figure.suptitle(f"LiveEdit-Bench {report['version']}: {report['system']}")
    figure.tight_layout()
    figure.savefig(path)


def sheet(judged: Sequence[Judged]) -> Image.Image:
    """Two clips of every kind, the worst and the median: source, edit, truth of the middle."""
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        kinds.setdefault(f"{one.row['half']}, {one.row['kind']}", []).append(one)
    height, width = (max(one.source.shape[n] for one in judged) for n in (0, 1))
    columns, step = 6, height + _TITLE + _GAP
    size = (_LABEL + columns * (width + _GAP), _TITLE + len(kinds) * step)
    picture = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for column, title in enumerate(("source", "edit", "truth") * 2):
        which = "worst" if column < 3 else "median"
        draw.text((_LABEL + column * (width + _GAP), 3), f"{which}: {title}", _INK, font)
    for row, (kind, of) in enumerate(kinds.items()):
        of = sorted(of, key=_goodness)
        top = _TITLE + row * step
        draw.text((_GAP, top + _TITLE), kind.replace(", ", "\n"), _INK, font)
        for place, one in ((0, of[0]), (3, of[len(of) // 2])):
            left = _LABEL + place * (width + _GAP)
            draw.text((left, top + 2), _title(one), _INK, font)
            for n, frame in enumerate((one.source, one.edit, one.truth)):
                at = (left + n * (width + _GAP), top + _TITLE)
                picture.paste(Image.fromarray(frame), at)
    return picture


def extremes(judged: Sequence[Judged]) -> Image.Image:
    """Four clips, source, edit and truth of the middle: the worst by gain, the typical one (the
    median), the best, and the one that was changed most of those that ask for nothing."""
    gains = sorted((one for one in judged if "gain" in one.row), key=_goodness)
    idle = sorted((one for one in judged if "gain" not in one.row), key=_goodness)
    rows: list[tuple[str, Judged]] = []
    if gains:
        worst = "the worst" if gains[0].row["success"] else "failure"
        rows = [(worst, gains[0]), ("typical", gains[len(gains) // 2]), ("best", gains[-1])]
    rows += [("nothing to do, the worst", one) for one in idle[:1]]
    height, width = judged[0].source.shape[:2]
    step = _TITLE + height + _GAP
    picture = Image.new("RGB", (3 * (width + _GAP), len(rows) * step), _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for n, (name, one) in enumerate(rows):
        draw.text(
            (_GAP, n * step + 2), f"{name}: {_title(one)}   (source, edit, truth)", _INK, font
        )
        for m, frame in enumerate((one.source, one.edit, one.truth)):
            picture.paste(Image.fromarray(frame), (m * (width + _GAP), n * step + _TITLE))
    return picture


def _goodness(one: Judged) -> float:
    return float(one.row.get("gain", one.row.get("kept_psnr", 0.0)))


def _title(one: Judged) -> str:
    row = one.row
    value = f"{row['gain']:+.1f} dB" if "gain" in row else f"kept at {row['kept_psnr']:.1f} dB"
    return f'"{row["instruction"]}" {value}'
