from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.shards import write_dataset
from data.synthetic import make_pair
from modeling.config import ModelConfig
from modeling.editor import StreamingEditor
from modeling.model_dir import load_model, read_card, read_config
from pipelines.config.load import load_config
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages import start
from pipelines.stages.encode import encode_dataset
from pipelines.stages.preflight import check
from pipelines.stages.start import start_model, start_source, teacher_source
from tests.pipelines.sizes import HEIGHT, WIDTH
from tests.pipelines.stages.told import heard

TINY = [
    "model.preset=demo",
    "data.footage=null",
    "model.transformer={dim: 24, ffn_dim: 48, num_heads: 2, num_layers: 2}",
    "model.vae={widths: [16, 12, 8, 8]}",
    f"model.stream={{height: {HEIGHT}, width: {WIDTH}, window_latents: 6, mask_cache: null}}",
    "vae.crop=null",
]


def configured(uri: str, *overrides: str) -> PipelineConfig:
    return load_config("demo", [f"tracking.uri={uri}", "model.start=null", *TINY, *overrides])


def dataset(uri: Path, frames: int, height: int = HEIGHT, pairs: int = 2) -> str:
    samples = [
        partial(make_pair, seed, height=height, width=WIDTH, frames=frames) for seed in range(pairs)
    ]
    write_dataset(uri, samples, made_by={})
    return str(uri)


def test_what_fits_passes(mlflow_uri: str, heldout: str, tiny_model: Path) -> None:
    steps = ["vae.batch_size=1", "foundation.batch_size=1", "causal.batch_size=1"]
    given = [f"data.train={heldout}", f"data.heldout={heldout}", "distill.batch_size=1"]
    assert check(configured(mlflow_uri, *steps, *given)) is None
    idle = ["vae.steps=0", "vae.batch_size=3"]  # of two pairs
    assert check(configured(mlflow_uri, *steps[1:], *idle, *given)) is None
    assert check(configured(mlflow_uri, f"model.start={tiny_model}")) == tiny_model


def test_footage_must_have_files_for_every_split_that_is_made(
    mlflow_uri: str, heldout: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")  # only names are looked at
    (tmp_path / "b.mp4").write_bytes(b"")
    footage = f"data.footage={tmp_path}"
    (tmp_path / "heldout.txt").write_text("b.mp4\n")
    check(configured(mlflow_uri, footage))
    (tmp_path / "heldout.txt").write_text("")
    with pytest.raises(ConfigError, match=rf"{footage} holds no photo or clip for the heldout"):
        check(configured(mlflow_uri, footage))
    check(configured(mlflow_uri, footage, f"data.heldout={heldout}"))
    (tmp_path / "heldout.txt").write_text("a.jpg\nb.mp4\n")
    with pytest.raises(ConfigError, match=r"for the train split; add files"):
        check(configured(mlflow_uri, footage))
    with pytest.raises(ConfigError, match=r"nowhere holds no photo or clip for the train split"):
        check(configured(mlflow_uri, f"data.footage={tmp_path / 'nowhere'}"))


def test_datasets_that_cannot_be_trained_on(
    mlflow_uri: str, heldout: str, tiny_model: Path, tmp_path: Path
) -> None:
    short = dataset(tmp_path / "short", frames=20)
    with pytest.raises(ConfigError, match=r"data.train=.*short holds clips of 20 frames"):
        check(configured(mlflow_uri, f"data.train={short}"))
    odd = dataset(tmp_path / "odd", frames=21, height=40)
    with pytest.raises(ConfigError, match=r"data.heldout=.*odd holds clips .* at 48x40"):
        check(configured(mlflow_uri, f"data.heldout={odd}"))
    encoded = str(tmp_path / "encoded")
    encode_dataset(heldout, encoded, tiny_model, batch_size=1, samples_per_shard=2)
    with pytest.raises(ConfigError, match=r"holds encoded samples; give a dataset of pairs"):
        check(configured(mlflow_uri, f"data.train={encoded}"))
    with pytest.raises(ConfigError, match=r"foundation.batch_size=3 .*and the dataset has 2"):
        check(
            configured(
                mlflow_uri, f"data.train={heldout}", "vae.steps=0", "foundation.batch_size=3"
            )
        )
    with pytest.raises(ValueError, match="nowhere: no dataset here"):
        check(configured(mlflow_uri, "data.heldout=nowhere"))


@pytest.mark.parametrize("stage", ["vae", "distill"])
def test_a_method_that_nobody_knows_is_refused(stage: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{stage}\.method: .*'mine'"):
        check(configured("http://nobody", f"{stage}.method=mine", f"{stage}.steps=0"))


def test_the_tracking_store_is_reached_last(mlflow_uri: str, tmp_path: Path) -> None:
    """It may make a database, which nothing may that is refused."""
    new = f"sqlite:///{tmp_path}/new/mlflow.db"
    for refused in ("data.heldout=nowhere", "data.train=nowhere", "model.start=nowhere"):
        with pytest.raises(ValueError, match=refused.split("=")[1]):
            check(configured(new, refused))
    check(configured(new), writes=False)
    assert not (tmp_path / "new").exists()
    check(configured("http://127.0.0.1:1"))  # a server that is away holds nothing up


@pytest.mark.parametrize(("writes", "asked"), [(True, [("http://mlflow", "mine")]), (False, [])])
def test_a_plan_asks_no_server(
    writes: bool, asked: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "pipelines.stages.preflight.check_artifacts", lambda *told: heard.append(told)
    )
    check(configured("http://mlflow", "tracking.experiment=mine"), writes=writes)
    assert heard == asked


def test_a_ray_cluster_that_is_not_there(mlflow_uri: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        check(configured(mlflow_uri, f"compute.address=ray://127.0.0.1:{port}"))
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ValueError, match=rf"compute.address={address}: no Ray cluster answers"):
            check(configured(mlflow_uri, f"compute.address={address}"))


def test_gpus_that_are_not_there(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"compute.gpus=true, but torch sees no GPU"):
        check(configured(mlflow_uri, "compute.gpus=true"))


def test_bf16_where_the_gpu_cannot(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda emulated: emulated)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100")
    with pytest.raises(ConfigError, match=r"bf16, which Tesla V100 does not support; .*fp32"):
        check(configured(mlflow_uri, "compute.precision=bf16"))
    check(configured(mlflow_uri, "compute.precision=bf16", "compute.gpus=false"))


def test_start_of_other_sizes_is_refused(mlflow_uri: str, tiny_model: Path) -> None:
    config = configured(mlflow_uri, f"model.start={tiny_model}", "model.transformer.num_layers=3")
    with pytest.raises(ConfigError, match=r"model.transformer.num_layers is 2 there, 3 here"):
        start_source(config)


@pytest.mark.parametrize(
    ("section", "there", "refused"),
    [
        ("transformer", {"num_layers": 3}, True),
        ("vae", {"widths": (16, 12, 8, 16)}, True),
        ("text", {"kind": "umt5"}, True),
        ("text", {"path": "elsewhere"}, False),  # where it lies
        ("vae", {"mean": (0.5,) * 16, "std": (2.0,) * 16}, False),  # what training measured
    ],
)
def test_every_network_of_a_start_has_the_sizes_that_are_asked_for(
    section: str, there: dict[str, object], refused: bool, tiny_config: ModelConfig
) -> None:
    changed = replace(getattr(tiny_config, section), **there)
    found: ModelConfig = replace(tiny_config, **{section: changed})  # type: ignore[arg-type]
    if not refused:
        start._check_same_networks("mine", found, tiny_config)
        return
    ((name, value),) = there.items()
    own = getattr(getattr(tiny_config, section), name)
    told = f"model.{section}.{name} is {value} there, {own} here"
    with pytest.raises(ConfigError, match=re.escape(told)):
        start._check_same_networks("mine", found, tiny_config)


def test_start_is_found_from_the_root_and_in_the_registry(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.runtime.paths.ROOT", tmp_path)
    shutil.copytree(tiny_model, tmp_path / "start")
    assert start_source(configured(mlflow_uri, "model.start=start")) == tmp_path / "start"
    other = configured(mlflow_uri, "model.start=start", "model.transformer.num_layers=3")
    with pytest.raises(ConfigError, match=r"^model\.start=start does not have the sizes"):
        start_source(other)  # as it was asked for, and not where it was found
    with pytest.raises(ValueError, match="is not in the registry"):
        start_source(configured(mlflow_uri, "model.start=models:/liveedit@production"))


def test_a_teacher_of_another_size_is_found(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.runtime.paths.ROOT", tmp_path)
    shutil.copytree(tiny_model, tmp_path / "large")
    assert teacher_source(configured(mlflow_uri)) is None
    assert teacher_source(configured(mlflow_uri, "distill.teacher=large")) == tmp_path / "large"
    with pytest.raises(ConfigError, match=r"distill.teacher=small is no model directory; .* null"):
        check(configured(mlflow_uri, "distill.teacher=small"))


def test_new_start_model_depends_on_the_seed_alone(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    folders = [
        start_model(tiny_config, None, tmp_path / name, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(torch.get_rng_state(), state)  # of whoever asked
    a, b, c = (load_model(folder).transformer.state_dict() for folder in folders)  # type: ignore[union-attr]
    assert read_card(folders[2])["weights"].startswith("random, seed 1")
    name = "blocks.0.ffn.0.weight"
    assert bool((a[name] == b[name]).all())
    assert not bool((a[name] == c[name]).all())


def test_a_new_vae_begins_as_a_pyramid(
    tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    monkeypatch.setattr("pipelines.stages.start.start_as_pyramid", begun.append)
    start_model(tiny_config, None, tmp_path / "start", seed=0)
    assert [type(vae).__name__ for vae in begun] == ["TinyVae"]


@pytest.mark.parametrize("identity", [True, False])
def test_a_start_s_card_says_whether_it_changes_nothing(
    identity: bool, tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "start_as_identity", lambda network: identity)
    start_model(tiny_config, None, tmp_path / "start", seed=0)
    assert ("changes nothing" in read_card(tmp_path / "start")["weights"]) is identity


@pytest.mark.parametrize("path", ["umt5", None])
def test_a_start_s_text_encoder_comes_along(
    path: str | None, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_config, text=replace(tiny_config.text, path=path))
    model = SimpleNamespace(config=config, transformer="t", vae="v", card={"what": "shapes"})
    monkeypatch.setattr(start, "load_model", lambda source: model)
    saved = heard(start, "save_model", monkeypatch)
    start_model(tiny_config, Path("source"), Path("target"), seed=0)
    (((target, written), named),) = saved
    assert (target, written) == (Path("target"), config)
    assert named == {
        "transformer": "t", "vae": "v", "text": path and Path(path),
        "card": {"what": "shapes", "parent": "source"},
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "words"), [("words", []), ("umt5", None)])
def test_a_start_of_our_own_words_knows_none_yet(
    kind: str, words: list[str] | None, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    text = replace(tiny_config.text, kind=kind)
    start_model(replace(tiny_config, text=text), None, tmp_path / "start", seed=0)
    assert read_card(tmp_path / "start").get("words") == words


def test_given_start_gets_the_stream_of_the_configuration(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    """And keeps everything that its weights were trained with: its latents' mean and std, which
    training measured, are not the preset's."""
    source = shutil.copytree(tiny_model, tmp_path / "source")
    trained = read_config(source)
    channels = trained.vae.latent_channels
    mean, std = tuple(i / 10 for i in range(channels)), tuple(1 + i / 9 for i in range(channels))
    blurred = replace(trained.stream, guide_blur=0.4)
    trained = replace(trained, vae=replace(trained.vae, mean=mean, std=std), stream=blurred)
    written = json.loads((source / "config.json").read_text()) | asdict(trained)
    (source / "config.json").write_text(json.dumps(written))
    card = json.loads((source / "card.json").read_text()) | {"parent": "of its own"}
    (source / "card.json").write_text(json.dumps(card))
    config = configured(mlflow_uri, "model.stream.window_latents=9")
    start_model(config.model.resolve(), source, tmp_path / "start", seed=0)
    wanted = replace(config.model.resolve().stream, guide_blur=0.4)
    assert wanted.window_latents == 9
    assert read_config(tmp_path / "start") == replace(trained, stream=wanted)
    assert StreamingEditor.load(tmp_path / "start").card["parent"] == str(source)
