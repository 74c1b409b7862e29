"""The hub against plain lists, whoever reports, falls silent, comes back, stops or is new.

What it keeps from one report to the next shows only when the next is unlike it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve.admission.admission import Editor, Warm
from serve.hub.hub import GONE_S, Hub, Orders, Report
from serve.hub.placement import Placement, Scale
from serve.metrics import Metrics, Readings
from serve.settings import ServeSettings
from serve.versions.rolling import Version
from serve.versions.source import ModelSource, find_models

DEPLOYS = [find_models(["demo", "natural"]), find_models(["natural"])]
TARGET = "natural version 2"  # where one of the names points by now
SETTINGS = ServeSettings("demo", link_host="127.0.0.1", max_editors=3)
FRONTS, EDITORS = ("front x", "front y"), ("editor a", "editor b", "editor c")
AFTER = st.sampled_from(
    [0.3, 0.3, 4.0, GONE_S - 0.1, GONE_S + 2.0]
)  # seconds since what was before


@dataclass
class Known:
    """What a plain list says of a process that reports."""

    heard: float
    editor: bool
    loading: str = ""
    counted: int = 0


class HubMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.patch = patch("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: self.now))
        self.patch.start()
        self.runner = asyncio.Runner()
        self.hub = self.runner.run(self.make())
        self.alive: dict[str, Known] = {}
        self.metrics = {process: Metrics() for process in (*FRONTS, *EDITORS)}
        self.counted: dict[str, int] = {}  # by all that ever reported
        self.stopping: set[str] = set()
        self.sent_away: set[str] = set()  # editors that were told to go
        self.starting: dict[str, tuple[float, str]] = {}
        self.refused: set[tuple[str, str]] = set()
        self.failed: set[str] = set()
        self.lost, self.ending = 0, False
        self.spoken = False  # an editor has
        self.connections: dict[str, int] = {}  # of fronts that have heard of the end
        self.deployed, self.is_coming = (0.0, DEPLOYS[0]), True

    async def make(self) -> Hub:
        hub = Hub("app", SETTINGS, DEPLOYS[0])
        hub._watching.cancel()
        hub._following.cancel()
        hub._placement = Placement(Scale(1, 3, delay_s=5.0), lambda: self.now, catalog=hub._catalog)
        hub._follower._know(ModelSource("natural", TARGET), {"name": TARGET})
        hub._catalog.point("natural", Version(TARGET, (128, 224)), 1.0, None)
        return hub

    def teardown(self) -> None:
        self.runner.close()
        self.patch.stop()

    def sweep(self) -> None:
        for process, known in list(self.alive.items()):
            if known.heard <= self.now - GONE_S:
                del self.alive[process]
                if process not in self.stopping | self.sent_away:
                    self.lost += 1
                    self.fail(known.loading)
                self.refused = {pair for pair in self.refused if pair[0] != process}

    def fail(self, key: str) -> None:
        """Of what is coming: what sessions have already is only refused there."""
        if key == TARGET and self.is_coming:
            self.failed.add(key)

    def report(self, report: Report) -> Orders:
        process, editor = report.process, report.editor
        self.alive.pop(process, None)
        self.alive[process] = Known(self.now, editor is not None, editor.loading if editor else "")
        self.counted[process] = self.counted.get(process, 0) + 1
        self.metrics[process].frames.labels("ours", "m").inc()
        self.starting.pop(process, None)
        told = replace(report, metrics=self.metrics[process].snapshot())
        orders: Orders = self.runner.run(self.hub.report(told))
        assert orders.leave == (process in self.stopping)
        return orders

    # --- what happens

    @rule(process=st.sampled_from(FRONTS), connections=st.integers(0, 2), after=AFTER)
    def front_reports(self, process: str, connections: int, after: float) -> None:
        self.now += after
        if self.ending:
            self.connections[process] = connections
        orders = self.report(Report(process, [], connections=connections))
        assert orders.stop == self.ending
        assert (orders.menu is not None) == self.spoken
        if orders.menu is not None:
            names = {offer.name for offer in orders.menu.offers}
            assert names == {named.name for named in self.deployed[1]}

    @rule(process=st.sampled_from(FRONTS), began=st.sampled_from([1.0, 2.0, 3.0]),
          which=st.sampled_from([0, 1]))  # fmt: skip
    def front_of_a_deploy_reports(self, process: str, began: float, which: int) -> None:
        """For a while fronts of the old one report beside those of the new."""
        if began > self.deployed[0]:
            self.deployed, self.is_coming = (began, DEPLOYS[which]), False
        self.report(Report(process, [], serves=DEPLOYS[which], began=began))
        if self.ending:
            self.connections[process] = 0

    @rule(
        process=st.sampled_from(EDITORS),
        loading=st.sampled_from(["", "", TARGET]),
        fails=st.sampled_from(["", "demo", TARGET]),
        after=AFTER,
    )
    def editor_reports(self, process: str, loading: str, fails: str, after: float) -> None:
        self.now += after
        editor = Editor(process, 12, 8, models={"demo": Warm(12)}, loading=loading)
        models = {"demo": {"name": "demo"}}
        failed = {fails: "no memory"} if fails else {}
        orders = self.report(Report(process, [], models, editor, failed=failed))
        self.spoken = True
        self.sweep()
        if fails:
            self.refused.add((process, fails))
            self.fail(fails)
        assert not orders.stop
        if process in self.stopping:  # Serve stops it: nothing is worth beginning there
            assert (orders.go, orders.load, orders.drop) == (False, None, frozenset())
        if orders.go:
            self.sent_away.add(process)
        if orders.load is not None:  # it may die of it before it reports again
            self.alive[process] = Known(self.now, True, orders.load.key)

    @rule(
        process=st.sampled_from(EDITORS),
        doing=st.sampled_from(["loading", "warming"]),
        after=AFTER,
    )
    def editor_says_what_it_does(self, process: str, doing: str, after: float) -> None:
        self.now += after
        self.runner.run(self.hub.starting(process, doing))
        self.starting[process] = self.now, doing
        assert self.hub._heard == self.now  # a start of minutes is no silence, at which it ends

    @rule(stopped=st.sets(st.sampled_from([FRONTS[0], *EDITORS[:2]])))
    def serve_stops(self, stopped: set[str]) -> None:
        self.stopping = self.hub._stopping = set(stopped)

    @rule()
    def application_ends(self) -> None:
        self.ending = True
        self.sweep()
        fronts = [process for process, known in self.alive.items() if not known.editor]
        done = all(self.connections.get(process) == 0 for process in fronts)
        assert self.runner.run(self.hub.stop()) == done

    # --- what must be so

    @rule()
    def somebody_looks(self) -> None:
        self.sweep()
        told: dict[str, Readings] = self.runner.run(self.hub.snapshots())
        assert set(told) == {*self.alive, "hub", "gone"}
        edited = [
            sample.value
            for metrics in told.values()
            for metric in metrics
            for sample in metric.samples
            if sample.name == "liveedit_frames_edited_total"
        ]
        assert sum(edited) == sum(self.counted.values())
        lost = self.hub.metrics.registry.get_sample_value
        kinds = (lost("liveedit_processes_lost_total", {"kind": k}) for k in ("front", "editor"))
        assert sum(value or 0.0 for value in kinds) == self.lost

    @invariant()
    def who_starts_is_known(self) -> None:
        assert self.runner.run(self.hub.started()) == "; ".join(
            f"editor {process} is {doing}, for {self.now - since:.0f} s"
            for process, (since, doing) in self.starting.items()
        )

    @invariant()
    def what_failed_is_known_as_long_as_who_it_failed_at(self) -> None:
        assert self.hub._catalog.refused == self.refused
        assert self.hub._catalog.failed.keys() == self.failed


TestHub = HubMachine.TestCase
TestHub.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True,
    phases=[Phase.generate],  # add Phase.shrink for a shorter story, in minutes
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
