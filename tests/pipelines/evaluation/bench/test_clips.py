"""Which clips the benchmark has, what they are made of, and whether they are the published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import data.bench.clip as clip_module
from data.bench.cases import CASES
from data.bench.clip import published_checksums
from infra.runtime.errors import UserError
from pipelines.commands.measure.benchmark import check_published
from pipelines.config.benchmark import BenchConfig
from pipelines.config.merge import ConfigError
from pipelines.evaluation.bench import run as bench_run
from pipelines.evaluation.bench.run import check_clips, checksum_line, chosen, clips


def test_which_clips_are_chosen() -> None:
    assert chosen(BenchConfig()) == list(CASES)
    natural = chosen(BenchConfig(half="natural", long=False))
    assert len(natural) == 58
    assert {case.half for case in natural} == {"natural"}
    assert chosen(BenchConfig(every=60)) == [CASES[0], CASES[60]]
    minutes = chosen(BenchConfig(only="60 s"))
    assert len(minutes) == 4
    assert all(case.long for case in minutes)
    hues = chosen(BenchConfig(only="hue", every=2))
    assert [case.kind for case in hues] == ["hue", "hue"]  # every second of these
    for name in ("slow", "light"):
        of = chosen(BenchConfig(only=name, half="natural"))
        assert chosen(BenchConfig(only=name, half="natural", every=2)) == of[::2]
        assert len(of) > 1
    with pytest.raises(ConfigError, match="only=hues is none of "):
        BenchConfig(only="hues")
    with pytest.raises(ConfigError, match=r"no clip with half=drawn .* only=hue; leave one"):
        chosen(BenchConfig(only="hue", half="drawn"))
    with pytest.raises(ConfigError, match="half=upper"):
        BenchConfig(half="upper")
    with pytest.raises(ConfigError, match="multiples of 16"):
        BenchConfig(size="100x200")
    with pytest.raises(ConfigError, match=r"bench\.every=0"):
        BenchConfig(every=0)


@pytest.mark.parametrize("half", ["natural", "drawn", "both"])
@pytest.mark.parametrize("mine", ["my footage", None])
def test_natural_clips_are_filmed_from_what_is_held_out(
    half: str, mine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the user's footage or of ours, read once; drawn clips need none."""
    read: list[Any] = []

    def prepare(source: Path, folder: str, **sizes: int) -> dict[str, str]:
        read.append((source, sizes))
        return {"train": "trained on", "heldout": "held out"}

    monkeypatch.setattr(bench_run, "prepare", prepare)
    monkeypatch.setattr(bench_run, "make_clip", lambda *given: given)
    config = BenchConfig(half=half, every=30, long=False, size="48x32", footage=mine)
    film = None if half == "drawn" else "held out"
    made: Any = list(clips(config))
    assert made == [(case, film, (32, 48)) for case in chosen(config)]
    source = clip_module.OWN_FOOTAGE if mine is None else Path(mine)
    assert read == [(source, {"height": 32, "width": 48, "fps": 16})] * (film is not None)


def test_the_report_says_which_clips_they_are() -> None:
    made = {
        clip.case.name: clip.checksum()
        for clip in clips(BenchConfig(half="drawn", every=40, long=False))
    }
    assert checksum_line(made, BenchConfig()) == "2 of 120 clips, each with the published checksum"
    wrong = made | {next(iter(made)): "0" * 16}
    assert "1 differ from the published ones" in checksum_line(wrong, BenchConfig())
    assert next(iter(made)) in checksum_line(wrong, BenchConfig())
    assert "figures of this footage" in checksum_line(made, BenchConfig(footage="mine"))
    assert "224x128 only" in checksum_line(made, BenchConfig(size="48x32"))


def test_clips_that_are_not_the_published_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(published_checksums.cache_clear)
    config = BenchConfig(half="drawn", every=40, long=False)
    seen: list[None] = []
    check_clips(config, on_clip=lambda: seen.append(None))
    assert len(seen) == 2
    stored = json.loads(clip_module.CHECKSUMS.read_text())
    name = chosen(config)[1].name
    stored["clips"][name] = "0" * 16
    changed = tmp_path / "checksums.json"
    changed.write_text(json.dumps(stored))
    monkeypatch.setattr(clip_module, "CHECKSUMS", changed)
    published_checksums.cache_clear()
    with pytest.raises(UserError, match=rf"1 of 2 clips are not .*\({name}\).*published=false"):
        check_published(config)
    check_published(replace(config, published=False))  # asked for: the report says so
    check_published(replace(config, size="48x32"))  # nothing is published for it
    changed.write_text("{")
    published_checksums.cache_clear()
    with pytest.raises(UserError, match=r"checksums cannot be read \(.*restore the file"):
        check_published(config)
