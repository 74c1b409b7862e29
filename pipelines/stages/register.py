"""The model in the registry: as candidate, and as production if it is good enough.

Training writes `models/STAGE` anew each time; a version is a copy of it that nobody writes again,
in a folder of its own, named by what is in it.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from modeling.fingerprint import check_fingerprint, model_fingerprint
from pipelines.evaluation.evaluate import shortfalls
from pipelines.stages.chain import Chain
from pipelines.stages.evaluate import HELDOUT, PICTURE, SAMPLE, TABLE
from pipelines.tracking import registry
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import StageRecord, digest_of, version_folder


@dataclass
class PipelineResult:
    """Where everything is."""

    output: Path
    model: Path  # the registered version's folder
    version: str | None  # in the registry; None as long as MLflow does not take it
    aliases: list[str]
    shortfalls: list[str]  # why it was not promoted
    metrics: dict[str, float]  # means over the held-out clips
    report: Path
    table: Path
    picture: Path
    run_id: str
    experiment_id: str | None  # of MLflow's; None as long as it does not answer


def register(chain: Chain, model: Path, heldout: str, evaluation: StageRecord) -> PipelineResult:
    """A version of its own for `model`, which never changes again, and its aliases."""
    tracking, outbox = chain.config.tracking, chain.parent.outbox
    missing = shortfalls(evaluation.metrics, chain.config.evaluate)
    aliases = [tracking.alias]
    if tracking.promote and not missing:
        aliases.append("production")
    fingerprint = model_fingerprint(model)
    place = chain.output / "versions" / version_folder(fingerprint)

    def make(run: Run, key: str) -> dict[str, float]:
        run.used({"model": model})
        publish(model, place)
        chain.parent.register(
            tracking.model_name,
            place,
            fingerprint=fingerprint,
            metrics=evaluation.metrics,
            aliases=aliases,
            judged_on=(HELDOUT, digest_of(heldout)),
            shown=[chain.output / PICTURE, chain.output / SAMPLE],
        )
        return {}

    def still_there(record: StageRecord) -> bool:
        number = outbox.version(tracking.model_name, fingerprint)
        # MLflow will be told of a version that it does not know yet.
        return not number or registry.holds(chain.uri, tracking.model_name, number, place)

    inputs = {
        "model": fingerprint,
        "location": str(place),
        "registry": chain.uri,
        "name": tracking.model_name,
        "aliases": aliases,
    }
    chain.run("register", inputs, place, make, still_there=still_there)
    outbox.flush()
    return PipelineResult(
        output=chain.output,
        model=place,
        version=outbox.version(tracking.model_name, fingerprint),
        aliases=aliases,
        shortfalls=missing,
        metrics=evaluation.metrics,
        report=Path(evaluation.output),
        table=chain.output / TABLE,
        picture=chain.output / PICTURE,
        run_id=chain.parent.run_id,
        experiment_id=chain.parent.experiment_id,
    )


def publish(model: Path, target: Path) -> None:
    """Make `target` a read-only copy of the model directory `model`, whole or not at all.

    Raises FingerprintError where `target` is there and holds something else by now.
    """
    fingerprint = model_fingerprint(model)
    if target.exists():
        check_fingerprint(f"the version in {target}", target, fingerprint)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        shutil.copytree(model, draft / "model")
        for file in (draft / "model").rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o444)
        check_fingerprint(f"the copy of {model}", draft / "model", fingerprint)
        (draft / "model").rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
