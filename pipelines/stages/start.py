"""The model directory that training starts from: new weights, or a given model."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from infra.runtime.paths import find_path
from infra.runtime.registry import SCHEME
from modeling.config import ModelConfig, StreamConfig
from modeling.diffusion.identity_start import start_as_identity
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import load_model, read_config, save_model
from modeling.vae.build import build_vae
from modeling.vae.pyramid_start import start_as_pyramid
from modeling.vae.tiny import TinyVae
from pipelines.config.load import section_plain
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.chain import Chain
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import fingerprint_of
from pipelines.tracking.registry import resolve


def start(chain: Chain, source: Path | None) -> Path:
    """The model directory that the first trained stage starts from; `source` is `start_source`."""
    if source is not None and (found := read_config(source).stream) == with_guide(
        chain.model.stream, found
    ):
        chain.runner.pass_over("start", str(chain.config.model.start))
        return source
    target = chain.output / "models" / "start"

    def make(run: Run, key: str) -> dict[str, float]:
        start_model(chain.model, source, target, seed=chain.config.seed)
        return {}

    inputs = {
        "model": section_plain(chain.model),
        "seed": chain.config.seed,
        "source": fingerprint_of(source) if source else None,
    }
    return Path(chain.run("start", inputs, target, make).output)


def start_source(config: PipelineConfig) -> Path | None:
    """The model directory behind `model.start`, checked against the preset; None for none."""
    start = config.model.start
    if start is None:
        return None
    path = _model_at(f"model.start={start}", start, config, "null to start from scratch")
    _check_same_networks(start, read_config(path), config.model.resolve())
    return path


def teacher_source(config: PipelineConfig) -> Path | None:
    """The model directory behind `distill.teacher`, likewise; None for the foundation stage's."""
    teacher = config.distill.teacher
    if teacher is None:
        return None
    return _model_at(
        f"distill.teacher={teacher}", teacher, config, "null for the foundation stage's"
    )


def _model_at(setting: str, name: str, config: PipelineConfig, otherwise: str) -> Path:
    if name.startswith(SCHEME):
        assert config.tracking.uri is not None
        path = resolve(name, config.tracking.uri)
    else:
        path = find_path(name)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{setting} is no model directory; give one that training or "
            f"`liveedit import` wrote (see liveedit import --help), or {otherwise}"
        )
    return path


def start_model(config: ModelConfig, source: Path | None, target: Path, *, seed: int) -> Path:
    """Write the start model to `target`: random networks, or those of `source` with our stream."""
    if source is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer, vae = Transformer(config.transformer), build_vae(config.vae)
            identity = start_as_identity(transformer)
            if isinstance(vae, TinyVae):
                start_as_pyramid(vae)
        weights = f"random, seed {seed}" + (", as an editor that changes nothing" * identity)
        card: dict[str, Any] = {"name": "start", "weights": weights}
        if config.text.kind == "words":
            card["words"] = []  # it knows none yet, where an imported model's are not told
        return save_model(target, config, transformer=transformer, vae=vae, card=card)
    model = load_model(source)
    text = Path(model.config.text.path) if model.config.text.path else None
    # With the weights goes what was measured for them: mean and std of the VAE's latents, and how
    # much it blurs.
    stream = with_guide(config.stream, model.config.stream)
    config = replace(config, vae=model.config.vae, text=model.config.text, stream=stream)
    card = model.card | {"parent": str(source)}
    return save_model(
        target, config, transformer=model.transformer, vae=model.vae, text=text, card=card
    )


def with_guide(stream: StreamConfig, source: StreamConfig) -> StreamConfig:
    """`stream` with the guide that was measured for `source`, unless it names one itself."""
    chosen = source.guide_blur if stream.guide_blur is None else stream.guide_blur
    return replace(stream, guide_blur=chosen)


def _check_same_networks(start: str, found: ModelConfig, wanted: ModelConfig) -> None:
    for section in ("transformer", "vae", "text"):
        a, b = getattr(found, section), getattr(wanted, section)
        different = [
            f"model.{section}.{entry.name} is {getattr(a, entry.name)} there, "
            f"{getattr(b, entry.name)} here"
            for entry in fields(a)
            if getattr(a, entry.name) != getattr(b, entry.name)
            and entry.name not in ("path", "mean", "std")  # a place; what VAE training measured
        ]
        if different:
            raise ConfigError(
                f"model.start={start} does not have the sizes this configuration asks for: "
                f"{'; '.join(different)}; change them, or set model.start=null"
            )
