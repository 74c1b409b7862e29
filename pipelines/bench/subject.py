"""What a benchmark times: an editor with random or trained weights, and frames to feed it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from infra.runtime.errors import UserError
from modeling.config import MaskCacheConfig, ModelConfig, Scope, TextConfig, VaeConfig
from modeling.detail.work_size import work_size
from modeling.diffusion.transformer import Transformer
from modeling.editor import StreamingEditor
from modeling.model_dir import Model, check_choices, load_model
from modeling.presets import PRESETS
from modeling.streaming.picture import Detail
from modeling.vae.build import build_vae


@dataclass(frozen=True)
class BenchOptions:
    """What is asked for; None takes what the model was made with."""

    model: str  # a preset (random weights) or a model directory
    device: str
    chunks: int  # timed chunks of each variant
    sessions: int  # most concurrent sessions that are tried
    size: tuple[int, int] | None = None  # height, width in pixels
    vae: str | None = None
    no_cache: bool = False
    policy: str | None = None
    keep_ratio: float | None = None
    scope: Scope | None = None
    pruned_steps: tuple[int, ...] | None = None
    fp8: bool = False
    work_size: str = "full"  # at which the model sees frames of `size`
    detail: Detail = "off"
    guide_blur: float | Literal["decoded"] | None = None  # as `StreamConfig` has it

    def __post_init__(self) -> None:
        if self.chunks < 2:
            raise UserError(f"--chunks {self.chunks} leaves no spread to state; take 2 or more")
        if self.sessions < 0:
            raise UserError(f"--sessions {self.sessions} is negative; 0 leaves them out")
        if self.no_cache and (self.policy or self.keep_ratio or self.scope or self.pruned_steps):
            raise UserError("--no-cache excludes --policy, --keep, --scope and --pruned-steps")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("--device cuda finds no GPU that this PyTorch can use; see nvidia-smi")

    def mask_cache(self, config: ModelConfig) -> MaskCacheConfig | None:
        """The model's mask cache (or the default one) with what was asked for in its place."""
        if self.no_cache:
            return None
        asked = {
            "policy": self.policy,
            "keep_ratio": self.keep_ratio,
            "scope": self.scope,
            "pruned_steps": self.pruned_steps,
        }
        base = config.stream.usual_mask_cache
        chosen = replace(base, **{k: v for k, v in asked.items() if v is not None})  # type: ignore[arg-type]
        replace(config.stream, mask_cache=chosen)  # raises UserError if a step does not exist
        return chosen


def build_editor(options: BenchOptions) -> StreamingEditor:
    """An editor with the mask cache that was asked for.

    A preset's weights are drawn on the device itself: speed depends on sizes, not on values. No
    text encoder is loaded; prompts become pseudo-random embeddings of the encoder's shape, and
    cross-attention always reads all its tokens, so this costs a stream the same.
    """
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if options.model in PRESETS and not Path(options.model).exists():
        config, transformer, vae, card = PRESETS[options.model], None, None, {"name": options.model}
    else:
        if not Path(options.model).is_dir():
            raise UserError(
                f"{options.model} is neither a model directory nor one of the presets "
                f"{', '.join(sorted(PRESETS))}"
            )
        model = load_model(options.model, device=device, dtype=dtype)
        config, transformer, vae, card = model.config, model.transformer, model.vae, model.card
    text = TextConfig(kind="words", dim=config.text.dim, tokens=config.text.tokens)
    config = replace(config, text=text)
    if options.vae is not None and options.vae != config.vae.kind:
        stream = replace(config.stream, guide_blur=None)  # which was measured for the other VAE
        config, vae = replace(config, vae=VaeConfig(kind=options.vae), stream=stream), None
    if options.guide_blur is not None:
        blur = None if options.guide_blur == "decoded" else options.guide_blur
        config = replace(config, stream=replace(config.stream, guide_blur=blur))
    mask_cache = options.mask_cache(config)
    check_choices(replace(config, stream=replace(config.stream, mask_cache=mask_cache)))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        if transformer is None:
            transformer = Transformer(config.transformer)
            transformer.to(dtype).eval().requires_grad_(False)
        if vae is None:
            vae = build_vae(config.vae).to(dtype).eval().requires_grad_(False)
    model = Model(config, transformer, vae, card, None)
    return StreamingEditor(model, mask_cache=mask_cache, fp8=options.fp8)


def plain_editor(editor: StreamingEditor) -> StreamingEditor:
    """The same sizes with networks that were not made fast for a GPU, and no mask cache."""
    with torch.device(editor.device):
        transformer = Transformer(editor.config.transformer)
        vae = build_vae(editor.config.vae)
    for network in (transformer, vae):
        network.to(editor.transformer.dtype).eval().requires_grad_(False)
    model = Model(editor.config, transformer, vae, editor.card, None)
    return StreamingEditor(model, mask_cache=None, accelerated=False)


def describe(
    editor: StreamingEditor, options: BenchOptions, size: tuple[int, int]
) -> dict[str, Any]:
    """Everything that decides the work of a chunk, as JSON values."""
    config, stream, cache = editor.config, editor.settings, editor.mask_cache
    return {
        "model": options.model,
        "height": size[0],
        "width": size[1],
        "dtype": str(editor.transformer.dtype).removeprefix("torch."),
        "transformer": asdict(config.transformer),
        "vae": config.vae.kind,
        "chunk_frames": stream.chunk_frames,
        "window_latents": stream.window_latents,
        "sink_latents": stream.sink_latents,
        "steps": len(stream.timesteps),
        "fps": stream.fps,
        "fp8": options.fp8,
        **_work_of(editor, options, size),
        "mask_cache": cache and {**asdict(cache), "pruned_steps": list(cache.pruned_steps)},
    }


def _work_of(
    editor: StreamingEditor, options: BenchOptions, size: tuple[int, int]
) -> dict[str, Any]:
    """Nothing for a stream that is edited at its own size, as all were once."""
    if (options.work_size, options.detail) == ("full", "off"):
        return {}
    trained = editor.settings.height, editor.settings.width
    height, width = work_size(options.work_size, *size, trained)
    blur = editor.settings.guide_blur if options.detail == "source" else None
    guide = {} if blur is None else {"guide_blur": blur}  # as all reports were once
    return {"work_height": height, "work_width": width, "detail": options.detail, **guide}


def noise_frames(count: int, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, 3] to feed to streams."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
