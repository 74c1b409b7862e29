"""The UMT5-XXL text encoder as Wan uses it, run by transformers."""

from __future__ import annotations

import hashlib
import html
import json
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from infra.runtime.errors import UserError
from modeling.config import TextConfig
from modeling.text.encoder import TextEncoder

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_SAMPLES, _SAMPLE_BYTES = 256, 16 * 1024


class Umt5Encoder(TextEncoder):
    """transformers' UMT5 encoder, loaded when the first prompt needs it.

    `config.path` is a folder that holds `text_encoder/` and `tokenizer/` (as diffusers writes) or
    both in one (as transformers does). Encoders of the same folder and device share the weights.
    They are bfloat16 on a GPU, as Wan publishes them, and of the files' type on a CPU; what is
    computed with them is float32.
    """

    _shared: ClassVar[WeakValueDictionary[tuple[str, torch.device], Any]] = WeakValueDictionary()

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        if config.path is None:
            raise UserError(
                "this model uses a UMT5 text encoder but names no folder for it; import one with "
                "`liveedit import ... --text PATH`"
            )
        self.weights, self.tokenizer_files = umt5_folders(Path(config.path))
        size = json.loads((self.weights / "config.json").read_text()).get("d_model")
        if size != config.dim:
            raise UserError(f"{self.weights} gives embeddings of size {size}, not {config.dim}")
        self._tokenizer: Any = None

    def to(self, device: torch.device | str) -> Self:
        if torch.device(device) != self.device:
            self.release()
        return super().to(device)

    def release(self) -> None:
        super().release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def loaded(self) -> bool:
        return self._model is not None

    def fingerprint(self) -> str:
        """Hash of the tokenizer and of samples from all over the weights, which are 11 GB."""
        digest = hashlib.sha256(f"umt5-2/{self.config.dim}/{self.config.tokens}".encode())
        tokenizer = [p for p in self.tokenizer_files.iterdir() if p.name in _TOKENIZER_FILES]
        weights = [p for p in self.weights.iterdir() if p.suffix in (".safetensors", ".bin")]
        for file in [self.weights / "config.json", *sorted(tokenizer), *sorted(weights)]:
            digest.update(f"{file.name}/{file.stat().st_size}".encode())
            digest.update(_sample(file))
        return digest.hexdigest()

    @torch.inference_mode()
    def _embed(self, prompts: list[str]) -> list[Tensor]:
        if self._model is None:
            self._load()
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        tokens = self._tokenizer(cleaned, verbose=False)["input_ids"]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > self.config.tokens:
                self._warn_cut(prompt, len(ids))
        batch = self._tokenizer(
            cleaned,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.config.tokens,
            return_tensors="pt",
        ).to(self.device)
        hidden = self._model(batch.input_ids, batch.attention_mask).last_hidden_state  # [B, L, D]
        lengths = batch.attention_mask.sum(dim=1).tolist()
        return [
            row[:length].to("cpu", torch.float32, copy=True)
            for row, length in zip(hidden, lengths, strict=True)
        ]

    def _load(self) -> None:
        from transformers import AutoTokenizer

        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.tokenizer_files, local_files_only=True, trust_remote_code=False
            )
        key = (str(self.weights.resolve()), self.device)
        self._model = self._shared.get(key)
        if self._model is None:
            self._shared[key] = self._model = load_umt5(self.weights, self.device)


def umt5_folders(path: Path) -> tuple[Path, Path]:
    """The folders of the weights and of the tokenizer; UserError names what is missing."""
    nested = (path / "text_encoder").is_dir()
    weights = path / "text_encoder" if nested else path
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    if not (weights / "config.json").is_file():
        raise UserError(
            f"{path} holds no UMT5 text encoder: {weights}/config.json is missing; give a folder "
            "with text_encoder/ and tokenizer/, or a transformers folder"
        )
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(
            f"{path} holds no tokenizer: neither tokenizer.json nor spiece.model is in {tokenizer}"
        )
    return weights, tokenizer


def load_umt5(folder: Path, device: torch.device) -> Any:
    """transformers' UMT5EncoderModel in evaluation mode; every weight must be in the folder."""
    from transformers import UMT5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # it would break into the caller's own display
    loaded: Any = UMT5EncoderModel.from_pretrained(
        folder,
        dtype=torch.bfloat16 if device.type == "cuda" else "auto",
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are named below, with those that are missing
        output_loading_info=True,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):
        raise UserError(
            f"{folder} is no whole UMT5 encoder, missing or of another shape: {', '.join(missing)}"
        )
    model = model.to(device).eval().requires_grad_(False)
    if model.dtype != torch.float32:
        _compute_in_float32(model.encoder)
    return model


def _compute_in_float32(encoder: Any) -> None:
    """Weights are widened a block at a time, which loses nothing on the way back.

    T5 does not scale its attention's products, so its softmax is sharp: in bfloat16 a small network
    of random weights ends 3e-2 from what its weights mean. A prompt is encoded once.
    """
    stored = encoder.dtype
    for block in encoder.block:
        block.register_forward_pre_hook(lambda block, _: block.float() and None)
        block.register_forward_hook(lambda block, *_: block.to(stored) and None)
    encoder.final_layer_norm.float()


def clean_prompt(prompt: str) -> str:
    """Wan's "whitespace" cleaning: HTML entities resolved, runs of white space made one space."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def _sample(file: Path) -> bytes:
    """Hash of the file, or of evenly spaced pieces of a large one."""
    size = file.stat().st_size
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return hashlib.sha256(file.read_bytes()).digest()
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for index in range(_SAMPLES):
            opened.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.digest()
