"""One training on two hosts, of which one vanishes: `make hosts`, as `test_serving`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import BIN, Cluster, Process, cluster
from tests.hosts.network import missing, network
from tests.hosts.test_serving import shipped_variables
from tests.pipelines.training.benches import write

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.timeout(900)]

STEPS = 400
AT = 60  # steps after which a host vanishes
WENT_ON = r"goes on from its checkpoint at step (\d+)"
INTERFACE = "eth0"  # the hosts share this machine's name, by which gloo would look for an address


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Cluster]:
    """A worker fits on each of `b` and `c`; the head has no room for one."""
    if why := missing():
        pytest.skip(why)
    with network("a", "b", "c") as net, cluster(net) as ray:
        ray.node("a", "--num-cpus=0", **shipped_variables())
        for name in "bc":
            worker(ray, name)
        yield ray


def worker(ray: Cluster, name: str) -> None:
    ray.node(name, "--num-cpus=1", GLOO_SOCKET_IFNAME=INTERFACE)


def training(ray: Cluster, start: Path, dataset: str, output: Path) -> Process:
    command = (BIN / "python", "-m", "tests.hosts.train_host", start, dataset, output, STEPS)
    return ray.start("a", *command)


def test_a_training_outlives_a_host(two_hosts: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    """Bit for bit as the one that nothing happened to; nobody starts it again."""
    dataset = write(tmp_path / "encoded")
    weights = {}
    for name in ("whole", "broken"):
        running = training(two_hosts, tiny_model, dataset, tmp_path / name)
        if name == "broken":
            running.wait_for(f"step {AT} ")
            since = time.monotonic()
            two_hosts.net.vanish("c")
            two_hosts.net.heal("c")
            worker(two_hosts, "c")  # what a cluster does for whoever lost a node
            running.wait_for("resumed True")
            print(f"training: goes on {time.monotonic() - since:.1f} s after its host vanished")
        running.wait_for("trained")
        weights[name] = (tmp_path / name / "model" / "transformer.safetensors").read_bytes()
        said = "".join(running.said)
        resumed = [int(step) for step in re.findall(WENT_ON, said)]
        assert len(resumed) == (name == "broken"), said
    assert AT - 20 <= resumed[0] < STEPS
    assert weights["whole"] == weights["broken"]
