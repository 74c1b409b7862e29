"""The Ray Serve application: builds the two deployments and binds them.

serve deploy config.yaml        with `import_path: serve.app:app` and `args: {model: ...}`
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from serve import editor_replica, front_replica
from serve.settings import ServeSettings


def app(args: dict[str, Any]) -> Application:
    """`args` are the fields of `ServeSettings`. Raises ValueError that names what is wrong."""
    return build(ServeSettings.from_args(args))


def build(settings: ServeSettings) -> Application:
    settings.tokens()  # a token file that cannot be read is an error here, not in every replica
    editor = ray_serve.deployment(**editor_replica.describe_deployment(settings))(
        editor_replica.EditorReplica
    )
    front = ray_serve.deployment(**front_replica.describe_deployment(settings))(
        front_replica.FrontReplica
    )
    return front.bind(settings, editor.bind(settings))
