"""Which models a run used and which it made, as MLflow's own logged models.

A logged model is known by its fingerprint: what one stage made is the very one that the next starts
from and that a version of the registry holds, so the version's page leads to the stage, its data,
settings and code, and from there to the model before, and back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.runtime.registry import FINGERPRINT, LOCATION, client_for
from modeling.model_dir import read_card, read_config
from pipelines.tracking.describe import in_words
from pipelines.tracking.tracker import code_tags, naming

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature


def log_used(uri: str, run_id: str, models: Mapping[str, tuple[str, str]]) -> None:
    """(place, fingerprint) of each model by its name; one that nobody logged is logged now."""
    from mlflow.entities import LoggedModelInput

    client = client_for(uri)
    with naming(uri):
        experiment = client.get_run(run_id).info.experiment_id
        ids = [
            find_model(client, experiment, fingerprint)
            or make_model(client, experiment, name, Path(place), fingerprint)
            for name, (place, fingerprint) in models.items()
        ]
        client.log_inputs(run_id, models=[LoggedModelInput(model) for model in ids])


def log_made(uri: str, run_id: str, name: str, place: Path, fingerprint: str, step: int) -> None:
    """The model that a run made after `step` steps."""
    from mlflow.entities import LoggedModelOutput

    client = client_for(uri)
    with naming(uri):
        run = client.get_run(run_id)
        experiment = run.info.experiment_id
        model = find_model(client, experiment, fingerprint) or make_model(
            client, experiment, name, place, fingerprint, run_id
        )
        known = {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
        if model not in known:  # which MLflow would refuse
            client.log_outputs(run_id, [LoggedModelOutput(model, step)])


def find_model(client: MlflowClient, experiment: str, fingerprint: str) -> str | None:
    """The id of the logged model with these files."""
    found = client.search_logged_models(
        [experiment], f"tags.`{FINGERPRINT}` = '{fingerprint}'", max_results=1
    )
    return str(found[0].model_id) if found else None


def make_model(
    client: MlflowClient,
    experiment: str,
    name: str,
    place: Path,
    fingerprint: str,
    run_id: str | None = None,
) -> str:
    """Log the model directory at `place`, which stays where it is; the new id.

    In the run's experiment: the default one would put MLflow's note of the model, and the folder
    for it, wherever this process was started.
    """
    from mlflow.models.utils import get_external_mlflow_model_spec
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    tags = {LOCATION: str(place), FINGERPRINT: fingerprint, MLFLOW_MODEL_IS_EXTERNAL: "true"}
    tags |= code_tags()
    params = in_words(read_card(place))
    model = client.create_logged_model(experiment, name, run_id, tags, params, "liveedit")
    note = get_external_mlflow_model_spec(model)
    note.signature = signature(place)
    with tempfile.TemporaryDirectory(prefix="liveedit-") as folder:
        note.save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def signature(place: Path) -> ModelSignature:
    """What goes into a stream of the model, and what comes out."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    stream = read_config(place).stream
    frames = (np.dtype("uint8"), (-1, stream.height, stream.width, 3))
    prompt = TensorSpec(np.dtype("str"), (-1,), "prompt")
    return ModelSignature(
        inputs=Schema([prompt, TensorSpec(*frames, "frames")]),
        outputs=Schema([TensorSpec(*frames, "edited")]),
    )
