"""From a version of the registry to stages, data and code, and back, in a real MLflow."""

from __future__ import annotations

import getpass
import shutil
from pathlib import Path

from mlflow.models import Model
from safetensors.torch import load_file, save_file

from infra.runtime.registry import client_for, find_version
from modeling.fingerprint import model_fingerprint
from pipelines.tracking.outbox import Outbox


def trained(start: Path, target: Path) -> Path:
    shutil.copytree(start, target)
    weights = load_file(target / "transformer.safetensors")
    weights[min(weights)] += 1
    save_file(weights, target / "transformer.safetensors")
    return target


def test_a_version_leads_to_its_stages_their_data_and_models_and_back(
    outbox: Outbox, mlflow_uri: str, tiny_model: Path, heldout: str, tmp_path: Path
) -> None:
    parent = outbox.start_pipeline("demo", {})
    made = {"start": tiny_model}
    for stage, before in (("foundation", "start"), ("causal", "foundation")):
        made[stage] = trained(made[before], tmp_path / stage)
        run = parent.start_stage(stage, {"steps": 7}, stage)
        run.log_input("train", heldout, "training")
        for _ in range(2):  # the second is sent again
            run.used({"start": made[before]})
            run.made(stage, made[stage], 7)
        run.finish()
    version = tmp_path / "version"
    shutil.copytree(made["causal"], version)
    parent.register(
        "liveedit", version, fingerprint=model_fingerprint(version), metrics={}, aliases=["new"]
    )
    parent.finish()
    assert outbox.flush()

    client = client_for(mlflow_uri)
    found = find_version("models:/liveedit@new", mlflow_uri)
    assert found.run_id == parent.run_id
    model = client.get_logged_model(found.source.removeprefix("models:/"))
    assert model.tags["liveedit.location"] == str(version)  # whose files stay
    lineage = []
    while model.source_run_id:
        stage = client.get_run(model.source_run_id)
        lineage.append(stage.info.run_name)
        tags = stage.data.tags
        assert tags["mlflow.parentRunId"] == parent.run_id
        assert tags["mlflow.source.git.commit"] == tags["liveedit.commit"]
        assert tags["mlflow.source.name"].startswith("liveedit")
        assert tags["mlflow.user"] == getpass.getuser()
        (output,) = stage.outputs.model_outputs
        assert (output.model_id, output.step) == (model.model_id, 7)  # and back
        (entry,) = stage.inputs.dataset_inputs
        assert entry.dataset.name == "train"
        (used,) = stage.inputs.model_inputs
        model = client.get_logged_model(used.model_id)
    assert lineage == ["causal", "foundation"]
    assert model.tags["liveedit.fingerprint"] == model_fingerprint(tiny_model)
    logged = client.search_logged_models([model.experiment_id])
    assert len(logged) == 3  # start, foundation, causal; the version is the last
    assert {str(entry.status) for entry in logged} == {"READY"}


def test_the_note_of_a_model_says_what_goes_in_and_out(
    outbox: Outbox, mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    parent = outbox.start_pipeline("demo", {})
    parent.made("tiny", tiny_model, 1)
    assert outbox.flush()
    client = client_for(mlflow_uri)
    (output,) = client.get_run(parent.run_id).outputs.model_outputs
    place = client.get_logged_model(output.model_id).artifact_location
    signature = Model.load(place.removeprefix("file://")).signature
    assert [(spec.name, spec.type.kind, spec.shape) for spec in signature.inputs] == [
        ("prompt", "U", (-1,)),
        ("frames", "u", (-1, 32, 48, 3)),
    ]
    assert signature.outputs.input_names() == ["edited"]
