"""What `StreamingEditor` makes of its arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.config import MaskCacheConfig, StreamConfig
from modeling.editor import StreamingEditor
from modeling.model_dir import load_model, save_model
from modeling.streaming.state import StreamState
from tests.known_editors import CONFIG, known_model, write_known_model
from tests.modeling.streaming.test_stream import random_model

OTHER = MaskCacheConfig(policy="published", keep_ratio=0.5, pruned_steps=(2,), scope="block")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_known_model(tmp_path_factory.mktemp("models") / "one", name="", mask_cache=OTHER)


def test_a_name_is_the_cards_or_the_folders_or_random_unless_given(
    saved: Path, tmp_path: Path
) -> None:
    named = write_known_model(tmp_path / "two", name="named")
    assert StreamingEditor.load(named).name == "named"
    assert StreamingEditor.load(saved).name == "one"
    assert StreamingEditor.load(named, name="given").name == "given"
    model = known_model()
    model.card = {}
    assert StreamingEditor(model, mask_cache=None).name == "random"


def test_it_was_trained_at_what_its_card_says_or_else_at_its_streams_size(saved: Path) -> None:
    editor, told = StreamingEditor.load(saved, tell=(said := list[str]()).append), CONFIG.stream
    assert said == ["loading weights"]
    editor.card.pop("trained_at", None)
    assert editor.trained_at == [(told.height, told.width)]
    editor.card["trained_at"] = ["832x480", "64x1280"]
    assert editor.trained_at == [(480, 832), (1280, 64)]


def test_the_mask_cache_is_the_models_or_another_or_none(saved: Path) -> None:
    assert StreamingEditor.load(saved).mask_cache == OTHER
    assert StreamingEditor.load(saved, mask_cache="model").mask_cache == OTHER
    assert StreamingEditor.load(saved, mask_cache=MaskCacheConfig()).mask_cache == MaskCacheConfig()
    assert StreamingEditor.load(saved, mask_cache=None).mask_cache is None


def test_weights_become_float32_on_a_cpu_unless_told(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    half = save_model(
        tmp_path / "half",
        CONFIG,
        transformer=model.transformer,
        vae=model.vae,
        card={},
        dtype=torch.float16,
    )
    assert load_model(half).transformer.dtype == torch.float16  # type: ignore[union-attr]
    for dtype, wanted in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        editor = StreamingEditor.load(half, dtype=dtype)
        assert editor.transformer.dtype == wanted
        assert editor.vae.dtype == wanted
        for network in (editor.transformer, editor.vae):
            assert not network.training
            assert not any(weight.requires_grad for weight in network.parameters())


def test_steps_are_the_streams_warped_by_its_shift() -> None:
    stream = StreamConfig(height=32, width=48, timesteps=(1000, 500), shift=3.0)
    editor = StreamingEditor(random_model(0, stream), mask_cache=None)
    assert editor.timesteps.tolist() == pytest.approx([1000.0, 750.0])  # 3 u / (1 + 2 u)


def test_a_preset_is_drawn_from_seed_0_and_leaves_other_draws_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.randn(3)
    torch.manual_seed(7)
    first, again = (load_model("demo").transformer for _ in range(2))
    assert torch.equal(torch.randn(3), wanted)
    torch.manual_seed(0)
    weight = type(first)(first.config).blocks[0].ffn[0].weight  # type: ignore[union-attr,arg-type,index]
    for model in (first, again):
        assert torch.equal(model.blocks[0].ffn[0].weight, weight)  # type: ignore[union-attr,index]


def test_a_stream_is_what_it_was_opened_as() -> None:
    stream = StreamConfig(height=32, width=48)
    editor = StreamingEditor(random_model(0, stream), mask_cache=None)
    clip = np.random.default_rng(0).integers(0, 256, (9, 20, 40, 3), np.uint8)

    def edited(**seed: int) -> np.ndarray:
        (chunk,) = editor.open("a red star", height=20, width=40, **seed).push(clip)
        return chunk.frames

    assert edited().shape == clip.shape
    assert np.array_equal(edited(), edited(seed=0))
    assert not np.array_equal(edited(), edited(seed=1))
    editing = editor.open("a red star", height=20, width=40, seed=3)
    for compact in (True, False):
        data = editing.snapshot(compact=compact).to_bytes()
        restored = editor.restore(StreamState.from_bytes(data))
        found = (restored.prompt, restored.height, restored.width, restored.seed)
        assert found == ("a red star", 20, 40, 3)
        assert (StreamState.from_bytes(data).kv is None) == compact
        assert restored.snapshot(compact=compact).to_bytes() == data
