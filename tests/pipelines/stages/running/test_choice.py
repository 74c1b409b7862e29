from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config.merge import ConfigError
from pipelines.stages.running.choice import Choice, key_for, why_again
from pipelines.tracking.records import StageRecord, fingerprint_of

STAGES = ("one", "two", "three")


@pytest.mark.parametrize(
    ("given", "before"),
    [
        ({}, 0),
        ({"first": "one"}, 0),
        ({"first": "two"}, 1),
        ({"only": "three"}, 2),
    ],
)
def test_what_comes_before_the_chosen(given: dict[str, str], before: int) -> None:
    choice = Choice(STAGES, **given)
    assert [s for s in STAGES if choice.comes_before(s)] == list(STAGES[:before])
    assert not choice.comes_before("edit")  # the demo's own
    assert [s for s in STAGES if choice.is_last(s)] == ([given["only"]] if "only" in given else [])


def test_a_choice_that_means_nothing() -> None:
    with pytest.raises(ConfigError, match=r"--from four: there are one, two, three"):
        Choice(STAGES, first="four")
    with pytest.raises(ConfigError, match=r"--only four: there are one, two, three"):
        Choice(STAGES, only="four")
    with pytest.raises(ConfigError, match="exclude each other"):
        Choice(STAGES, first="one", only="two")


def record(output: Path, version: int = 1, **inputs: object) -> StageRecord:
    return StageRecord(
        "one",
        key_for("one", version, inputs),
        fingerprint_of(output),
        str(output),
        "run",
        inputs=inputs,
    )


HASH, OTHER = "a" * 64, "b" * 64
WHYS = [
    ({"steps": 3}, {"steps": 3}, None),
    ({"steps": 3}, {"steps": 4}, "steps 3 -> 4"),
    ({"config": {"steps": 3}}, {"config": {"steps": 4}}, "steps 3 -> 4"),
    ({"config": {"a": [1, 2]}, "b": 1}, {"config": {"a": (1, 2)}, "b": 2}, "b 1 -> 2"),
    ({"start": HASH}, {"start": OTHER}, "another start"),
    ({"start": HASH}, {"start": None}, "another start"),  # will be made anew
    ({"a": 1}, {"a": 1, "b": 2}, "b None -> 2"),
    (
        {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1},
        {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2},
        "a 1 -> 2, b 1 -> 2, c 1 -> 2 and 2 more",
    ),
]


@pytest.mark.parametrize(("before", "now", "why"), WHYS)
def test_why_a_stage_runs_again(
    tmp_path: Path, before: dict[str, object], now: dict[str, object], why: str | None
) -> None:
    (tmp_path / "file").write_text("made")
    assert why_again(record(tmp_path / "file", **before), "one", 1, now) == why


def test_why_a_stage_runs_that_nothing_was_changed_of(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("made")
    made = record(file, steps=3)
    assert why_again(None, "one", 1, {"steps": 3}) == "not done yet"
    assert why_again(made, "one", 2, {"steps": 3}) == "other code"
    old = StageRecord("one", "k", made.fingerprint, made.output, "run")
    assert why_again(old, "one", 1, {"steps": 3}) == "other inputs"
    file.write_text("somebody wrote here")
    assert why_again(made, "one", 1, {"steps": 3}) == f"{file} is gone or changed"
