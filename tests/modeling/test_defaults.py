"""What is taken where nobody asks for anything, of all that callers leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from modeling.detail.resample import resize
from modeling.diffusion.attention import teacher_forcing
from modeling.diffusion.flops import forward_flops
from modeling.diffusion.flow import FlowSchedule
from modeling.editor import StreamingEditor
from modeling.importing.parts import read_part
from modeling.importing.plan import plan_import, write_import
from modeling.importing.transformer import infer_transformer
from modeling.losses.reconstruction import reconstruction_loss
from modeling.losses.velocity import edit_weight, velocity_loss
from modeling.model_dir import load_model, save_model
from modeling.streaming.history import History
from modeling.streaming.kv_cache import KVCache
from modeling.streaming.quality import Quality
from modeling.streaming.stream import EditStream
from tests.data.test_defaults import left_out


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (StreamingEditor, {"name": None, "fp8": False, "accelerated": True}),
        (
            StreamingEditor.load,
            {"device": "cpu", "dtype": None, "mask_cache": "model", "name": None, "fp8": False},
        ),
        (
            StreamingEditor.open,
            {"seed": 0, "work_size": "full", "detail": "off", "mask_cache": "model"},
        ),
        (EditStream.snapshot, {"compact": False}),
        (Quality, {"sparing": False, "halved": False}),
        (KVCache, {"sink_latents": 0, "window_positions": True, "device": "cpu"}),
        (History, {"device": "cpu"}),
        (teacher_forcing, {"window": None, "sinks": 0, "window_positions": True}),
        (FlowSchedule, {"device": "cpu"}),
        (forward_flops, {"attending": 1.0}),
        (velocity_loss, {"weight": None}),
        (edit_weight, {"full": 1.0}),
        (reconstruction_loss, {"square_weight": 0.0}),
        (resize, {"kernel": "bicubic"}),
        (load_model, {"device": "cpu", "dtype": None}),
        (save_model, {"transformer": None, "vae": None, "text": None, "dtype": None}),
        (plan_import, {"vae": None, "text": None, "ema": False, "dtype": None}),
        (write_import, {"overwrite": False}),
        (read_part, {"ema": False}),
        (infer_transformer, {"eps": 1e-6}),
    ],
    ids=lambda of: getattr(of, "__qualname__", ""),
)
def test_what_is_left_out(function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    assert left_out(function) == defaults
