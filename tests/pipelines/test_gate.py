"""Who becomes `production`, and what the registry says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.runtime.registry import client_for
from pipelines.tracking.registry import resolve
from tests.pipelines.place import Place

pytestmark = pytest.mark.slow

GATE: list[tuple[list[str], list[str], list[str]]] = [
    ([], ["candidate", "production"], []),
    (["evaluate.min_gain_db=1000"], ["candidate"], ["gain"]),
    (["evaluate.min_background_db=1000"], ["candidate"], ["background_psnr"]),
    (
        ["evaluate.min_gain_db=1000", "evaluate.min_background_db=1000"],
        ["candidate"],
        ["gain", "background_psnr"],
    ),
    (["tracking.promote=false"], ["candidate"], []),
    (["tracking.alias=canary"], ["canary", "production"], []),
]


@pytest.mark.parametrize(("overrides", "aliases", "missing"), GATE)
def test_production_is_who_passed_the_gate(
    first: Place, overrides: list[str], aliases: list[str], missing: list[str]
) -> None:
    name = f"gate-{GATE.index((overrides, aliases, missing))}"
    result, _ = first.run(f"tracking.model_name={name}", *overrides)
    assert result.aliases == aliases
    assert [reason.split()[0] for reason in result.shortfalls] == missing
    assert first.aliases(name) == dict.fromkeys(aliases, result.version)


def test_production_stays_with_the_model_that_passed_before(first: Place) -> None:
    name = "tracking.model_name=careful"
    good, _ = first.run(name)
    bad, _ = first.run(name, "distill.steps=2", "evaluate.min_gain_db=1000")
    assert good.version != bad.version
    assert first.aliases("careful") == {"candidate": bad.version, "production": good.version}


def test_the_registry_says_what_was_judged(first: Place) -> None:
    result, _ = first.run("tracking.model_name=said")
    tags = client_for(first.uri).get_model_version("said", result.version).tags
    report = json.loads(result.report.read_text())
    assert result.metrics == report["mean"]
    assert tags["metric.gain"] == f"{report['mean']['gain']:.4g}"
    assert tags["liveedit.location"] == str(first.version_of("distill"))
    assert tags["liveedit.fingerprint"] == first.hash_of("models/distill")


def test_a_registry_without_our_version_gets_it_again(first: Place, tmp_path: Path) -> None:
    first.run("tracking.model_name=lost")
    client_for(first.uri).delete_registered_model("lost")
    result, ran = first.run("tracking.model_name=lost")
    assert ran == ["register"]
    assert resolve("models:/lost@candidate", first.uri) == result.model
    client_for(first.uri).set_model_version_tag(
        "lost", result.version, "liveedit.location", str(tmp_path)
    )  # an entry that points elsewhere is not ours
    result, ran = first.run("tracking.model_name=lost")
    assert ran == ["register"]
    assert resolve("models:/lost@candidate", first.uri) == result.model


def test_what_other_trainings_left_stays(first: Place) -> None:
    for name in ("causal-old", "distill-old"):
        (first.out / "checkpoints" / name).mkdir(parents=True)
    first.run("distill.steps=2")
    left = sorted(path.name for path in (first.out / "checkpoints").iterdir())
    assert left == ["causal-old", "distill-old"]
