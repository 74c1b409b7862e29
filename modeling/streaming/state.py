"""What a stream is, outside of any process: to move it, or to survive the death of its replica."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modeling.vae.streaming import VaeState

FORMAT_VERSION = 6
_VAE_STATES = ("encoder", "decoder", "reproducer")


class StateError(ValueError):
    """A state that this model cannot go on with."""


@dataclass
class StreamState:
    """A stream between two chunks.

    The exact form holds every cache (`kv` and the VAE's three) and restores bit for bit. The
    compact form leaves them None and holds the `history`, each chunk's latents, edited and source
    [2, F, C, H, W] in float16, from which the caches are made again; the stream then goes on
    close to, not equal to, the unbroken one. A chunk of the history is one tensor for as long as it
    is remembered, so that who keeps states can tell what is new in one.
    """

    prompt: str
    height: int
    width: int
    work_height: int  # at which the networks see the frames
    work_width: int
    detail: Literal["source", "off"]
    seed: int
    chunks: int  # edited so far
    frames: int  # edited pixel frames so far
    generator: Tensor  # state of the noise generator
    pending: Tensor  # uint8 [n, H, W, 3]: frames that do not fill a chunk yet
    history: tuple[Tensor, ...]
    mask_tokens: Tensor | None
    sparing: bool = False  # as `quality.Quality` has them
    halved: bool = False
    model: str = ""  # the editor's `identity`
    latents: str = ""  # and what its latents mean: the editor's `latents`
    source: Tensor | None = None  # [1, f, C, H, W] latents of those `pending` that are encoded
    kv: dict[str, Tensor | int] | None = None
    encoder: VaeState | None = None
    decoder: VaeState | None = None
    reproducer: VaeState | None = None  # a decoder for the source

    def to_bytes(self) -> bytes:
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in _VAE_STATES:
            values[name] = None if values[name] is None else asdict(values[name])
        buffer = io.BytesIO()
        torch.save({"format_version": FORMAT_VERSION, **values}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> StreamState:
        """Raises ValueError if `data` is no stream state of this version."""
        try:
            values = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:  # torch.load raises many types for bytes it cannot read
            raise ValueError(f"no stream state in {len(data)} bytes: {error}") from error
        version = values.pop("format_version", None) if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"stream state has format {version}, this version reads {FORMAT_VERSION}; "
                "open a new stream"
            )
        for name in _VAE_STATES:
            values[name] = None if values[name] is None else VaeState(**values[name])
        return cls(**values)
