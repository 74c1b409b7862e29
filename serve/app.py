"""The Ray Serve application: builds the two deployments and binds them.

serve deploy config.yaml        with `import_path: serve.app:app` and `args: {model: ...}`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from serve.editor import replica as editor_replica
from serve.editor.model_source import find_model
from serve.front import replica as front_replica
from serve.settings import ServeSettings


def app(args: dict[str, Any]) -> Application:
    """`args` are the fields of `ServeSettings`. Raises UserError that names what is wrong."""
    return build(ServeSettings.from_args(args))


def build(settings: ServeSettings, registry: str | None = None) -> Application:
    """What is wrong with model or tokens is an error here, not in every replica.

    A reference to the registry is looked up once, so that all replicas, also those started later,
    have the same version. `registry` is MLflow's address; null is what MLFLOW_TRACKING_URI says.
    """
    settings.check_files()
    model = find_model(settings.model, registry)
    settings = replace(settings, model=model.directory)
    editor = ray_serve.deployment(**editor_replica.describe_deployment(settings))(
        editor_replica.EditorReplica
    )
    front = ray_serve.deployment(**front_replica.describe_deployment(settings))(
        front_replica.FrontReplica
    )
    return front.bind(settings, model.trained, editor.bind(settings, model))
