"""Run the benchmark: make each clip, have it edited, measure it, and put the report together."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.bench.cases import CASES, FPS, HALVES, VERSION, Case
from data.bench.clip import OWN_FOOTAGE, SIZE, BenchClip, make_clip, published_checksums
from data.footage.material import Footage, footage_hash, prepare
from infra.runtime.errors import UserError
from pipelines.config.benchmark import BenchConfig
from pipelines.config.merge import ConfigError
from pipelines.evaluation.bench.alignment import Alignment
from pipelines.evaluation.bench.intervals import groups, with_success
from pipelines.evaluation.bench.judged import MAKERS, Judged
from pipelines.evaluation.bench.kept import Kept
from pipelines.evaluation.bench.measures import measure, psnr_by_second
from pipelines.evaluation.bench.systems import System, some

KEPT_SHARE = 0.01  # of blocks that may change where nothing was to be done


def chosen(config: BenchConfig) -> list[Case]:
    """The clips that `config` asks for: every n-th of each half, the long ones or not.

    ConfigError if that is none at all.
    """
    cases = []
    for half in HALVES if config.half == "both" else (config.half,):
        of = [case for case in CASES if case.half == half and (config.long or not case.long)]
        if config.only is not None:
            of = [case for case in of if config.only in (case.kind, *case.traits)]
        cases += of[:: config.every]
    if not cases:
        raise ConfigError(
            f"no clip with half={config.half} and long={str(config.long).lower()} is of "
            f"only={config.only}; leave one of them out"
        )
    return cases


def clips(config: BenchConfig, cases: Sequence[Case] | None = None) -> Iterator[BenchClip]:
    """The chosen clips, or those of `cases`, made one at a time."""
    cases = chosen(config) if cases is None else cases
    natural = any(case.half == "natural" for case in cases)
    with _footage(config) if natural else nullcontext() as footage:
        for case in cases:
            yield make_clip(case, footage, config.shape)


def check_clips(config: BenchConfig, *, on_clip: Callable[[], None] = lambda: None) -> None:
    """Make the chosen clips once and compare them with `data/bench/checksums.json`, before hours
    are spent on them. UserError that names those which differ, and what to do."""
    made: dict[str, str] = {}
    for clip in clips(config):
        made[clip.case.name] = clip.checksum()
        on_clip()
    if wrong := not_published(made):
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in MAKERS)
        raise UserError(
            f"{len(wrong)} of {len(made)} clips are not the published ones ({some(wrong)}), so "
            f"their figures compare with no table. Other versions of what makes them (here "
            f"{versions}) round otherwise: install those of constraints.txt, or measure all the "
            "same with published=false; the report then says so"
        )


def run(
    system: System,
    config: BenchConfig,
    *,
    kept: Kept | None = None,
    on_clip: Callable[[Judged], None] = lambda judged: None,
) -> dict[str, Any]:
    """The report as JSON values; `on_clip` hears of every clip as it is done. Clips that are `kept`
    are not edited again, and those that are done are kept at once."""
    cases = chosen(config)
    before = {case.name: kept.read(case) for case in cases} if kept else {}
    made = clips(config, [case for case in cases if before.get(case.name) is None])
    alignment = Alignment(config.clip) if config.clip else None
    rows, series = [], {}
    for case in cases:
        judged = before.get(case.name)
        if judged is None:
            judged = _judge(system, next(made), config, alignment)
            if kept:
                kept.write(case, judged)
        rows.append(judged.row)
        if judged.by_second is not None:
            series[case.name] = judged.by_second
        on_clip(judged)
    return {
        "benchmark": "LiveEdit-Bench",
        "version": VERSION,
        "system": system.name,
        "settings": asdict(config),
        "footage": footage_hash(config.footage or OWN_FOOTAGE),
        "made": checksum_line({row["name"]: row["checksum"] for row in rows}, config),
        **groups(rows, config.resamples),
        "psnr_by_second": series,
        "clips": rows,
    }


def _judge(
    system: System, clip: BenchClip, config: BenchConfig, alignment: Alignment | None
) -> Judged:
    edit, more = system.edit(clip)
    values = measure(clip, edit, dilate=config.dilate) | more
    if alignment:
        values |= alignment.measure(clip.instruction, clip.source, edit, FPS)
    about = {
        "name": clip.case.name,
        "half": clip.case.half,
        "kind": clip.case.kind,
        "traits": list(clip.case.traits),
        "instruction": clip.instruction,
        "checksum": clip.checksum(),
    }
    middle = len(edit) // 2
    return Judged(
        with_success(about | values, config.success_db, KEPT_SHARE),
        clip.source[middle],
        edit[middle],
        clip.truth[middle],
        psnr_by_second(clip, edit, FPS) if clip.case.long else None,
    )


def checksum_line(made: dict[str, str], config: BenchConfig) -> str:
    """What the clips' checksums say: the published ones, or which are not."""
    count = f"{len(made)} of {len(CASES)} clips"
    if config.footage is not None:
        return f"{count}, filmed from {config.footage}: figures of this footage alone"
    if config.shape != SIZE:
        return f"{count} at {config.size}: checksums are published for {SIZE[1]}x{SIZE[0]} only"
    if differ := not_published(made):
        return (
            f"{count}; {len(differ)} differ from the published ones in some pixels "
            f"({some(differ)}): another version of NumPy, Pillow or FFmpeg rounds otherwise; "
            "compare with care"
        )
    return f"{count}, each with the published checksum"


def has_checksums(config: BenchConfig) -> bool:
    """Whether checksums are published for the clips that `config` makes."""
    return config.footage is None and config.shape == SIZE


def not_published(made: dict[str, str]) -> list[str]:
    """The clips, name: checksum, that are not as published."""
    published = published_checksums()
    return [name for name, checksum in made.items() if published[name] != checksum]


@contextmanager
def _footage(config: BenchConfig) -> Iterator[Footage | None]:
    height, width = config.shape
    with tempfile.TemporaryDirectory(prefix="liveedit-bench-") as folder:
        source = Path(config.footage) if config.footage else OWN_FOOTAGE
        yield prepare(source, folder, height=height, width=width, fps=FPS)["heldout"]
