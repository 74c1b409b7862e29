"""The Ray Serve application: builds the two deployments and binds them.

serve deploy config.yaml        with `import_path: serve.app:app` and `args: {model: ...}`
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from serve.editor import replica as editor_replica
from serve.front import replica as front_replica
from serve.settings import ServeSettings
from serve.versions.source import find_models


def app(args: dict[str, Any]) -> Application:
    """`args` are the fields of `ServeSettings`. Raises UserError that names what is wrong."""
    return build(ServeSettings.from_args(args))


def build(settings: ServeSettings, registry: str | None = None) -> Application:
    """What is wrong with model or tokens is an error here, not in every replica.

    References to the registry are looked up once, so that all replicas begin with the same
    versions; the hub follows their aliases from there. `registry` is MLflow's address; null is what
    MLFLOW_TRACKING_URI says.
    """
    settings.check_files()
    serves = find_models(settings.references, registry)
    editor = ray_serve.deployment(**editor_replica.describe_deployment(settings))(
        editor_replica.EditorReplica
    )
    front = ray_serve.deployment(**front_replica.describe_deployment(settings))(
        front_replica.FrontReplica
    )
    return front.bind(settings, serves, editor.bind(settings, serves))
