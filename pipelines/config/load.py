"""A pipeline's configuration: a YAML file over the defaults, `key=value` over that.

OmegaConf is seen here and in `merge` alone; everything else gets plain dataclasses. An unknown key,
a wrong type or an impossible combination is a ConfigError, before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from yaml import YAMLError

from infra.runtime.registry import resolve_uri
from pipelines.config.merge import ConfigError, merge_defaults, parse_overrides
from pipelines.config.pipeline import PipelineConfig

RECIPES = Path(__file__).parent.parent / "recipes"
T = TypeVar("T")


# Settings that came later, at values that mean what was done before: said, they would be other
# inputs of whatever was made then, and all of it be made again.
UNSAID = (("method", None), ("history", "own"), ("guide_blur", None))


def load_config(source: str | Path = "demo", overrides: Iterable[str] = ()) -> PipelineConfig:
    """The validated configuration of `source` (a file, or a name in pipelines/recipes).

    Raises ConfigError.
    """
    path = _find(source)
    try:
        layer = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not OmegaConf.is_dict(layer):
        raise ConfigError(
            f"{path} is a list; give keys with values, as in foundation: {{steps: 9}}"
        )
    config = merge_defaults(
        PipelineConfig, [(str(path), layer), ("command line", parse_overrides(overrides))]
    )
    config.tracking.uri = resolve_uri(config.tracking.uri)
    _check_choices(config)
    return config


def recipes() -> dict[str, str]:
    """The names in pipelines/recipes, and the first sentence of what each says it is for."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        lines = takewhile(lambda line: re.match(r"# \S", line), path.read_text().splitlines())
        text = " ".join(line.removeprefix("# ") for line in lines)
        found[path.stem] = text.partition(". ")[0].rstrip(".:") + "."
    return found


def load_section(kind: type[T], overrides: Iterable[str]) -> T:
    """One section's dataclass with `key=value` over its defaults."""
    return merge_defaults(kind, [("command line", parse_overrides(overrides))])


def to_plain(config: PipelineConfig) -> dict[str, Any]:
    """Plain JSON values, for other processes and for MLflow."""
    return asdict(config)


def from_plain(plain: dict[str, Any]) -> PipelineConfig:
    """The inverse of `to_plain`; no second validation."""
    return merge_defaults(PipelineConfig, [("plain values", plain)])


def to_yaml(config: PipelineConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def resolved_yaml(config: PipelineConfig) -> str:
    """The same with every size of the model, whether the preset's or changed."""
    plain = to_plain(config)
    plain["model"] |= section_plain(config.model.resolve())
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _check_choices(config: PipelineConfig) -> None:
    from modeling.losses.velocity import WEIGHTINGS  # import PyTorch, which takes seconds
    from modeling.model_dir import check_choices

    try:
        check_choices(config.model.resolve())
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    for section in (config.foundation, config.causal):
        try:
            WEIGHTINGS[section.weighting]
        except ValueError as error:
            raise ConfigError(f"{section.SECTION}.weighting: {error}") from error


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            known = ", ".join(recipes())
            raise ConfigError(
                f"there is no config file {path}; check the path, or name one that ships: {known}"
            )
        return path
    named = RECIPES / f"{source}.yaml"
    if not named.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise ConfigError(
            f"there is no config {str(source)!r}; give a .yaml file or one of {', '.join(names)}"
        )
    return named


def section_plain(section: object) -> dict[str, Any]:
    """One section as plain values, for hashing, without `UNSAID`."""
    return _said(asdict(cast(Any, section)))


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _said(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if (name, value) not in UNSAID
    }
