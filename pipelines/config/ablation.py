"""A grid of what can be varied in a trained model: which cache, how many steps, and so on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from modeling.config import MaskCacheConfig, StreamConfig
from modeling.streaming.policies import POLICIES
from pipelines.config.merge import ConfigError

GRID = 1000  # of timesteps
# cache=: the policy and what a token that it does not keep skips. Another entry of POLICIES is
# taken by its own name, and skips what the model says.
CACHES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "published": {"policy": "published", "scope": "attention"},
    "attention": {"policy": "budget", "scope": "attention"},
    "feedforward": {"policy": "budget", "scope": "feedforward"},
    "block": {"policy": "budget", "scope": "block"},
    "follow": {"policy": "follow", "scope": "block"},
    "settled": {"policy": "settled", "scope": "block"},
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("+"))


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(f"{text} is neither true nor false")
    return text == "true"


def _history(text: str) -> str:
    if text not in ("own", "truth"):
        raise ConfigError(f"{text} is neither own nor truth")
    return text


AXES: dict[str, Callable[[str], Any]] = {  # in the order of the table's columns
    "stages": str,
    "cache": str,
    "keep": float,  # share kept by the policies of a fixed share
    "pruned": _numbers,  # steps in which the cache prunes, from 0: 1+2
    "threshold": float,  # of follow and settled
    "dilate": int,
    "steps": int,
    "whole": int,  # steps of a foundation model that sees all of a clip at once; 0: streamed
    "guidance": float,  # of these, classifier-free: 1 is none
    "window": int,  # latents
    "sinks": int,
    "history": _history,  # own: what a stream made itself; truth: the right edit's latents
    "seed": int,
    "work_size": str,
    "detail": _truth,
}
KINDS = {int: "a whole number", float: "a number", _numbers: "whole numbers, as in 1+2"}
ALSO_SETTINGS = ("seed", "work_size", "detail")  # of the benchmark, where nothing is varied
Variant = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """`variants`: one dictionary of axis: value for each line of the table, the first the baseline;
    `settings`: the words that are no axis."""

    variants: tuple[Variant, ...]
    settings: tuple[str, ...]


def parse_grid(words: Iterable[str], also_settings: Sequence[str] = ALSO_SETTINGS) -> Grid:
    """`cache=none,follow steps=1,4 clips=8` -> four variants and clips=8. Raises ConfigError."""
    axes: dict[str, list[Any]] = {}
    settings = []
    for word in words:
        name, _, values = word.partition("=")
        close = difflib.get_close_matches(name, AXES, n=1, cutoff=0.75)
        if name not in AXES and "," in values and close:
            raise ConfigError(f"{word}: nothing of that name is varied; did you mean {close[0]}?")
        if name not in AXES or (name in also_settings and "," not in values):
            settings.append(word)
            continue
        try:
            axes[name] = [AXES[name](value) for value in values.split(",")]
        except ConfigError as error:
            raise ConfigError(f"{word}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{word}: every value is {KINDS[AXES[name]]}") from error
    if not axes:
        raise ConfigError(f"nothing is varied; give one of {', '.join(AXES)}, e.g. steps=1,2,4")
    for name in axes.get("cache", []):
        if name not in CACHES and name not in POLICIES:
            own = [policy for policy in POLICIES if policy not in CACHES and policy != "budget"]
            raise ConfigError(f"cache={name} is none of {', '.join([*CACHES, *own])}")
    if "guidance" in axes and not any(axes.get("whole", [])):
        raise ConfigError("guidance= is of clips that are sampled whole; give whole=50 too")
    columns = [name for name in AXES if name in axes]
    rows = [dict(zip(columns, row, strict=True)) for row in product(*(axes[n] for n in columns))]
    return Grid(tuple(_without_what_does_nothing(rows)), tuple(settings))


def _without_what_does_nothing(rows: Iterable[Variant]) -> Iterable[Variant]:
    """Each distinct variant once: what says nothing about a row's way of editing is left out."""
    seen: list[Variant] = []
    for row in rows:
        cache = row.get("cache")
        streamed = ("cache", "keep", "pruned", "threshold", "dilate", "steps", "window", "sinks",
                    "history")  # fmt: skip
        other = streamed if row.get("whole") else ("guidance",)
        idle = {
            "none": ("keep", "pruned", "threshold", "dilate"),
            "follow": ("keep",),
            "settled": ("keep",),
            None: (),
        }.get(cache, ("threshold", "dilate"))
        row = {name: value for name, value in row.items() if name not in idle + other}
        if row not in seen:
            seen.append(row)
    return seen


def stream_of(stream: StreamConfig, variant: Mapping[str, Any]) -> StreamConfig:
    """`stream` as `variant` wants it. Raises ValueError for what does not fit together."""
    changes: dict[str, Any] = {}
    if "steps" in variant:
        steps = int(variant["steps"])
        if not 1 <= steps <= GRID:
            raise ConfigError(f"steps={steps} must be at least 1 and at most {GRID}")
        changes["timesteps"] = tuple(round(GRID * (steps - n) / steps) for n in range(steps))
    if not 0 <= variant.get("whole", 0) <= GRID:
        raise ConfigError(f"whole={variant['whole']} must be at least 0 and at most {GRID}")
    for name, field in (("window", "window_latents"), ("sinks", "sink_latents")):
        if name in variant:
            changes[field] = variant[name]
    cache = stream.mask_cache
    if "cache" in variant:
        name = variant["cache"]
        chosen = CACHES.get(name, {"policy": name})
        cache = None if chosen is None else replace(cache or MaskCacheConfig(), **chosen)
    if cache is not None:
        names = {"keep": "keep_ratio", "pruned": "pruned_steps", "threshold": "threshold",
                 "dilate": "dilate"}  # fmt: skip
        cache = replace(cache, **{names[n]: variant[n] for n in names if n in variant})
        count = len(changes.get("timesteps", stream.timesteps))
        if "pruned" not in variant:
            # What is asked within the chunk has nothing to lose in any of them.
            within = POLICIES[cache.policy].asked_within
            some = tuple(step for step in cache.pruned_steps if step < count)
            cache = replace(cache, pruned_steps=tuple(range(1, count)) if within else some)
    return replace(stream, mask_cache=cache, **changes)


def label(variant: Variant) -> str:
    """As it was asked for: `cache=follow steps=4`."""

    def text(value: Any) -> str:
        return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return " ".join(f"{name}={text(value)}" for name, value in variant.items())
