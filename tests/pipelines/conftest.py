from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import typer.main
import typer.testing
from torch import distributed

from data.shards import write_dataset
from data.synthetic import make_pair
from modeling.config import ModelConfig
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import save_model
from modeling.presets import PRESETS
from modeling.vae.pyramid_start import start_as_pyramid
from modeling.vae.tiny import TinyVae
from pipelines.cli import main
from pipelines.stages.chain import STAGES
from pipelines.tracking.outbox import Outbox
from tests.mlflow_tables import made_tables
from tests.pipelines.commands.entry import Liveedit, Result
from tests.pipelines.place import CONFIG, Place, Training
from tests.pipelines.sizes import FRAMES, HEIGHT, WIDTH

torch.set_num_threads(1)  # tiny networks: more threads would wait for each other
# Typer puts the command line together anew for every call, which takes most of one's time.
typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)  # type: ignore


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    demo = PRESETS["demo"]
    return replace(
        demo,
        transformer=replace(demo.transformer, dim=24, ffn_dim=48, num_heads=2, num_layers=2),
        vae=replace(demo.vae, widths=(16, 12, 8, 8)),
        stream=replace(demo.stream, height=HEIGHT, width=WIDTH, window_latents=6, mask_cache=None),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer, vae = Transformer(tiny_config.transformer), TinyVae(tiny_config.vae)
    start_as_pyramid(vae)
    path = tmp_path_factory.mktemp("model") / "tiny"
    card = {"name": "tiny"}
    return save_model(path, tiny_config, transformer=transformer, vae=vae, card=card)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two held-out pairs."""
    uri = str(tmp_path_factory.mktemp("data") / "heldout")
    samples = [
        partial(make_pair, seed, height=HEIGHT, width=WIDTH, frames=FRAMES, split="heldout")
        for seed in range(2)
    ]
    write_dataset(uri, samples, made_by={}, samples_per_shard=1)
    return uri


@pytest.fixture(scope="session")
def _migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_tables(tmp_path_factory)


@pytest.fixture
def mlflow_uri(_migrated: Path, tmp_path: Path) -> str:
    """An empty tracking database of this test's own."""
    shutil.copy(_migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def tables(_migrated: Path, tmp_path: Path) -> None:
    """They lie where a command keeps them that is told no other place."""
    (tmp_path / "runs").mkdir()
    shutil.copy(_migrated, tmp_path / "runs" / "mlflow.db")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, for training without Ray."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.fixture
def outbox(mlflow_uri: str, tmp_path: Path) -> Iterator[Outbox]:
    """The outbox of a pipeline with the output `tmp_path`; it must have nothing to complain of."""
    said: list[str] = []
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as outbox:
        yield outbox
    assert not said


@pytest.fixture(scope="session")
def place(_migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A pipeline that was run once."""
    folder = tmp_path_factory.mktemp("decisions")
    (folder / "tiny.yaml").write_text(CONFIG)
    shutil.copy(_migrated, folder / "mlflow.db")
    place = Place(folder, f"sqlite:///{folder / 'mlflow.db'}", Training())
    with pytest.MonkeyPatch.context() as patch:
        train_by(place.training, patch)
        _, ran = place.run()
    assert ran == list(STAGES)
    place.keep()
    return place


def train_by(training: Training, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pipelines.training.trainer.train_stage", training)
    patch.setattr("pipelines.stages.chain.ray_session", lambda compute: contextlib.nullcontext())


@pytest.fixture
def first(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, as the first run left it."""
    train_by(place.training, monkeypatch)
    place.put_back()
    place.training.deaf = ""
    return place


@pytest.fixture
def liveedit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Liveedit:
    """The command's entry point, in a folder of its own and a terminal narrower than most lines, of
    which none but a table's may be broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("LIVEEDIT_DEBUG", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which `main` may set

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["liveedit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Result(int(stopped.value.code or 0), *capsys.readouterr())

    return run
