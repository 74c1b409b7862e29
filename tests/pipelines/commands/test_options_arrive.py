"""Every option of every command reaches what it is for, and so does what holds without it.

A new option without a case fails: an option that goes nowhere looks as if it worked.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data.ingest import Ingested
from data.pairs import LeftOut
from data.video import VideoWriter
from pipelines.bench.serve import TAIL_S
from pipelines.cli import app
from pipelines.commands import data as data_commands
from pipelines.commands.measure import benchmark
from pipelines.commands.measure.detail import FIGURES
from pipelines.commands.run import print_plan
from pipelines.commands.serve import serve_settings
from pipelines.commands.show import console
from pipelines.config.benchmark import BenchConfig
from pipelines.config.load import load_config
from pipelines.stages.data import PairRecipe
from serve.tenants import hash_token
from serve.tls import Tls
from tests.pipelines.commands.bench_cases import (
    BENCH,
    CAMERAS,
    COMPARE,
    DETAIL,
    KILLER,
    PAIR,
    PAIRS,
    PREPARED,
    REPORT,
    SERVED,
    SERVES,
)
from tests.pipelines.commands.calls import Arrived, Case, found, options, run

TRAIN, PLAN = "pipelines.commands.run.run_train", "pipelines.commands.run.print_plan"
LOCAL = "pipelines.stages.edit_file.edit_video"
REMOTE, UNTAUGHT = (f"pipelines.stages.edit_remote.{n}" for n in ("edit_remote", "untaught"))
EDIT = "edit in.mkv out.mp4 --prompt x"
AT = f"{EDIT} --url ws://h:1 --token t"
PLAN_IMPORT, TARGET, WRITE = (
    f"modeling.importing.plan.{name}" for name in ("plan_import", "check_target", "write_import")
)
JUDGE = "pipelines.commands.measure.evaluate.judge"
ABLATE = "pipelines.evaluation.ablation.ablate"
FITTING = "pipelines.evaluation.ablation.fitting"
LOCATED = {"pipelines.tracking.registry.locate": Path("m")}
FITS = LOCATED | {
    FITTING: (({"steps": 2},), ["left out: steps=1"]),
    "pipelines.commands.measure.ablate.check_published": None,
}
ABLATED = FITS | {
    ABLATE: None,
    "pipelines.evaluation.ablation.plot": None,
    "pipelines.evaluation.ablation.table": ([], []),
}
LOGGED = "pipelines.evaluation.ablation.log_reports"
MADE, FILMED = (f"pipelines.stages.data.make_{name}" for name in ("synthetic", "from_footage"))
CLIPS = "--size 64x48 --frames 9 --fps 8 --samples-per-shard 3 --overwrite --workers"
REGISTRY = "pipelines.tracking.registry"
AT_R = {"uri": "http://r"}
REACHABLE = {"pipelines.tracking.tracker.check_reachable": None}
SENT = {"source": Path("run/config.yaml")}

CASES = (
    Case("demo vae.steps=3", "pipelines.commands.run.run_demo", {"overrides": ["vae.steps=3"]}),
    Case("train demo --from causal vae.steps=3", TRAIN,
         {"first": "causal", "only": None, "config.name": "demo", "config.vae.steps": 3}),
    Case("train demo --only vae", TRAIN, {"first": None, "only": "vae"}),
    Case("train demo --plan --from causal --card H100", PLAN,
         {"first": "causal", "only": None, "card": "H100"}),
    Case("train demo --plan --only vae", PLAN, {"first": None, "only": "vae", "card": None}),
    Case("train demo --dry-run", "pipelines.stages.preflight.check", {"writes": False}),
    Case("evaluate m bench half=drawn --out o --outputs p --beside b --beside c --no-track", JUDGE,
         {"model": "m", "overrides": ["half=drawn"], "out": Path("o"), "outputs": Path("p"),
          "beside": [Path("b"), Path("c")], "track": False}),
    Case("evaluate m bench", JUDGE,
         {"overrides": [], "out": None, "outputs": None, "beside": [], "track": True}),
    Case(f"{EDIT} --model {{model}} --work-size 1/2 --detail off --seed 3 --fps 8 --strict "
         "--side-by-side", LOCAL,
         {"editor.name": "tiny", "source": Path("in.mkv"), "output": Path("out.mp4"),
          "prompt": "x", "work_size": "1/2", "detail": "off", "seed": 3, "fps": 8, "strict": True,
          "side_by_side": True}),
    Case(f"{EDIT} --model {{model}}", LOCAL,
         {"work_size": "native", "detail": "source", "seed": 0, "fps": None, "strict": False,
          "side_by_side": False}),
    Case(f"{AT} --model m --work-size 1/2", UNTAUGHT,
         {"url": "ws://h:1", "token": "t", "model": "m", "choice": "1/2", "prompt": "x",
          "height": 48, "width": 64}),
    Case(f"{AT} --model m --seed 3", REMOTE,
         {"url": "ws://h:1", "token": "t", "model": "m", "seed": 3, "work_size": None,
          "detail": None}, {UNTAUGHT: ([], {}, "")}),
    Case("import w --to m --vae v --text t --ema --dtype bf16", PLAN_IMPORT,
         {"path": Path("w"), "vae": Path("v"), "text": Path("t"), "ema": True,
          "dtype": torch.bfloat16}),
    Case("import w --to m", PLAN_IMPORT,
         {"vae": None, "text": None, "ema": False, "dtype": None}),
    Case("import w --to m --overwrite", TARGET, {"to": Path("m"), "overwrite": True}),
    Case("import w --to m", TARGET, {"overwrite": False}),
    Case("import w --to m --overwrite", WRITE, {"to": Path("m"), "overwrite": True},
         {PLAN_IMPORT: None, TARGET: None}),
    Case("serve --host h --port 81 fronts=3", SERVED,
         {"host": "h", "port": 81, "settings.fronts": 3, "tls": None}),
    Case("serve", SERVED, {"host": "127.0.0.1", "port": 8000, "tls": None}),
    Case("serve --https", SERVED, {"host": "0.0.0.0", "tls": "made"},
         {"serve.tls.own_certificate": "made"}),
    Case("serve --tls-cert c --tls-key k", SERVED,
         {"host": "127.0.0.1", "tls": Tls(Path("c"), Path("k"))}),
    Case("doctor --port 81", "pipelines.commands.doctor._ports", {"port": 81}),
    Case("doctor", "pipelines.commands.doctor._ports", {"port": 8000}),  # as serve has it
    Case("ablate m bench steps=1,2 seed=5 --out o", ABLATE,
         {"model": Path("m"), "grid.variants": ({"steps": 2},), "judge.config.seed": 5}, FITS),
    Case("ablate m {heldout} steps=1,2 clips=1", ABLATE,
         {"grid.variants": ({"steps": 2},), "judge.config.clips": 1}, FITS),
    Case("ablate m {heldout} steps=2 work_size=1/2", FITTING,
         {"model": Path("m"), "variants": ({"steps": 2, "work_size": "1/2"},)}, LOCATED),
    Case("ablate m bench steps=2 work_size=1/2", FITTING, {"variants": ({"steps": 2},)}, LOCATED),
    Case("ablate m bench steps=1,2 --out o", LOGGED,
         {"files": [Path("o", f"ablation.{end}") for end in ("json", "md", "png")]}, ABLATED),
    Case("send run --uri http://h", "pipelines.config.load.load_config",
         SENT | {"overrides": ["tracking.uri=http://h"]}),
    Case("send run", "pipelines.config.load.load_config", SENT | {"overrides": []}),
    Case(f"data make t --pairs 5 --seed 4 --split heldout {CLIPS} 0", MADE,
         {"uri": "t", "recipe": PairRecipe(5, 48, 64, 9, 8, 4, "heldout", 3, 0, True)}),
    Case(f"data make t --from f --pairs 5 --seed 4 --split heldout {CLIPS} 6", FILMED,
         {"uri": "t", "source": Path("f"),
          "recipe": PairRecipe(5, 48, 64, 9, 8, 4, "heldout", 3, 6, True)}),
    Case("data make t", MADE,
         {"recipe": PairRecipe(100, 128, 192, 33, 16, 0, "train", 16, 2, False)}),
    Case("data make t --bench --from f --size 64x48 --overwrite",
         "pipelines.stages.bench_data.write_bench",
         {"folder": Path("t"), "config": BenchConfig(footage="f", size="64x48"),
          "overwrite": True}),
    Case("data make t --bench", "pipelines.stages.bench_data.write_bench",
         {"config": BenchConfig(), "overwrite": False}),
    Case(f"data ingest p.json t {CLIPS} 1", "data.ingest.ingest",
         {"uri": "t", "samples_per_shard": 3, "overwrite": True, "pairs.read.fps": 8,
          "pairs.read.frames": 9, "pairs.read.size": (48, 64)}),
    Case("data ingest p.json t --workers 7", "pipelines.stages.ingest.workforce", {"workers": 7}),
    Case("data ingest p.json t", "pipelines.stages.ingest.workforce", {"workers": None}),
    Case("models list a --uri http://r", f"{REGISTRY}.versions", AT_R | {"name": "a"},
         REACHABLE),
    Case("models list a --uri http://r", "pipelines.tracking.tracker.check_reachable", AT_R),
    Case("models show models:/a@b --uri http://r", "pipelines.commands.models.find_version",
         AT_R | {"reference": "models:/a@b"}, REACHABLE),
    Case("models promote models:/a@b --alias x --share 0.25 --uri http://r",
         f"{REGISTRY}.promote", AT_R | {"reference": "models:/a@b", "alias": "x", "share": 0.25},
         REACHABLE),
    Case("models promote models:/a@b", f"{REGISTRY}.promote",
         {"alias": "production", "share": 1.0}, REACHABLE),
    Case("models rollback a --alias x --uri http://r", f"{REGISTRY}.rollback",
         AT_R | {"name": "a", "alias": "x"}, REACHABLE),
    *BENCH,
)  # fmt: skip
ELSEWHERE = {
    ("trace", "--session"), ("trace", "--nth"),  # test_trace.py
    ("train", "--exit-code"), ("ablate", "--track"),  # below
    ("bench serve", "--kill-every"), ("bench detail", "--json"),  # below
    *(("token", f"--{limit}") for limit in ("sessions", "opens", "minutes")),  # below
}  # fmt: skip


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter("in.mkv", 64, 48, 16) as writer:
        writer.write(np.zeros((2, 48, 64, 3), np.uint8))
    entry = '[{"instruction": "x", "source_path": "a.mp4", "edited_path": "b.mp4"}]'
    Path("p.json").write_text(entry)
    Path("run", "tracking").mkdir(parents=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.words[:60]} {case.reaches[-12:]}")
def test_what_is_asked_for_arrives(
    case: Case, tiny_model: Path, heldout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, calls = run(case, monkeypatch, model=tiny_model, heldout=heldout)
    assert isinstance(result.exception, Arrived), result.exception or result.output
    (arguments,) = calls
    assert {name: found(arguments, name) for name in case.given} == case.given


@pytest.mark.parametrize(("words", "token"), [(f"{EDIT} --url ws://h:1", "secret"), (AT, "t")])
def test_a_token_need_not_stand_on_the_command_line(
    words: str, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every user of the machine reads it."""
    monkeypatch.setenv("LIVEEDIT_TOKEN", "secret")
    result, (call,) = run(Case(words, UNTAUGHT, {}), monkeypatch)
    assert isinstance(result.exception, Arrived)
    assert call["token"] == token


def test_every_option_of_every_command_has_a_case() -> None:
    asked = {
        (command, option)
        for command, option in options()
        for case in CASES
        if case.words.startswith(f"{command} ") and option in case.words.split()
    }
    asked |= {(c, option) for c, option in options() if f"--no-{option[2:]}" in _words(c)}
    assert set(options()) - asked - ELSEWHERE == set()


def _words(command: str) -> set[str]:
    return {w for case in CASES if case.words.startswith(f"{command} ") for w in case.words.split()}


@pytest.mark.parametrize(("does", "code"), [(("finished", "runs"), 4), (("finished",), 0)])
def test_a_plan_says_whether_any_stage_would_run(
    does: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.stages.running.plan import Planned

    lines = [Planned("vae", what) for what in does]
    monkeypatch.setattr("pipelines.commands.run.plan_pipeline", lambda *_: lines)
    assert print_plan(load_config("demo"), console) == bool(code)
    words = ["train", "demo", "--plan"]
    assert CliRunner().invoke(app, [*words, "--exit-code"]).exit_code == code
    assert CliRunner().invoke(app, words).exit_code == 0


def test_an_ablation_is_logged_unless_it_shall_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("ablate m bench steps=1,2 --out o --no-track", LOGGED, {}, ABLATED)
    result, calls = run(case, monkeypatch)
    assert (result.exception, calls) == (None, [])


def test_a_token_is_made_with_its_limits() -> None:
    words = ["token", "acme", "--sessions", "4", "--opens", "30", "--minutes", "600"]
    made = CliRunner().invoke(app, words)
    token = made.stderr.split()[-1]
    assert tomllib.loads(made.stdout) == {
        "acme": {"tokens": [hash_token(token)], "max_sessions": 4, "opens_per_minute": 30,
                 "minutes_per_day": 600.0}
    }  # fmt: skip
    free = tomllib.loads(CliRunner().invoke(app, ["token", "b"]).stdout)
    assert list(free["b"]) == ["tokens"]


def test_what_was_given_wins_over_what_a_command_would_have() -> None:
    settings = serve_settings(["fronts=3"], {"fronts": 2, "max_editors": 5})
    assert (settings.fronts, settings.max_editors) == (3, 5)


def test_an_ingest_tells_its_own_rate_now_and_then_and_each_file_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(data_commands.time, "monotonic", lambda: now[0])

    def ingest(*_: Any, on_entry: Any, **__: Any) -> Any:
        on_entry(Ingested(done=1000, resumed=1000))
        now[0] += 20.0
        on_entry(Ingested(done=1050, resumed=1000))
        now[0] += 10.0  # too soon for another line of progress
        on_entry(Ingested(done=1051, left_out=[LeftOut(7, "a.mp4", "gone")], resumed=1000))
        now[0] += 10.0
        both = [LeftOut(7, "a.mp4", "gone"), LeftOut(9, "b.mp4", "short")]
        on_entry(Ingested(done=1060, left_out=both, resumed=1000))
        raise Arrived

    monkeypatch.setattr("data.ingest.ingest", ingest)
    result = CliRunner().invoke(app, ["data", "ingest", "p.json", "t", "--workers", "1"])
    assert "goes on after entry 999" in result.output
    told = [line for line in result.output.splitlines() if "left out" in line]
    assert told == [  # each file once
        "1050 of 1, 2.5 pairs/s, 0 left out", "left out, entry 7: a.mp4: gone",
        "left out, entry 9: b.mp4: short", "1060 of 1, 1.5 pairs/s, 2 left out",
    ]  # fmt: skip


def test_the_benchmark_s_own_settings_reach_the_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []

    def load(*given: Any) -> Any:
        loads.append(given)
        return SimpleNamespace(name="m", device=torch.device("cpu"), identity="i")

    monkeypatch.setattr("pipelines.evaluation.evaluate.load_editor", load)
    monkeypatch.setattr("pipelines.tracking.registry.locate", lambda model: Path(model))
    config = BenchConfig(mask_cache=False, seed=5, work_size="1/2", detail=False)
    system: Any = benchmark._system("m", None, config)
    assert loads == [(Path("m"), False)]
    assert (system.seed, system.options) == (5, {"work_size": "1/2", "detail": "off"})


def test_replicas_are_killed_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {f"pipelines.bench.serve.{name}": "" for name in ("table", "facts")}
    case = Case("bench serve --sessions 2 --kills 3 --kill-every 7 --seconds 4", CAMERAS, {},
                SERVES | shown | {KILLER: "killer"})  # fmt: skip
    result, (first, killed) = run(case, monkeypatch, answer=REPORT)
    assert result.exception is None, result.output
    assert (first["kill"], first["load"].seconds) == (None, 4)
    assert (killed["kill"], killed["kill_every_s"]) == ("killer", 7)
    assert killed["load"].seconds == 3 * 7 + TAIL_S


def test_figures_of_detail_are_written_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {COMPARE: {"full": {"psnr": 3.0}}, "pipelines.bench.sharpness.detail.table": "| x |"}
    case = Case(f"{DETAIL} --json f.json", PAIRS, {}, PREPARED | figures)
    result, _ = run(case, monkeypatch, answer=[("night", PAIR)])
    assert result.exception is None, result.output
    assert json.loads(Path("f.json").read_text()) == {"night": {"full": {"psnr": 3.0}}}
    assert result.output == "| x |\n\n" * len(FIGURES) + "\n", "as Markdown has tables"


def test_the_picture_is_of_the_first_kind_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind there would be another, each over the one before."""
    made = {PAIRS: [("night", PAIR), ("add", PAIR)], "pipelines.bench.sharpness.detail.table": ""}
    case = Case(f"{DETAIL} --picture p.jpg", "pipelines.bench.sharpness.detail.save_picture", {},
                PREPARED | made | {COMPARE: {}})  # fmt: skip
    result, calls = run(case, monkeypatch, answer=True)
    assert result.exception is None, result.output
    assert [call["path"] for call in calls] == [Path("p.jpg")]
