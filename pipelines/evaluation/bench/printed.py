"""The report as tables of a terminal and of a page: halves first, then kinds, the worst first."""

from __future__ import annotations

from typing import Any

from infra.runtime.errors import UserError

COLUMNS = (  # metric, heading, decimals, with interval
    ("gain", "gain dB", 1, True),
    ("success", "success", 2, True),
    ("edited_psnr", "edit dB", 1, False),
    ("edited_ssim", "SSIM", 2, False),
    ("background_psnr", "outside dB", 1, True),
    ("background_ssim", "SSIM", 2, False),
    ("kept_psnr", "kept dB", 1, True),
    ("false_edits", "false", 3, False),
    ("temporal_inside", "flicker in", 1, False),
    ("temporal_outside", "out", 1, False),
    ("sharpness", "sharp", 2, False),
    ("drift", "drift dB", 1, False),
    ("clip_text", "CLIP", 3, False),
    ("clip_text_gain", "CLIP gain", 3, False),
    ("recomputed", "computed", 2, False),
    ("fps", "FPS", 0, False),
)
SHORT = tuple(  # what a terminal shows
    column for column in COLUMNS if column[0] not in ("edited_ssim", "background_ssim", "drift")
)
Line = list[str]
Columns = tuple[tuple[str, str, int, bool], ...]
Values = dict[str, dict[str, float]]


def lines(report: dict[str, Any], columns: Columns = COLUMNS) -> tuple[Line, list[Line]]:
    """Headings, and a line for each half, kind and trait; metrics that nothing has are left out."""
    sections = (report["overall"], report["kinds"], report["traits"])
    return lines_of([entry for section in sections for entry in section.items()], columns)


def markdown(report: dict[str, Any]) -> str:
    return markdown_of(*lines(report))


def beside(reports: list[dict[str, Any]]) -> str:
    """Several systems in one table, a line each: the same clips, all of them together."""
    shared = [{row["name"] for row in report["clips"]} for report in reports]
    if any(names != shared[0] for names in shared):
        raise UserError(
            "the reports are of different clips: "
            + ", ".join(f"{r['system']} {len(n)}" for r, n in zip(reports, shared, strict=True))
            + "; run each with the same half=, every= and long="
        )
    name = next(iter(reports[0]["overall"]))  # "all", or the one half that there is
    return markdown_of(*lines_of([(r["system"], r["overall"][name]) for r in reports], COLUMNS))


def lines_of(entries: list[tuple[str, Values]], columns: Columns) -> tuple[Line, list[Line]]:
    """Headings, and a line for each entry; metrics that no entry has are left out."""
    shown = [c for c in columns if any(c[0] in values for _, values in entries)]
    heads = ["", "clips", *(heading for _, heading, _, _ in shown)]
    return heads, [
        [name, str(_clips(values)), *(_cell(values.get(c[0]), c[2], c[3]) for c in shown)]
        for name, values in entries
    ]


def markdown_of(heads: Line, rows: list[Line]) -> str:
    table = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def _clips(values: Values) -> int:
    return int(max(value["clips"] for value in values.values()))


def _cell(value: dict[str, float] | None, decimals: int, interval: bool) -> str:
    if value is None:
        return "-"
    mean = f"{value['mean']:z.{decimals}f}"  # no -0.0
    if not interval or value["clips"] < 2:
        return mean
    return f"{mean} [{value['low']:z.{decimals}f}, {value['high']:z.{decimals}f}]"
