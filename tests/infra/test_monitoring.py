"""Dashboard and alerts ask for metrics that the application has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from serve.metrics import EditorMetrics, HubMetrics, Metrics
from serve.wire.protocol import Code

INFRA = Path(__file__).parent.parent.parent / "infra"
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}
# Prometheus adds the target's to what the application says.
TARGET_LABELS = {"job", "instance"}


def dashboard() -> Any:
    return json.loads((INFRA / "grafana" / "dashboards" / "liveedit.json").read_text())


def panel_expressions() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def labels_of_series() -> dict[str, set[str]]:
    """Every series that /metrics can have, with its labels."""
    found = {}
    for registry in (Metrics(), EditorMetrics(), HubMetrics()):
        for metric in vars(registry).values():
            for described in metric.describe() if hasattr(metric, "describe") else ():
                for suffix in SUFFIXES[described.type]:
                    labels = {"process", *metric._labelnames}
                    found[described.name + suffix] = labels | (
                        {"le"} if suffix == "_bucket" else set()
                    )
    return found


SERIES = labels_of_series()
EXPRESSIONS = [*panel_expressions(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_name_series_and_labels_of_the_application(expression: str) -> None:
    names = set(re.findall(r"\bliveedit_\w+", expression))
    assert names <= set(SERIES)
    # histogram_quantile and a rate over counters make sense of nothing else.
    for name in re.findall(r"\b(?:rate|increase)\((\w+)", expression):
        assert name.endswith(("_total", "_bucket", "_sum", "_count"))
    assert set(re.findall(r'code="(\w+)"', expression)) <= set(get_args(Code))
    known = set.union(TARGET_LABELS, *(SERIES[name] for name in names))
    selected = re.findall(r"(\w+)=~?\"", expression)
    grouped = re.findall(r"(?:by|on) \(([^)]*)\)", expression)
    assert {*selected, *(label for group in grouped for label in group.split(", "))} <= known


def test_every_metric_is_shown() -> None:
    shown = " ".join(panel_expressions())
    for registry in (Metrics(), EditorMetrics(), HubMetrics()):
        for metric in registry.registry.collect():
            assert re.search(rf"\b{metric.name}\b|\b{metric.name}_", shown), metric.name


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_of_what_there_is_a_share_is_used(expression: str) -> None:
    """Not the other way round, which is more than one always."""
    for used, there in re.findall(r"(liveedit_\w+_bytes) / (liveedit_\w+_bytes)", expression):
        assert re.sub(r"_(max|total)_bytes$", "_bytes", there) == used != there


def test_what_is_said_to_be_a_minutes_is_reckoned_so() -> None:
    """Rates are by the second."""
    for panel in dashboard()["panels"]:
        said = panel.get("description", "").lower() + panel["title"].lower()
        rates = [t["expr"] for t in panel.get("targets", []) if "rate(" in t["expr"]]
        if "minute" in said:
            assert all(expression.startswith("60 * ") for expression in rates), panel["title"]
        else:
            assert not any("60 *" in expression for expression in rates), panel["title"]


def test_panels_use_the_provisioned_source() -> None:
    path = INFRA / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_alerts_say_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["remedy"]


# What fires when: the border of the rule's last comparison and how long it is to be passed.
BORDERS = {
    "LiveEditDown": ("== 0", "1m", "page"),
    "LiveEditNoEditor": ("== 1", "1m", "page"),
    "LiveEditEditorsFull": ("> 0.6", "10m", "ticket"),
    "LiveEditSessionsRefused": ("> 0.05", "5m", "ticket"),
    "LiveEditInternalErrors": ("> 0", None, "ticket"),
    "LiveEditDeadlinesMissed": ("> 0.05", "5m", "ticket"),
    "LiveEditVersionFailed": ("> 0", None, "ticket"),
    "LiveEditReplicasLost": ("> 2", None, "ticket"),
    "LiveEditFramesDropped": ("> 0.1", "5m", "ticket"),
    "LiveEditStalls": ("> 0.5", "5m", "ticket"),
    "LiveEditGpuMemoryFull": ("> 0.95", "10m", "ticket"),
    "LiveEditHubFull": ("> 0.9", "5m", "ticket"),
    "LiveEditCodecsBehind": ("> 64", "2m", "ticket"),
    "LiveEditFirstChunkSlow": ("> 5", "5m", "ticket"),
}
COMPARED = r"(?:[><]=?|[!=]=) [\d.]+"


def test_alerts_fire_where_they_shall() -> None:
    found = {
        rule["alert"]: (
            re.findall(COMPARED, rule["expr"])[-1], rule.get("for"), rule["labels"]["severity"]
        )
        for rule in rules()
    }  # fmt: skip
    assert found == BORDERS


SPELLED = {"one frame in ten": "0.1", "one session in twenty": "0.95"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_the_figures_that_it_goes_by(rule: dict[str, Any]) -> None:
    said, asked = rule["annotations"]["summary"], rule["expr"]
    for minutes in re.findall(r"in (\d+) minutes", said):
        assert set(re.findall(r"\[(\w+)\]", asked)) == {f"{minutes}m"}
    for percent in re.findall(r"(\d+) %", said):
        assert f"> {int(percent) / 100:g} " in asked
    for words, number in SPELLED.items():
        if words in said:
            assert number in re.findall(r"[\d.]+", asked)
    # What is told in words of a label has that label; a rule of many says it of each.
    kept = {label for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", asked)
            for label in group.split(", ")}  # fmt: skip
    for label in re.findall(r"\$labels\.(\w+)", said):
        assert label in kept or not kept
    # Both sides of a comparison reckon over one span.
    assert len(set(re.findall(r"\[(\w+)\]", asked))) <= 1


def test_prometheus_asks_often_enough_for_what_its_rules_span() -> None:
    settings = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())["global"]
    assert settings == {"scrape_interval": "5s", "evaluation_interval": "15s"}
    targets = yaml.safe_load((INFRA / "prometheus" / "targets.yml").read_text())
    assert targets == [{"targets": ["host.docker.internal:8000"]}]
    provisioning = INFRA / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "$PROMETHEUS_URL")
    assert source["isDefault"] is True
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "liveedit.yml").read_text())[
        "providers"
    ]
    assert (provider["type"], provider["options"]["path"]) == ("file", "$DASHBOARDS")


def test_prometheus_reads_files_that_are_there(tmp_path: Path) -> None:
    config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] in rules()[0]["expr"]
    (discovery,) = job["file_sd_configs"]
    for name in (*config["rule_files"], *discovery["files"]):
        assert (INFRA / "prometheus" / name).is_file()


ALERT_TESTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="liveedit",instance="a"}}', values: '1x30'}}
      - {{series: 'liveedit_editor_load{{instance="a",process="e"}}', values: '0.95x5 stale'}}
      - {{series: 'liveedit_sessions_admitted_total{{instance="a",process="f"}}', values: '0+1x30'}}
      - {{series: 'liveedit_sessions_refused_total{{instance="a",process="f",code="at_capacity"}}',
          values: '0x9 0+1x20'}}
      - {{series: 'liveedit_chunk_deadlines_total{{instance="a",process="f",met="yes"}}',
          values: '0+9x30'}}
      - {{series: 'liveedit_chunk_deadlines_total{{instance="a",process="f",met="no"}}',
          values: '0x9 0+1x20'}}
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 5m
        exp_samples: []
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 8m
        exp_samples:
          - {{labels: '{{alertname="LiveEditNoEditor"}}', value: 1}}
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 20m
        exp_samples:
          - {{labels: '{{alertname="LiveEditNoEditor"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditSessionsRefused"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditDeadlinesMissed"}}', value: 1}}
  - interval: 1m
    input_series:
      - {{series: 'up{{job="liveedit",instance="a"}}', values: '1x5 0x20'}}
      - {{series: 'liveedit_editor_load{{instance="a",process="e"}}', values: '0.95x30'}}
      - {{series: 'liveedit_editor_load{{instance="a",process="g"}}', values: '0.95x30'}}
      - {{series: 'liveedit_sessions_ended_total{{instance="a",process="f",reason="internal"}}',
          values: '0x9 1x20'}}
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 12m
        exp_samples:
          - {{labels: '{{alertname="LiveEditDown"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditEditorsFull"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditInternalErrors"}}', value: 1}}
  - interval: 1m
    input_series:
      - {{series: 'up{{job="liveedit",instance="a"}}', values: '1x30'}}
      - {{series: 'liveedit_editor_load{{instance="a",process="e"}}', values: '0.1x30'}}
      - {{series: 'liveedit_sessions{{instance="a",process="f"}}', values: '4x30'}}
      - {{series: 'liveedit_processes_lost_total{{instance="a",process="hub",kind="editor"}}',
          values: '0x9 1 2 3 4x20'}}
      - {{series: 'liveedit_frames_edited_total{{instance="a",process="f"}}', values: '0+900x30'}}
      - {{series: 'liveedit_frames_dropped_total{{instance="a",process="f"}}',
          values: '0x9 0+100x20'}}
      - {{series: 'liveedit_stalls_total{{instance="a",process="f"}}', values: '0x9 0+1x20'}}
      - {{series: 'liveedit_gpu_memory_bytes{{instance="a",process="e",gpu="u"}}',
          values: '90x9 97x20'}}
      - {{series: 'liveedit_gpu_memory_total_bytes{{instance="a",process="e",gpu="u"}}',
          values: '100x30'}}
      - {{series: 'liveedit_hub_bytes{{instance="a",process="hub"}}', values: '9e8x9 1e9x20'}}
      - {{series: 'liveedit_hub_max_bytes{{instance="a",process="hub"}}', values: '1.1e9x30'}}
      - {{series: 'liveedit_codec_queue{{instance="a",process="f"}}', values: '5x9 100x20'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="f",le="5.0"}}',
          values: '0+10x9 90x20'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="f",le="10.0"}}',
          values: '0+10x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="f",le="+Inf"}}',
          values: '0+10x30'}}
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 8m
        exp_samples: []
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 22m
        exp_samples:
          - {{labels: '{{alertname="LiveEditReplicasLost"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditFramesDropped"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditStalls"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditGpuMemoryFull"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditHubFull"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditCodecsBehind"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditFirstChunkSlow"}}', value: 1}}
  # Two of everything, unlike each other, in one application, and another that is large and well:
  # of what is added up neither front alone would do, and what asks for all is not told by one.
  - interval: 1m
    input_series:
      - {{series: 'up{{job="liveedit",instance="a"}}', values: '1x30'}}
      - {{series: 'up{{job="liveedit",instance="b"}}', values: '1x30'}}
      - {{series: 'liveedit_editor_load{{instance="a",process="e"}}', values: '0.95x30'}}
      - {{series: 'liveedit_editor_load{{instance="a",process="g"}}', values: '0.1x30'}}
      - {{series: 'liveedit_editor_load{{instance="b",process="e"}}', values: '0.95x30'}}
      - {{series: 'liveedit_codec_queue{{instance="a",process="f"}}', values: '100x30'}}
      - {{series: 'liveedit_codec_queue{{instance="a",process="g"}}', values: '5x30'}}
      - {{series: 'liveedit_codec_queue{{instance="b",process="f"}}', values: '100x30'}}
      - {{series: 'liveedit_sessions_admitted_total{{instance="a",process="f"}}',
          values: '0+30x30'}}
      - {{series: 'liveedit_sessions_admitted_total{{instance="b",process="f"}}',
          values: '0+9e3x30'}}
      - {{series: 'liveedit_sessions_refused_total{{instance="a",process="f",code="at_capacity"}}',
          values: '0+1x30'}}
      - {{series: 'liveedit_sessions_refused_total{{instance="a",process="g",code="at_capacity"}}',
          values: '0+1x30'}}
      - {{series: 'liveedit_sessions_refused_total{{instance="b",process="f",code="bad_token"}}',
          values: '0+9e3x30'}}
      - {{series: 'liveedit_chunk_deadlines_total{{instance="a",process="f",met="yes"}}',
          values: '0+30x30'}}
      - {{series: 'liveedit_chunk_deadlines_total{{instance="a",process="f",met="no"}}',
          values: '0+1x30'}}
      - {{series: 'liveedit_chunk_deadlines_total{{instance="a",process="g",met="no"}}',
          values: '0+1x30'}}
      - {{series: 'liveedit_chunk_deadlines_total{{instance="b",process="f",met="yes"}}',
          values: '0+9e3x30'}}
      - {{series: 'liveedit_frames_edited_total{{instance="a",process="f"}}', values: '0+900x30'}}
      - {{series: 'liveedit_frames_edited_total{{instance="b",process="f"}}', values: '0+9e4x30'}}
      - {{series: 'liveedit_frames_dropped_total{{instance="a",process="f"}}', values: '0+50x30'}}
      - {{series: 'liveedit_frames_dropped_total{{instance="a",process="g"}}', values: '0+50x30'}}
      - {{series: 'liveedit_sessions{{instance="a",process="f"}}', values: '15x30'}}
      - {{series: 'liveedit_sessions{{instance="a",process="g"}}', values: '15x30'}}
      - {{series: 'liveedit_sessions{{instance="b",process="f"}}', values: '400x30'}}
      - {{series: 'liveedit_stalls_total{{instance="a",process="f"}}', values: '0+1x30'}}
      - {{series: 'liveedit_stalls_total{{instance="a",process="g"}}', values: '0+1x30'}}
      - {{series: 'liveedit_processes_lost_total{{instance="a",process="hub",kind="editor"}}',
          values: '0x9 1x20'}}
      - {{series: 'liveedit_processes_lost_total{{instance="a",process="hub",kind="front"}}',
          values: '0x9 1x20'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="f",le="5.0"}}',
          values: '0+10x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="f",le="+Inf"}}',
          values: '0+10x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="g",le="5.0"}}',
          values: '0+8x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="g",le="10.0"}}',
          values: '0+10x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="f",le="10.0"}}',
          values: '0+10x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="a",process="g",le="+Inf"}}',
          values: '0+10x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="b",process="f",le="5.0"}}',
          values: '0+9e3x30'}}
      - {{series: 'liveedit_first_chunk_seconds_bucket{{instance="b",process="f",le="+Inf"}}',
          values: '0+9e3x30'}}
    promql_expr_test:
      - expr: count by (alertname, instance) (ALERTS{{alertstate="firing"}})
        eval_time: 22m
        exp_samples:
          - {{labels: '{{alertname="LiveEditEditorsFull",instance="b"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditCodecsBehind",instance="b"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditSessionsRefused",instance="a"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditDeadlinesMissed",instance="a"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditFramesDropped",instance="a"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditStalls",instance="a"}}', value: 1}}
          - {{labels: '{{alertname="LiveEditFirstChunkSlow",instance="a"}}', value: 1}}
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_files_and_raises_the_alerts(tmp_path: Path) -> None:
    expressions = [{"record": "x", "expr": expression} for expression in panel_expressions()]
    panels = tmp_path / "panels.yml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": expressions}]}))
    alerts = tmp_path / "alerts.yml"
    alerts.write_text(ALERT_TESTS.format(rules=INFRA / "prometheus" / "alerts.yml"))
    for command in (
        ["check", "config", str(INFRA / "prometheus" / "prometheus.yml")],
        ["check", "rules", "--lint=none", str(panels)],
        ["test", "rules", str(alerts)],
    ):
        result = subprocess.run(["promtool", *command], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
