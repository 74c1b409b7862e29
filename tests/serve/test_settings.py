"""What an operator can set: every name, type and border, and what becomes of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from serve.editor import replica as editor_replica
from serve.front import replica as front_replica
from serve.limits import Limits
from serve.settings import LISTS, ServeSettings

DEFAULTS = ServeSettings("demo")
WRONG: dict[str, list[Any]] = {
    "str": [1, True, None, ["x"]],
    "int": ["1", 1.5, True, None],
    "float": ["1", True, None, [1.0]],
    "bool": [1, "true", None],
    "str | None": [1, True],
    "Detail": [1, None],
    "NewVersion": [1, None],
}
RIGHT: dict[str, list[Any]] = {
    "str": ["x"], "int": [7], "float": [7, 7.5], "bool": [True, False], "str | None": [None, "x"],
    "Detail": ["source", "off"], "NewVersion": ["finish", "move"],
}  # fmt: skip


@pytest.mark.parametrize("kind", [ServeSettings, Limits])
def test_every_setting_has_its_type(kind: type) -> None:
    for field in fields(kind):
        if field.name in ("limits", *LISTS):
            continue

        def args(value: Any, name: str = field.name) -> dict[str, Any]:
            here = {"model": "demo", "max_editors": 9}
            return (
                {**here, name: value}
                if kind is ServeSettings
                else {**here, "limits": {name: value}}
            )

        for value in WRONG[str(field.type)]:
            with pytest.raises(ValueError, match=f"{field.name} must be"):
                ServeSettings.from_args(args(value))
        special = {
            "model": ["demo"],
            "log_format": ["text", "json"],
            "work_size": ["native", "full", "416x240"],
        }
        right = special.get(field.name, RIGHT[str(field.type)])
        for value in right:
            made = ServeSettings.from_args(args(value))
            assert getattr(made if kind is ServeSettings else made.limits, field.name) == value


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({}, "serve needs `model`"),
        ({"model": "demo", "models": ["natural"]}, "model='demo' and models=\\['natural'\\]"),
        ({"models": []}, "serve needs `model` or, for several, `models`"),
        ({"models": "demo"}, "models must be a list of texts, got 'demo'"),
        ({"model": "demo", "on_new_version": "wait"}, "must be one of finish, move, got 'wait'"),
        ({"model": "demo", "hub_memory_gb": 0}, "hub_memory_gb must be more than 0, got 0"),
        ({"model": "demo", "editor_memory_gb": -1}, "editor_memory_gb must be 0 or more, got -1"),
        ({"model": "demo", "gpu_hour_cost": -0.1}, "gpu_hour_cost must be 0 or more, got -0.1"),
        ({"model": "demo", "gpu_hour_cost": float("nan")}, "gpu_hour_cost must be 0 or more"),
        ({"model": "demo", "port": 1}, "no setting port"),
        ({"model": "demo", "limits": {"max_size": 1}}, "no setting limits.max_size"),
        ({"model": "demo", "limits": 3}, "limits has fields"),
        ({"model": "demo", "log_format": "xml"}, "log_format must be text or json, got 'xml'"),
        ({"model": "demo", "detail": "on"}, "detail must be one of source, off, got 'on'"),
        ({"model": "demo", "work_size": "half"}, "work_size: work size 'half' is none; choose"),
        ({"model": "demo", "max_editors": 1, "min_editors": 2}, "max_editors=1 is less"),
        *[
            ({"model": "demo", "max_editors": 9, name: 0}, f"{name} must be 1 or more, got 0")
            for name in ("max_sessions", "min_editors", "fronts")
        ],
    ],
)
def test_what_cannot_be_is_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ServeSettings.from_args(args)


@pytest.mark.parametrize(
    "wrong",
    [
        "https://a",
        [1],
        "https://a/",
        ["https://a/"],
        ["https://a/x"],
        ["a.example"],
        ["ws://a"],
        ["*"],
    ],
)
def test_an_origin_is_an_origin(wrong: Any) -> None:
    args = {"model": "demo", "allowed_origins": ["https://a", "http://b:8000"]}
    assert ServeSettings.from_args(args).allowed_origins == ("https://a", "http://b:8000")
    with pytest.raises(ValueError, match="serve setting allowed_origins"):
        ServeSettings.from_args(args | {"allowed_origins": wrong})


@pytest.mark.parametrize(
    "wrong", ["832x480", [1], ["832"], ["832x"], ["0x480"], ["832x480x3"], ["full"], ["832X480"]]
)
def test_a_size_to_be_warm_for_is_a_size(wrong: Any) -> None:
    args = {"model": "demo", "warm_sizes": ["832x480", "480x832"]}
    assert ServeSettings.from_args(args).warm_frames == [(480, 832), (832, 480)]
    with pytest.raises(ValueError, match="serve setting warm_sizes"):
        ServeSettings.from_args(args | {"warm_sizes": wrong})


def test_the_borders_are_fine() -> None:
    args = {"model": "demo", "max_sessions": 1, "min_editors": 2, "max_editors": 2, "fronts": 1}
    assert ServeSettings.from_args(args).min_editors == 2
    assert ServeSettings.from_args({"model": "demo", "limits": None}).limits == Limits()


def test_the_defaults_are_those_that_were_written_down() -> None:
    limits = DEFAULTS.limits
    assert (limits.min_side, limits.max_side, limits.max_pixels) == (16, 1920, 1280 * 720)
    assert limits.max_work_pixels == 1280 * 720
    assert (DEFAULTS.work_size, DEFAULTS.detail) == ("native", "source")
    assert (limits.max_fps, limits.max_prompt) == (60.0, 2000)
    assert (limits.open_timeout_s, limits.idle_timeout_s, limits.stalled_reader_s) == (10, 60, 60)
    assert (limits.resume_s, limits.max_sessions, limits.max_upload) == (60, 256, 512 * 2**20)
    assert (DEFAULTS.max_sessions, DEFAULTS.min_editors, DEFAULTS.max_editors) == (8, 1, 1)


def test_what_ray_is_asked_for() -> None:
    chosen = replace(
        DEFAULTS, max_sessions=3, editor_gpus=0.5, editor_cpus=2.0, front_cpus=0.25, fronts=4,
        drain_s=77.0, limits=Limits(max_sessions=10),
    )  # fmt: skip
    editor = editor_replica.describe_deployment(chosen)
    assert editor["max_ongoing_requests"] >= 3
    assert editor["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.5}
    assert editor["graceful_shutdown_timeout_s"] == 77.0
    assert editor["num_replicas"] == 1
    front = front_replica.describe_deployment(chosen)
    assert front["num_replicas"] == 4
    assert front["max_ongoing_requests"] > 10 + Limits().max_silent
    assert front["ray_actor_options"] == {"num_cpus": 0.25}
    assert front["graceful_shutdown_timeout_s"] == 77.0
    many = editor_replica.describe_deployment(replace(chosen, min_editors=2, max_editors=5))
    assert "num_replicas" not in many
    scaling = many["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.policy.policy_function == "serve.admission.decisions:follow"
    # The hub waits for as long as the setting says; Serve waits no longer on top.
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0.0, 0.0)
    assert replace(chosen, downscale_delay_s=33.0).scale.delay_s == 33.0


def test_one_model_is_a_list_of_one() -> None:
    assert ServeSettings("demo").references == ("demo",)
    several = ServeSettings.from_args({"models": ["models:/liveedit@production", "demo"]})
    assert several.references == ("models:/liveedit@production", "demo")
