from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import loader
from pipelines.config.stages import ComputeConfig
from pipelines.evaluation.evaluate import load_editor
from pipelines.stages.encode import cell_share, encode_dataset
from pipelines.training.session import ray_session


def test_encoded_pairs_are_the_vae_s_latents(
    tiny_model: Path, heldout: str, tmp_path: Path
) -> None:
    encoded = str(tmp_path / "encoded")
    info = encode_dataset(heldout, encoded, tiny_model, batch_size=2, samples_per_shard=1)
    assert (info.kind, info.samples, info.frames) == ("encoded", 2, 21)
    assert {"pairs_hash", "model_hash", "text_hash"} <= info.made_by.keys()
    editor = load_editor(tiny_model)
    raw = next(iter(loader(heldout, batch_size=1, shuffle=False, epochs=1)))
    batch = next(iter(loader(encoded, batch_size=1, shuffle=False, epochs=1)))
    assert batch["instruction"] == raw["instruction"]
    pixels = raw["target"].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        latents, _ = editor.vae.encode(pixels)
    assert batch["target"].shape == latents.shape == (1, 6, 16, 4, 6)
    assert torch.allclose(batch["target"], latents, atol=2e-3)  # stored as float16
    text = editor.text.encode(raw["instruction"])
    assert torch.allclose(batch["text"], text, atol=2e-3)
    mask = raw["mask"].float()
    share = batch["mask"][0]
    assert share[0, 1, 2] == pytest.approx(float(mask[0, 0, 8:16, 16:24].mean()), abs=1e-3)
    assert share[2, 1, 2] == pytest.approx(float(mask[0, 5:9, 8:16, 16:24].mean()), abs=1e-3)


def test_ray_tasks_give_the_same_dataset(tiny_model: Path, heldout: str, tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    seen: list[int] = []

    def encode(encoded: str, **settings: Any) -> None:
        encode_dataset(
            heldout, encoded, tiny_model, batch_size=1, samples_per_shard=2, gpus=False, **settings
        )

    encode(here, threads=2)
    with ray_session(ComputeConfig()):
        encode(there, tasks=2, on_sample=lambda done, total: seen.append(done))
    assert seen == [1, 2]
    batches = zip(
        *(loader(uri, batch_size=2, shuffle=False, epochs=1) for uri in (here, there)), strict=True
    )
    for a, b in batches:
        assert a["instruction"] == b["instruction"]
        for name in ("source", "target", "text", "mask"):
            assert torch.allclose(a[name], b[name], atol=2e-3)  # threads sum in another order


def test_cell_share_follows_the_latents() -> None:
    mask = torch.zeros(1, 9, 16, 24, dtype=torch.bool)
    mask[0, 0, :8, :8] = True  # the first latent is the first frame alone
    mask[0, 1, 8:, 16:] = True  # one of the second latent's four frames
    share = cell_share(mask)
    assert share.shape == (1, 3, 2, 3)
    assert share[0, 0, 0, 0] == 1
    assert share[0, 1, 1, 2] == 0.25
    assert share.sum() == 1.25
