from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.runtime.errors import UserError
from modeling.config import MaskCacheConfig, ModelConfig
from modeling.editor import StreamingEditor
from modeling.streaming.policies import POLICIES
from pipelines.commands.measure.ablate import ablate as measure
from pipelines.config.ablation import label, parse_grid, stream_of
from pipelines.config.benchmark import BenchConfig
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import EvaluateConfig
from pipelines.evaluation.ablation import (
    ablate,
    compare,
    fitting,
    skipped_work,
    table,
    variant_editor,
)
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.judges import Bench, Pairs
from pipelines.evaluation.true_history import TrueHistory
from tests.known_editors import CONFIG, write_known_model
from tests.pipelines.commands.entry import Liveedit


def labels(*words: str) -> list[str]:
    return [label(variant) for variant in parse_grid(words).variants]


def test_a_grid_is_every_combination_in_the_tables_order() -> None:
    assert labels("steps=1,2", "cache=none,follow") == [
        "cache=none steps=1", "cache=none steps=2", "cache=follow steps=1", "cache=follow steps=2",
    ]  # fmt: skip
    grid = parse_grid(["steps=2", "every=5", "half=drawn"])
    assert grid.settings == ("every=5", "half=drawn")
    assert labels("pruned=1+2,3") == ["pruned=1+2", "pruned=3"]


def test_what_does_nothing_is_not_measured_twice() -> None:
    assert labels("cache=none,published,follow,settled", "keep=0.1,0.3", "threshold=0.01,0.02") == [
        "cache=none",
        "cache=published keep=0.1",
        "cache=published keep=0.3",
        "cache=follow threshold=0.01",
        "cache=follow threshold=0.02",
        "cache=settled threshold=0.01",
        "cache=settled threshold=0.02",
    ]


def test_what_only_some_policies_know_is_varied_where_none_is_named() -> None:
    """The model's own may be one of these."""
    assert labels("threshold=0.01,0.02", "dilate=0,1") == [
        f"threshold={threshold} dilate={dilate}" for threshold in (0.01, 0.02) for dilate in (0, 1)
    ]


def test_a_policy_of_one_s_own_is_a_cache_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "mine", POLICIES["budget"])
    assert labels("cache=none,mine", "keep=0.1,0.3") == [
        "cache=none",
        "cache=mine keep=0.1",
        "cache=mine keep=0.3",
    ]
    own = MaskCacheConfig(scope="block")
    stream = stream_of(replace(CONFIG.stream, mask_cache=own), {"cache": "mine"})
    assert stream.mask_cache == replace(own, policy="mine")
    with pytest.raises(ConfigError, match=r"settled, mine$"):
        parse_grid(["cache=mien"])


def test_a_clip_is_streamed_or_sampled_whole() -> None:
    words = ("stages=a", "whole=0,50", "guidance=1,4", "steps=2,4", "cache=none", "history=truth")
    assert labels(*words) == [
        "stages=a cache=none steps=2 whole=0 history=truth",
        "stages=a whole=50 guidance=1.0",
        "stages=a whole=50 guidance=4.0",
        "stages=a cache=none steps=4 whole=0 history=truth",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["every=5"], "nothing is varied"),
        (["cache=both"], "cache=both is none of none, published"),
        (["guidance=1,4", "steps=2"], "guidance= is of clips that are sampled whole"),
        (["guidance=2", "whole=0"], "guidance= is of clips that are sampled whole"),
        (["steps=1,four"], "steps=1,four: every value is a whole number"),
        (["keep=x"], "keep=x: every value is a number"),
        (["pruned=1+x"], r"pruned=1\+x: every value is whole numbers, as in 1\+2"),
        (["detail=yes,no"], "detail=yes,no: yes is neither true nor false"),
        (["history=own,clean"], "history=own,clean: clean is neither own nor truth"),
        (["cache=none,block", "stesp=1,2"], "stesp=1,2: nothing .* did you mean steps?"),
    ],
)
def test_a_wrong_grid_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_grid(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=1,0"], "steps=0 must be at least 1"),
        (["whole=0,1001"], "whole=1001 must be at least 0 and at most 1000"),
        (["stages=tiny,tny"], "stages=tny: no model is in models/tny; there are tiny"),
    ],
)
def test_every_variant_is_looked_at_before_anything_is_measured(
    liveedit: Liveedit, tiny_model: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model)
    model = "models" if words[0].startswith("stages") else "models/tiny"
    refused = liveedit("ablate", model, "nowhere", *words)  # whose clips are looked for later
    assert refused.returncode == 1
    assert message in refused.stderr


def test_a_combination_that_cannot_be_is_left_out_and_said(tmp_path: Path) -> None:
    """A window of one chunk holds no sinks beside it; without them it is measured."""
    known = write_known_model(tmp_path / "known")
    grid = parse_grid(["window=3,12", "sinks=3,0"])
    fit, left_out = fitting(known, grid.variants)
    assert [label(variant) for variant in fit] == [
        "window=3 sinks=0", "window=12 sinks=3", "window=12 sinks=0",
    ]  # fmt: skip
    assert len(left_out) == 1
    assert left_out[0].startswith("left out: window=3 sinks=3: stream.window_latents 3 does not")
    with pytest.raises(UserError, match="window_latents 4"):  # beside no sinks
        fitting(known, parse_grid(["window=4,12", "sinks=3,0"]).variants)


def test_what_is_measured_is_written_before_the_next_is_begun(
    tmp_path: Path, heldout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its interval, and the command as it is typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pairs").symlink_to(heldout)
    for stage in ("whole", "again", "cut"):
        write_known_model(tmp_path / "models" / stage)
    os.truncate(tmp_path / "models" / "cut" / "transformer.safetensors", 100)
    words = ["stages=whole,again,cut", "clips=2"]
    with pytest.raises(UserError, match=r"cut/transformer\.safetensors"):
        measure("models", "my pairs", words, Path("out"), track=False)
    reports = json.loads((tmp_path / "out" / "ablation.json").read_text())["reports"]
    assert [report["variant"] for report in reports] == ["stages=whole", "stages=again"]
    gain = "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**reports[1]["overall"]["pairs"]["gain"])
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert f"| stages=again | 2 | {gain} | 0.00 [0.00, 0.00] | " in text
    assert "liveedit ablate models 'my pairs' stages=whole,again,cut clips=2" in text


def stream(**variant: Any) -> Any:
    return stream_of(CONFIG.stream, variant)


def test_variants_of_a_stream() -> None:
    assert stream(steps=4).timesteps == (1000, 750, 500, 250)
    assert stream(steps=3).timesteps == (1000, 667, 333)
    assert stream(cache="none").mask_cache is None
    assert stream(cache="published", keep=0.1).mask_cache == MaskCacheConfig(
        policy="published", keep_ratio=0.1
    )
    assert stream(cache="block").mask_cache == MaskCacheConfig(scope="block")
    assert stream(cache="feedforward").mask_cache == MaskCacheConfig(scope="feedforward")
    follow = stream(cache="follow", threshold=0.5, dilate=0).mask_cache
    assert (follow.policy, follow.scope, follow.threshold, follow.dilate) == (
        "follow", "block", 0.5, 0,
    )  # fmt: skip
    assert follow.pruned_steps == (1, 2, 3)
    assert stream(cache="settled").mask_cache == MaskCacheConfig(
        policy="settled", scope="block", pruned_steps=(1, 2, 3)
    )
    assert stream(cache="follow", steps=2).mask_cache.pruned_steps == (1,)
    assert stream(cache="published", steps=2).mask_cache.pruned_steps == (1,)
    assert stream(cache="follow", pruned=(3,)).mask_cache.pruned_steps == (3,)
    assert (stream(window=6, sinks=0).window_latents, stream(window=6, sinks=0).sink_latents) == (
        6, 0,
    )  # fmt: skip
    assert stream(steps=1000, cache="none").timesteps == tuple(range(1000, 0, -1))
    for steps in (0, 1001):
        with pytest.raises(ConfigError, match=f"steps={steps} must be at least 1 and at most 1000"):
            stream(steps=steps)


def model_config(**cache: Any) -> ModelConfig:
    chosen = MaskCacheConfig(**cache) if cache else None
    return replace(CONFIG, stream=replace(CONFIG.stream, mask_cache=chosen))


def test_work_that_a_pruned_token_is_spared() -> None:
    """By hand: dim 132, feed-forward 8, 24 words, 12 latents of 4 x 6 tokens."""
    assert skipped_work(model_config()) == 1
    assert skipped_work(model_config(scope="block")) == 1
    own = 4 * 132**2 + 2 * 288 * 132
    rest = 2 * 132**2 + 2 * 24 * 132 + 2 * 132 * 8
    assert skipped_work(model_config(scope="attention")) == pytest.approx(own / (own + rest))
    found = skipped_work(model_config(scope="feedforward"))
    assert found == pytest.approx(2 * 132 * 8 / (own + rest))


def rows(*gains: float, computed: float) -> dict[str, Any]:
    clips = [{"name": str(n), "gain": gain, "recomputed": computed} for n, gain in enumerate(gains)]
    return {"clips": [*clips, {"name": "none", "recomputed": computed}], "forwards": 5}


def test_loss_is_on_the_same_clips() -> None:
    dense, pruned = rows(5.0, 7.0, computed=1.0), rows(4.0, 6.5, computed=0.6)
    found = compare(dense, pruned, 0.5, 50)
    assert found["loss"]["mean"] == pytest.approx(0.75)
    assert found["loss"]["clips"] == 2
    assert found["skipped"]["mean"] == pytest.approx(0.4)
    assert found["saved"]["mean"] == pytest.approx(0.2)
    fewer = rows(5.0, 7.0, computed=1.0) | {"forwards": 2}
    assert compare(dense, fewer, 1.0, 50)["saved"]["mean"] == pytest.approx(0.6)
    assert compare(dense, dense, 1.0, 50)["loss"]["mean"] == 0


def test_a_variant_is_the_model_with_another_stream(tmp_path: Path) -> None:
    write_known_model(tmp_path / "models" / "distill", name="mine")
    editor = variant_editor(tmp_path / "models", {"stages": "distill", "steps": 2, "cache": "none"})
    assert editor.name == "mine"
    assert len(editor.timesteps) == 2
    assert editor.mask_cache is None
    pruned = variant_editor(tmp_path / "models" / "distill", {"cache": "follow"})
    assert pruned.mask_cache is not None
    assert pruned.mask_cache.policy == "follow"


@pytest.mark.parametrize(
    ("cards", "where"), [(True, ("cuda", "bfloat16")), (False, ("cpu", "float32"))]
)
def test_a_variant_runs_on_the_gpu_where_there_is_one(
    cards: bool, where: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(place: Path, *, device: str, dtype: Any) -> None:
        raise LookupError(place, device, str(dtype).removeprefix("torch."))

    monkeypatch.setattr("torch.cuda.is_available", lambda: cards)
    monkeypatch.setattr("pipelines.evaluation.ablation.load_model", load)
    with pytest.raises(LookupError) as asked:
        variant_editor(tmp_path, {"steps": 2})
    assert asked.value.args == (tmp_path, *where)


def test_on_pairs_of_a_dataset(tiny_model: Path, heldout: str) -> None:
    judge = Pairs(heldout, EvaluateConfig(clips=5, success_db=-99.0))  # which all reach
    grid = parse_grid(["cache=none,block", "work_size=1/2", "clips=5"], ("seed",))
    assert grid.settings == ("clips=5",)
    seen: list[str] = []
    reports = ablate(tiny_model, grid, judge, on_clip=seen.append)
    assert judge.clips == 2
    assert seen == ["cache=none work_size=1/2"] * 2 + ["cache=block work_size=1/2"] * 2
    assert [row["name"] for row in reports[0]["clips"]] == ["0", "1"]
    assert [row["success"] for row in reports[0]["clips"]] == [1.0, 1.0]
    assert max(row["gain"] for row in reports[0]["clips"]) < EvaluateConfig.success_db
    assert reports[0]["overall"]["pairs"]["recomputed"]["mean"] == 1
    assert reports[1]["against"]["skipped"]["mean"] > 0
    assert "2 pairs of" in reports[0]["made"]
    assert table(reports)[1][0][0] == "cache=none work_size=1/2"
    editor = variant_editor(tiny_model, {"cache": "none"})
    whole, half = (
        evaluate(editor, heldout, judge.config, work_size=size)["clips"][0]["gain"]
        for size in ("full", "1/2")
    )
    assert whole != half == reports[0]["clips"][0]["gain"]


def test_a_variant_that_is_sampled_whole(tmp_path: Path, heldout: str) -> None:
    known = write_known_model(tmp_path / "known")
    grid = parse_grid(["whole=0,3", "guidance=1,2"])
    reports = ablate(known, grid, Pairs(heldout, EvaluateConfig(clips=1)))
    assert [report["variant"] for report in reports] == [
        "whole=0", "whole=3 guidance=1.0", "whole=3 guidance=2.0",
    ]  # fmt: skip
    assert [report["forwards"] for report in reports] == [5, 3, 6]
    gains = [report["clips"][0]["gain"] for report in reports]
    assert gains[1] == pytest.approx(gains[0], abs=0.5)  # of the same model
    assert gains[2] != gains[1]  # guided
    lost = [report["against"]["loss"]["mean"] for report in reports]
    assert lost == pytest.approx([gains[0] - gain for gain in gains])  # all against the first
    editor = variant_editor(known, {"whole": 3})  # whose guidance nobody named
    assert (editor.scale, editor.forwards) == (1.0, 3)  # type: ignore[attr-defined]


def test_a_variant_that_is_told_its_right_past(tmp_path: Path, heldout: str) -> None:
    """By either judge; this model looks at no past."""
    known = write_known_model(tmp_path / "known")
    grid = parse_grid(["history=own,truth", "cache=none"])
    assert type(variant_editor(known, grid.variants[0])) is StreamingEditor
    assert isinstance(variant_editor(known, grid.variants[1]), TrueHistory)
    few = BenchConfig(half="drawn", every=59, long=False, size="48x32", detail=False)
    for judge in (Pairs(heldout, EvaluateConfig(clips=1)), Bench(few)):
        own, true = (report["clips"] for report in ablate(known, grid, judge))
        assert own[0]["gain"] == true[0]["gain"]


@pytest.mark.usefixtures("tables")
def test_from_the_command_line(liveedit: Liveedit, tmp_path: Path) -> None:
    write_known_model(tmp_path / "known")
    refused = liveedit("ablate", "known", "cache=none,follow")
    assert "cache=none,follow is no dataset" in refused.stderr
    few = ["half=drawn", "every=29", "long=false", "size=48x32", "detail=false"]
    result = liveedit("ablate", "known", "bench", "cache=none,follow", *few, "--out", "out")
    assert result.returncode == 0, result.stderr
    reports = json.loads((tmp_path / "out" / "ablation.json").read_text())["reports"]
    assert [report["variant"] for report in reports] == ["cache=none", "cache=follow"]
    assert [len(report["clips"]) for report in reports] == [2, 2]
    assert reports[0]["overall"]["drawn"]["recomputed"]["mean"] == 1
    assert reports[1]["overall"]["drawn"]["recomputed"]["mean"] < 1
    assert reports[1]["against"]["saved"]["mean"] > 0
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "liveedit ablate known bench cache=none,follow" in text
    assert "| cache=follow |" in text
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 1000
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("liveedit-bench")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert {run.info.run_name for run in children} == {"cache=none", "cache=follow"}
    assert all("saved" in run.data.metrics for run in children)
