"""RayJobs made of rayjob.yaml: of one stage, for a queue of Kueue's, or only if there is work.

python -m infra.kuberay.job --stage foundation --queue team-a | kubectl apply -f -
python -m infra.kuberay.job --create-if-needed       # in a pod, see cronjob.yaml
"""

from __future__ import annotations

import argparse
import json
import shlex
import ssl
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

MANIFEST = Path(__file__).with_name("rayjob.yaml")
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "https://kubernetes.default.svc"
QUEUE = "kueue.x-k8s.io/queue-name"
RUNS_SOMETHING = 4  # of `liveedit train --plan --exit-code`
ENDED = ("Complete", "Failed")


def ray_job(stage: str | None = None, queue: str | None = None) -> dict[str, Any]:
    """The whole pipeline's RayJob, or one stage's, which a scheduler starts when those before it
    are done; `queue` is a LocalQueue, which then decides when it starts."""
    job: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    labels = job["metadata"].setdefault("labels", {})
    if queue is not None:
        labels[QUEUE] = queue
    if stage is not None:
        job["metadata"]["name"] += f"-{stage}"
        job["spec"]["entrypoint"] += f" --only {stage}"
    return job


def create_if_needed(job: dict[str, Any], api: str = API, account: Path = ACCOUNT) -> str:
    """Create `job` if its pipeline has something to do and none of its name is under way; what
    happened. Raises OSError where Kubernetes or the plan does not answer."""
    name = job["metadata"]["name"]
    namespace = (account / "namespace").read_text().strip()
    url = f"{api}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    found = _ask(account, f"{url}?labelSelector=liveedit.job%3D{name}")["items"]
    running = [
        one["metadata"]["name"]
        for one in found
        if one.get("status", {}).get("jobDeploymentStatus") not in ENDED
    ]
    if running:
        return f"{running[0]} is under way"
    plan = [*shlex.split(job["spec"]["entrypoint"]), "--plan", "--exit-code"]
    code = subprocess.run(plan, check=False).returncode
    if code == 0:
        return "nothing has changed"
    if code != RUNS_SOMETHING:
        raise OSError(f"{shlex.join(plan)} ended with {code}; see what it said above")
    labels = {**job["metadata"].get("labels", {}), "liveedit.job": name}
    fresh = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M}"
    _ask(account, url, {**job, "metadata": {**job["metadata"], "name": fresh, "labels": labels}})
    return f"created {fresh}"


def _ask(account: Path, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {(account / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        },
    )
    trust = ssl.create_default_context(cafile=account / "ca.crt") if url[:5] == "https" else None
    with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", help="one stage alone, e.g. foundation")
    parser.add_argument("--queue", help="LocalQueue of Kueue's")
    parser.add_argument("--create-if-needed", action="store_true", help="create, not print")
    given = parser.parse_args()
    job = ray_job(given.stage, given.queue)
    if given.create_if_needed:
        print(create_if_needed(job))
    else:
        yaml.safe_dump(job, sys.stdout, sort_keys=False)


if __name__ == "__main__":
    main()
