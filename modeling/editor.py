"""StreamingEditor: one loaded model that opens any number of independent streams.

editor = StreamingEditor.load("path/to/model", device="cuda")
stream = editor.open("make the red circle blue", height=480, width=832, seed=0)
for frames in source:                      # uint8 [n, H, W, 3], any n
    for chunk in stream.push(frames):      # as soon as it is complete
        show(chunk.frames)
last = stream.flush()
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from infra.runtime.errors import UserError
from modeling import cpu
from modeling.config import MaskCacheConfig, ModelConfig, StreamConfig
from modeling.detail.guide import Follow, following
from modeling.detail.resample import Resize, resize
from modeling.detail.transfer import Transfer, transfer
from modeling.detail.work_size import in_pixels, in_words
from modeling.detail.work_size import work_size as work_size_in_pixels
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.fingerprint import model_fingerprint
from modeling.gpu.accelerate import accelerate, fast_detail
from modeling.model_dir import Model, ModelError, latents_identity, load_model
from modeling.streaming.forward import ForwardOn, PlainForward
from modeling.streaming.picture import Detail
from modeling.streaming.policies import POLICIES
from modeling.streaming.state import StateError, StreamState
from modeling.streaming.stream import EditStream
from modeling.text.build import build_text_encoder
from modeling.text.encoder import TextEncoder
from modeling.text.words import unknown_words
from modeling.vae.streaming import StreamingVae

SAMPLED = 64  # numbers of each weight that tell networks without a directory apart


class StreamingEditor:
    """A model that is ready to edit. Streams share its weights and nothing else.

    Not safe for use by several threads at once: a stream's methods run the networks.
    """

    def __init__(
        self,
        model: Model,
        *,
        mask_cache: MaskCacheConfig | None,
        name: str | None = None,
        fp8: bool = False,
        accelerated: bool = True,
    ) -> None:
        """`name` is the model's, by default its card's or its folder's. Networks that are not
        `accelerated` run as they are: slower, with the same results but for rounding."""
        if model.transformer is None or model.vae is None:
            absent = "transformer" if model.transformer is None else "vae"
            raise ModelError(
                f"{model.path} has no {absent}.safetensors, so it cannot edit; "
                "export a whole model or import the missing part"
            )
        self.config: ModelConfig = model.config
        self.card: dict[str, Any] = model.card
        self.transformer: Transformer = model.transformer
        self.vae: StreamingVae = model.vae
        if mask_cache is not None:
            POLICIES[mask_cache.policy]  # a wrong name is refused here, not by the first stream
        self.mask_cache = mask_cache
        self.name = name or str(model.card.get("name") or (model.path or Path("random")).name)
        self.identity = _identity(model)
        self.latents = _latents(model)
        self.device = self.transformer.patch_embedding.weight.device
        self.flow = FlowSchedule(self.settings.shift, self.device)
        self.timesteps = self.flow.warp(self.settings.timesteps)  # [steps]
        self.accelerated = accelerated and self.device.type == "cuda"
        if fp8 and not self.accelerated:
            raise UserError(f"fp8 needs a GPU, the model is on {self.device}; leave it out")
        self.resize: Resize
        self.following: Follow
        self.transfer: Transfer
        detail = fast_detail() if self.accelerated else (resize, following, transfer)
        self.resize, self.following, self.transfer = detail
        self.forward_on: ForwardOn = (
            accelerate(self.transformer, self.vae, fp8=fp8)
            if self.accelerated
            else partial(PlainForward, self.transformer)
        )
        if accelerated and self.device.type == "cpu" and cpu.multiplies_bfloat16():
            cpu.accelerate(self.vae)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        mask_cache: MaskCacheConfig | Literal["model"] | None = "model",
        name: str | None = None,
        fp8: bool = False,
        tell: Callable[[str], None] = lambda doing: None,
    ) -> StreamingEditor:
        """Load a model directory (or a preset's name, with random weights).

        `dtype` None is float32 on a CPU (but see `modeling.cpu`) and bfloat16 on a GPU.
        `mask_cache` "model" takes what the model was exported with, None recomputes every token.
        `fp8` computes most linear layers in 8 bits: faster and further off. `tell` hears what takes
        its time. ModelError if the directory cannot be read, ValueError if the device has no fp8.
        """
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        tell("loading weights")
        model = load_model(path, device=device, dtype=dtype)
        if torch.device(device).type == "cuda":
            tell("compiling kernels")
        chosen = model.config.stream.mask_cache if mask_cache == "model" else mask_cache
        return cls(model, mask_cache=chosen, name=name, fp8=fp8)

    @property
    def settings(self) -> StreamConfig:
        return self.config.stream

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder, loaded when the first prompt needs it."""
        return build_text_encoder(self.config.text).to(self.device)

    @property
    def trained_at(self) -> list[tuple[int, int]]:
        """Heights and widths that it was trained at, the last ones last."""
        own = in_words((self.settings.height, self.settings.width))
        return [in_pixels(size) for size in self.card.get("trained_at") or [own]]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that this model was never taught, as far as its card says."""
        return unknown_words(prompt, frozenset(self.card.get("words", ())))

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> TextKV:
        """Cross-attention keys and values of one prompt."""
        return self.transformer.prepare_text(self.text.encode([prompt]).to(self.device))

    def open(
        self,
        prompt: str,
        *,
        height: int,
        width: int,
        seed: int = 0,
        work_size: str = "full",
        detail: Detail = "off",
        mask_cache: MaskCacheConfig | Literal["model"] | None = "model",
    ) -> EditStream:
        """A new stream of `height` x `width` pixel frames, each at least 16.

        The model sees them at `work_size` (`modeling.detail.work_size`: "full", "3/4", "1/2",
        "native", "416x240"), and its edits are brought back to the frames' own size: `detail`
        "source" gives them the source's detail, for one more VAE decoding unless the model's own
        `guide_blur` spares it, "off" enlarges them.
        Sizes that are no multiple of 16 are padded inside and cropped again. `mask_cache` "model"
        takes the editor's, None recomputes every token.
        """
        trained = (self.settings.height, self.settings.width)
        work = work_size_in_pixels(work_size, height, width, trained)
        return EditStream(
            self,
            prompt,
            height=height,
            width=width,
            seed=seed,
            work=work,
            detail=detail,
            mask=self.mask_cache if mask_cache == "model" else mask_cache,
        )

    def restore(self, state: StreamState) -> EditStream:
        """A stream that goes on where `state` was taken (see `EditStream.snapshot`).

        What another model edited goes on from its latents alone, where they mean the same to this
        one (`latents_identity`). StateError where they do not.
        """
        if state.model != self.identity and state.latents == self.latents:
            # Without caches it is a compact one; another policy means something else by its tokens.
            state = replace(state, kv=None, mask_tokens=None)
        elif state.model != self.identity:
            raise StateError(
                f"this stream was edited by another model than {self.name} (fingerprint "
                f"{state.model[:12] or 'none'}, here {self.identity[:12]}); open a new stream"
            )
        stream = EditStream(
            self,
            state.prompt,
            height=state.height,
            width=state.width,
            seed=state.seed,
            work=(state.work_height, state.work_width),
            detail=state.detail,
            mask=self.mask_cache,
        )
        stream.load(state)
        return stream


def _latents(model: Model) -> str:
    """As `_identity`, of what a stream's latents mean."""
    if model.path is not None:
        return latents_identity(model.path, model.config)
    assert model.vae is not None
    return _sampled(model.vae)


def _identity(model: Model) -> str:
    """The directory's fingerprint, so that every process that loads it says the same; of networks
    without one a hash of some of their weights."""
    if model.path is not None:
        return model_fingerprint(model.path)
    assert model.transformer is not None
    assert model.vae is not None
    return _sampled(model.transformer, model.vae)


def _sampled(*networks: nn.Module) -> str:
    digest = hashlib.sha256()
    for network in networks:
        for weight in network.state_dict().values():
            digest.update(weight.flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()
