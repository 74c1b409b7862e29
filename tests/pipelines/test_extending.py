"""docs/extending.md: every example as it stands there, through the door that it goes in by."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from data.kinds import EDITS
from data.synthetic import make_pair
from infra.runtime.errors import UserError
from modeling.config import MaskCacheConfig
from modeling.losses.velocity import WEIGHTINGS
from modeling.model_dir import check_choices
from modeling.streaming.policies import POLICIES
from modeling.text.build import TEXT_ENCODERS, build_text_encoder
from modeling.vae.build import VAES, build_vae
from pipelines.config.load import load_config
from pipelines.config.merge import ConfigError
from pipelines.stages.chain import VERSIONS, Chain
from pipelines.stages.preflight import _check_method
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import StageRunner
from pipelines.tracking.outbox import Outbox
from pipelines.training.methods.table import METHODS, Method, build_stage
from tests.known_editors import CONFIG, assert_edited, block_clip, known_editor
from tests.pipelines.training.plain import (
    PlainNetwork,
    batch,
    model,
    setting,
    use_plain_engines,
)

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "extending.md"
Example = Callable[..., dict[str, Any]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Example:
    """Runs the file and the entry of a section; the table is as before when the test is over."""

    def run(section: str, name: str, **table: dict[str, Any]) -> dict[str, Any]:
        text = DOCUMENT.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        file, entry = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        path = str(re.findall(r"^(?:Into )?`(\S+)\.py`.*:$", text, re.MULTILINE)[0])
        place = re.findall(r"^The entry, in .* of `(\S+)\.py`", text, re.MULTILINE)
        module = ModuleType(path.replace("/", "."))
        if "import" in entry:  # the table's file asks for the new one, which must not ask back
            assert place[0].replace("/", ".") not in file
        if place:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        else:  # into the table's own file
            vars(module).update(vars(importlib.import_module(module.__name__)))
        (entries,) = table.values()
        assert name not in entries
        monkeypatch.setitem(entries, name, None)  # so that it is taken out at the end
        exec(compile(file, f"docs/extending.md, {section}", "exec"), vars(module))
        exec(entry, {**(table if place else vars(module)), "Method": Method})
        assert entries[name] is not None
        return vars(module)

    return run


def test_every_section_is_tried() -> None:
    sections = re.findall(r"^## (.*)$", DOCUMENT.read_text(), re.MULTILINE)
    tried = re.findall(r"example\(\s*\"(.*?)\"", Path(__file__).read_text())
    assert sections == tried


def test_a_policy(example: Example) -> None:
    example("A mask-cache policy", "top_half", POLICIES=POLICIES)
    importance = torch.rand(3, 4, 6)
    assert POLICIES["top_half"].choose(importance, 0.4).tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    pruned = MaskCacheConfig(policy="top_half")
    editor = known_editor(mask_cache=pruned)
    stream = editor.open("paint it red", height=64, width=96)
    source = block_clip(45, 64, 96)
    chunks = [*stream.push(torch.from_numpy(source))]
    assert_edited(np.concatenate([chunk.frames for chunk in chunks]), source, "paint it red")
    steps = len(CONFIG.stream.timesteps)
    whole = steps - len(pruned.pruned_steps) + 1  # and the refresh
    share = (whole + 0.5 * len(pruned.pruned_steps)) / (steps + 1)
    assert chunks[-1].recomputed == pytest.approx(share)
    wrong = replace(CONFIG, stream=replace(CONFIG.stream, mask_cache=MaskCacheConfig("top_hafl")))
    with pytest.raises(
        UserError, match="policy 'top_hafl'; there are budget, follow, published, settled, top_half"
    ):
        check_choices(wrong)


def test_a_vae(example: Example) -> None:
    example("A VAE", "mosaic", VAES=VAES)
    vae = build_vae(replace(CONFIG.vae, kind="mosaic"))
    clip = torch.rand(1, 13, 3, 16, 24) * 2 - 1
    latents, _ = vae.encode(clip)
    pieces, state = [], None
    for frames in clip.split([2, 7, 4], dim=1):
        part, state = vae.encode(frames, state)
        pieces.append(part)
    assert torch.equal(torch.cat(pieces, dim=1), latents)
    pixels, _ = vae.decode(latents)
    means = clip.unflatten(-2, (2, 8)).unflatten(-1, (3, 8)).mean(dim=(-3, -1))  # of 8 x 8 blocks
    seen = pixels[..., ::8, ::8]
    torch.testing.assert_close(seen[:, 0], means[:, 0])
    torch.testing.assert_close(
        seen[:, 9:], means[:, 9:].mean(1, keepdim=True).expand(-1, 4, -1, -1, -1)
    )
    with pytest.raises(UserError, match="VAE 'mosiac'; there are folded, mosaic, tiny, wan"):
        check_choices(replace(CONFIG, vae=replace(CONFIG.vae, kind="mosiac")))


def test_a_text_encoder(example: Example) -> None:
    example("A text encoder", "letters", TEXT_ENCODERS=TEXT_ENCODERS)
    config = replace(CONFIG.text, kind="letters", tokens=4, dim=30)
    (found,) = build_text_encoder(config).encode(["B, a d!"])
    assert found.argmax(dim=1)[:3].tolist() == [1, 0, 3]
    assert found.sum(dim=1).tolist() == [1, 1, 1, 0]
    with pytest.raises(UserError, match="encoder 'leters'; there are letters, umt5, words"):
        check_choices(replace(CONFIG, text=replace(CONFIG.text, kind="leters")))


def test_a_loss(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    example("A loss", "early", WEIGHTINGS=WEIGHTINGS)
    use_plain_engines(monkeypatch)
    losses = {}
    for weighting in ("uniform", "early"):
        here = setting("causal", weighting=weighting, shift=1.0, batch_size=4)
        stage = build_stage(here, model(PlainNetwork()))
        losses[weighting] = stage.step(batch(), here.draw(0, 0))["loss"].item()
    assert losses["early"] != losses["uniform"]
    assert losses["early"] == pytest.approx(losses["uniform"], rel=0.3)  # 1 on average
    assert load_config("demo", ["causal.weighting=early"]).causal.weighting == "early"
    with pytest.raises(ConfigError, match=r"causal.weighting: .*'erly'; there are early, publ"):
        load_config("demo", ["causal.weighting=erly"])


def test_a_training_method(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    example("A training method", "straight", METHODS=METHODS)
    use_plain_engines(monkeypatch)
    here = setting("foundation", method="straight", text_dropout=0.0, grad_clip=0.0)
    network = PlainNetwork(noisy=1.0)
    stage = build_stage(here, model(network))
    data = batch()
    loss = stage.step(data, here.draw(0, 0))["loss"].item()
    assert [call.timestep.tolist() for call in network.calls] == [[1000.0] * 4]
    # noise - 1 * (velocity = noise) is 0, so that the regression is of nothing to the target.
    assert loss == pytest.approx(0.5 * data["target"].square().mean().item(), rel=1e-5)
    with pytest.raises(ConfigError, match=r"foundation.method: .*'strait'; there are causal, "):
        _check_method("foundation", "strait")


def test_a_kind_of_edit(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in EDITS.items():
        monkeypatch.setitem(EDITS, name, replace(kind, weight=0.8 * kind.weight))
    example("A kind of edit", "shrink", EDITS=EDITS)
    size: dict[str, Any] = {"height": 64, "width": 96, "frames": 1}
    pairs = [pair for n in range(60) if (pair := make_pair(n, **size)).origin["edit"] == "shrink"]
    assert 4 <= len(pairs) <= 24
    for pair in pairs:
        assert re.fullmatch(r"shrink the \w+ \w+ to (half|a third) of its size", pair.instruction)
        assert 0 < pair.mask.mean() < 0.5


def test_a_stage(example: Example, tmp_path: Path, outbox: Outbox) -> None:
    count = example("A stage", "count", VERSIONS=VERSIONS)["count"]
    assert list(VERSIONS)[-1] == "count"
    finished = tmp_path / "model"
    finished.mkdir()
    (finished / "config.json").write_text("{}")
    parent = outbox.start_pipeline("test", {})
    view = StageView(Console(file=StringIO()), ("count",))
    config = load_config("demo", [f"output={tmp_path}", "tracking.uri=sqlite:///unused.db"])
    with view, ExitStack() as resources:
        chain = Chain(config, tmp_path, StageRunner(tmp_path, parent, view), resources)
        assert count(chain, finished).metrics == {"files": 1.0}
        assert view.reused == []
        assert count(chain, finished).metrics == {"files": 1.0}
        assert view.reused == ["count"]
        (finished / "vae.safetensors").write_text("x")
        assert count(chain, finished).metrics == {"files": 2.0}
