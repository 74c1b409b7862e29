from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from data import shard_reader
from data.loader import Split, loader
from data.manifest import Shard, dataset_hash, read_dataset_info
from data.sample import EncodedPair, Pair
from data.shard_reader import ShardFolder
from data.shards import write_dataset
from data.store import Store, open_store
from data.synthetic import make_pair
from modeling.model_dir import load_model, save_model
from modeling.vae.tiny import TinyVae
from pipelines.evaluation.evaluate import load_editor
from pipelines.stages import encode
from pipelines.stages.encode import encode_dataset
from pipelines.stages.encoding import job
from pipelines.stages.encoding.job import EncodeJob, to_pixels
from pipelines.stages.running.own_process import from_own_process
from pipelines.tracking.records import model_fingerprint
from pipelines.training.taught import summary


def test_encoded_pairs_are_the_vae_s_latents(
    tiny_model: Path, heldout: str, tmp_path: Path
) -> None:
    encoded = str(tmp_path / "encoded")
    info = encode_dataset(heldout, encoded, tiny_model, batch_size=2, samples_per_shard=1)
    assert (info.kind, info.samples, info.frames) == ("encoded", 2, 21)
    assert {"pairs_hash", "model_hash", "text_hash"} <= info.made_by.keys()
    editor = load_editor(tiny_model)
    raw = next(iter(loader(heldout, Split(batch_size=1, shuffle=False, epochs=1))))
    batch = next(iter(loader(encoded, Split(batch_size=1, shuffle=False, epochs=1))))
    assert batch["instruction"] == raw["instruction"]
    pixels = raw["target"].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        latents, _ = editor.vae.encode(pixels)
    assert batch["target"].shape == latents.shape == (1, 6, 16, 4, 6)
    assert torch.allclose(batch["target"], latents, atol=2e-3)  # stored as float16
    text = editor.text.encode(raw["instruction"])
    assert torch.allclose(batch["text"], text, atol=2e-3)


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (2, 1), (3, 2), (5, 1)])
def test_every_pair_is_encoded_for_itself_and_in_its_place(
    tiny_model: Path, tmp_path: Path, batch_size: int, threads: int
) -> None:
    pairs = [make_pair(n, height=32, width=48, frames=5, fps=8) for n in (4, 5, 6)]
    raw, encoded = str(tmp_path / "raw"), str(tmp_path / "encoded")
    write_dataset(raw, pairs, made_by={}, samples_per_shard=2)
    seen: list[tuple[int, int]] = []
    info = encode_dataset(
        raw, encoded, tiny_model, batch_size=batch_size, samples_per_shard=1, threads=threads,
        on_sample=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [shard.count for shard in info.shards] == [1, 1, 1]
    assert (info.kind, info.frames, info.height, info.width, info.fps) == ("encoded", 5, 32, 48, 8)
    editor = load_editor(tiny_model)
    assert info.made_by == {
        "tool": "liveedit",
        "pairs": raw,
        "pairs_hash": dataset_hash(read_dataset_info(raw)),
        "model": str(tiny_model),
        "model_hash": model_fingerprint(tiny_model),
        "text_hash": editor.text.fingerprint(),
        "precision": "fp32",
        "taught": summary(Counter(pair.instruction for pair in pairs)),
    }
    assert read_dataset_info(encoded).made_by == info.made_by
    stored = list(loader(raw, Split(batch_size=1, shuffle=False, epochs=1)))
    folder = ShardFolder(open_store(encoded), tmp_path, keep_all=True)
    for n, pair in enumerate(pairs):
        _, sample = folder.read(info.shards[n], 0)
        assert isinstance(sample, EncodedPair)
        assert (sample.instruction, sample.fps) == (pair.instruction, pair.fps)
        assert (sample.video_shape, sample.origin) == ((5, 32, 48), pair.origin)
        for name in ("source", "target"):
            pixels = stored[n][name].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            with torch.no_grad():
                latents, _ = editor.vae.encode(pixels)
            found = torch.from_numpy(getattr(sample, name))
            assert found.dtype == torch.float16
            assert torch.allclose(found.float(), latents[0], atol=2e-3)
        text = editor.text.encode([pair.instruction])[0]
        assert torch.allclose(torch.from_numpy(sample.text).float(), text, atol=2e-3)


def test_an_encoding_that_was_stopped_goes_on_after_its_last_whole_shard(
    tiny_model: Path, tmp_path: Path
) -> None:
    raw = str(tmp_path / "raw")
    pairs = [make_pair(n, height=32, width=48, frames=5, fps=8) for n in range(5)]
    write_dataset(raw, pairs, made_by={}, samples_per_shard=3)
    seen: list[int] = []

    def encode(name: str, stop: int = 9, per_shard: int = 2) -> str:
        def count(done: int, total: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        seen.clear()
        info = encode_dataset(
            raw, str(tmp_path / name), tiny_model, batch_size=1, samples_per_shard=per_shard,
            on_sample=count,
        )  # fmt: skip
        assert not (tmp_path / name / "encode.json").exists()
        return dataset_hash(info) + json.dumps(info.made_by)

    whole = encode("whole")
    assert seen == [1, 2, 3, 4, 5]
    for stop, after in ((1, 0), (2, 2), (3, 2), (4, 4)):  # in the first, and in the second shard
        with pytest.raises(KeyboardInterrupt):
            encode(f"stopped-{stop}", stop)
        assert encode(f"stopped-{stop}") == whole
        assert seen == list(range(after + 1, 6))
    with pytest.raises(KeyboardInterrupt):
        encode("other", 4, per_shard=1)
    assert encode("other") == whole
    assert seen == [1, 2, 3, 4, 5]  # other settings begin anew
    assert encode("other", per_shard=1) != whole  # also where they were finished
    with pytest.raises(KeyboardInterrupt):
        encode("gone", 4)
    (tmp_path / "gone" / "shard-00001.tar").unlink()
    assert encode("gone") == whole
    assert seen == [1, 2, 3, 4, 5]


def test_the_next_shard_is_read_while_one_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole shard is hashed before its first pair is there: 2 to 3 s of a GPU's each."""
    raw = str(tmp_path / "raw")
    pairs = [make_pair(n, height=32, width=48, frames=5, fps=8) for n in range(4)]
    write_dataset(raw, pairs, made_by={}, samples_per_shard=2)
    fetched: list[str] = []
    second = Event()
    folders: list[ShardFolder] = []
    fetch = shard_reader.fetch_shard

    def slowly(store: Store, shard: Shard, folder: Path) -> Path:
        fetched.append(shard.name)
        sleep(0.05)  # others come to it meanwhile
        if len(fetched) == 2:
            second.set()
        return fetch(store, shard, folder)

    class Noted(ShardFolder):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            folders.append(self)

    monkeypatch.setattr(shard_reader, "fetch_shard", slowly)
    monkeypatch.setattr(job, "ShardFolder", Noted)
    one = EncodeJob(raw, "", batch_size=1, threads=3, gpus=False, precision="fp32")
    batches = one._batches([0, 1], 0)
    read = [next(batches)]
    assert second.wait(10), "nobody came to the second shard"
    read += list(batches)
    assert [pair.instruction for (pair,) in read] == [pair.instruction for pair in pairs]
    assert fetched == ["shard-00000.tar", "shard-00001.tar"], "each once"
    assert list(folders[0].open) == ["shard-00001.tar"], "and the first is let go of"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision is chosen as there, by what this CPU computes, in this process."""
    monkeypatch.setattr(EncodeJob, "on_gpu", True)
    monkeypatch.setattr(EncodeJob, "device", "cpu")
    monkeypatch.setattr(encode, "from_own_process", lambda make: make())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_fp16_is_taken_only_where_it_costs_what_storing_costs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is this VAE's own error that decides, in the first frames of the first pair; on its border
    fp16 is taken."""
    raw = str(tmp_path / "raw")
    pairs = [make_pair(n, height=32, width=48, frames=9, fps=8) for n in (4, 5)]
    monkeypatch.setattr(job, "COMPARED", 5)
    write_dataset(raw, pairs, made_by={}, samples_per_shard=2)
    vae = load_editor(tiny_model).vae
    first = next(iter(loader(raw, Split(batch_size=1, shuffle=False, epochs=1))))
    pixels = to_pixels(torch.cat([first["source"], first["target"]]), "cpu")
    with torch.no_grad():
        exact, _ = vae.encode(pixels)
        mean, std = vae.mean.clone(), vae.std.clone()
        rough, _ = vae.to(torch.float16).encode_raw(pixels)
    rough = (rough.float() - mean) / std
    seen, so = exact[:, :2], rough[:, :2]  # 5 frames; a latent does not know what comes after it
    error = float((so - seen).square().mean().sqrt() / seen.square().mean().sqrt())
    assert error != pytest.approx(
        float((rough - exact).square().mean().sqrt() / exact.square().mean().sqrt()), rel=2e-3
    )
    assert encode.LAST_PLACE == 2**-10
    monkeypatch.setattr(encode, "LAST_PLACE", error / 2)
    said: list[str] = []

    def made(name: str, precision: Any = "fp16") -> dict[str, Any]:
        info = encode.encode_dataset(
            raw, str(tmp_path / name), tiny_model, batch_size=2, samples_per_shard=2,
            precision=precision, say=said.append,
        )  # fmt: skip
        return {name: info.made_by.get(name) for name in ("precision", "fp16_error")}

    def latents(name: str) -> torch.Tensor:
        batch = next(iter(loader(str(tmp_path / name), Split(batch_size=1, shuffle=False))))
        return torch.stack([batch["source"][0], batch["target"][0]])

    assert made("asked not", "fp32") == {"precision": "fp32", "fp16_error": None}
    assert said == []
    found = made("as it is")
    assert found == {"precision": "fp32", "fp16_error": pytest.approx(error, rel=1e-3)}
    assert torch.equal(latents("as it is"), latents("asked not"))
    for share, taken in ((0.999, "fp32"), (1.0, "fp16")):
        monkeypatch.setattr(encode, "LAST_PLACE", found["fp16_error"] * share)
        assert made(taken) == {"precision": taken, "fp16_error": found["fp16_error"]}
        right = exact if taken == "fp32" else rough
        torch.testing.assert_close(latents(taken), right, atol=0, rtol=2**-10)
    assert [line.split(";")[0] for line in said] == [
        f"latents are made in {taken}" for taken in ("fp32", "fp32", "fp16")
    ]
    assert f"fp16 changes those of the first pair by {error:.1e} of" in said[0]
    assert f"last place is {error / 2:.1e}" in said[0]


@pytest.fixture
def overflowing(tiny_model: Path, tmp_path: Path) -> Path:
    """`tiny_model` with a first layer that makes numbers up to 80000 of white, 40000 of black."""
    model = load_model(tiny_model)
    assert isinstance(model.vae, TinyVae)
    first, second = model.vae.encoder[0], model.vae.encoder[2].conv
    first.weight.data *= 40000 / first.weight.sum((1, 2, 3)).max()
    first.bias.data.fill_(40000)
    second.weight.data /= 40000
    path, parts = tmp_path / "overflowing", {"transformer": model.transformer, "vae": model.vae}
    return save_model(path, model.config, **parts, card={"name": "large"})  # type: ignore[arg-type]


def shaded(level: int) -> Pair:
    """Of one brightness, up to 255."""
    clip = np.full((5, 32, 48, 3), level, np.uint8)
    return Pair(clip, clip, np.ones((5, 32, 48), bool), f"make it {level}", 8.0)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("levels", "lines"),
    [
        (
            (1, 255, 254, 2),  # which is said of the first alone
            ["latents are made in fp16", "latents of pair 2 are too large for fp16"],
        ),
        ((255, 1, 2, 3), ["latents are made in fp32"]),
    ],
)
def test_what_overflows_fp16_is_encoded_in_fp32(
    overflowing: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    levels: tuple[int, ...],
    lines: list[str],
) -> None:
    """A later pair alone; the first pair makes it all float32. One that was stopped goes on."""
    monkeypatch.setattr(encode, "LAST_PLACE", 1.0)
    raw = str(tmp_path / "raw")
    write_dataset(raw, [partial(shaded, n) for n in levels], made_by={}, samples_per_shard=3)
    said: list[str] = []

    def made(name: str, precision: Any = "fp16", stop: int = 9) -> dict[str, Any]:
        def count(done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        said.clear()
        return encode_dataset(
            raw, str(tmp_path / name), overflowing, batch_size=1, samples_per_shard=1,
            precision=precision, on_sample=count, say=said.append,
        ).made_by  # fmt: skip

    def latents(name: str) -> torch.Tensor:
        read = loader(str(tmp_path / name), Split(batch_size=len(levels), shuffle=False, epochs=1))
        return next(iter(read))["source"]

    found = made("fast")
    assert [line.split(";")[0] for line in said] == lines
    assert found["precision"] == lines[0][-4:]
    assert found.get("fp16_error", math.inf) < 1 or len(lines) == 1
    assert json.loads(json.dumps(found), parse_constant=pytest.fail) == found
    made("exact", "fp32")
    assert latents("exact").isfinite().all()
    same = (latents("fast") == latents("exact")).flatten(1).all(1)
    assert same.tolist() == [level > 200 or len(lines) == 1 for level in levels]
    with pytest.raises(KeyboardInterrupt):
        made("stopped", stop=3)
    assert made("stopped") == found
    assert torch.equal(latents("stopped"), latents("fast"))
    assert said[1:] == []  # of pair 2, which the first try had kept


def test_pixels_by_hand() -> None:
    clip = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 2, 4, 6, 3)
    pixels = to_pixels(clip, "cpu")
    assert pixels.shape == (1, 2, 3, 4, 6)
    assert torch.allclose(pixels[0, 1, :, 3, 5], torch.tensor([-1.0, 1.0, -0.6]))


def test_a_process_of_its_own_encodes_the_same(tiny_model: Path, heldout: str) -> None:
    """As where there is a GPU, whose memory the process would otherwise keep."""
    job = EncodeJob(heldout, str(tiny_model), 1, 1, gpus=False, precision="fp16")
    shards = range(len(read_dataset_info(heldout).shards))
    here, there = list(job.run(shards)), list(from_own_process(partial(job.run, shards)))
    assert len(there) == len(here) == 2
    for (mine, overflowed), (theirs, _) in zip(here, there, strict=True):
        assert not overflowed
        assert mine.instruction == theirs.instruction
        assert all(
            (getattr(mine, name) == getattr(theirs, name)).all()
            for name in ("source", "target", "text")
        )
