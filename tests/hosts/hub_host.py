"""Prints the address of the host that the hub is on, of the Ray at RAY_ADDRESS.

With an address, the hub is made again until Ray has put it on another host than that.
"""

from __future__ import annotations

import sys
import time

import ray

from infra.runtime.environment import variable
from serve.hub.hub import NAMESPACE, hub_name
from serve.run import APP

ray.init(address=variable("RAY_ADDRESS"), namespace=NAMESPACE, log_to_driver=False)
while True:
    try:
        hub = ray.get_actor(hub_name(APP))
        host = ray.get(hub.commits.remote(), timeout=20).host
    except (ValueError, ray.exceptions.RayError):  # it is being started
        time.sleep(0.2)
        continue
    if [host] != sys.argv[1:]:
        print("the hub is on", host, flush=True)
        break
    ray.kill(hub, no_restart=True)
