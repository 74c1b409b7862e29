"""What commands say and leave when what they run is done, which here is answered for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from data.video import Damage, VideoWriter
from pipelines.cli import app
from pipelines.commands import run as commands
from pipelines.commands import send as sending
from pipelines.commands.measure import serve as measured
from pipelines.config.load import to_yaml
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.edit_file import EditReport
from pipelines.stages.running.progress import StageView
from pipelines.tracking.tracker import TrackingError
from tests.pipelines.commands.bench_cases import KILLER, KILLS, MODEL, SERVES
from tests.pipelines.commands.calls import Case, run


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")


REMOTE, UNTAUGHT = (f"pipelines.stages.edit_remote.{n}" for n in ("edit_remote", "untaught"))


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(("named", "place"), [("", "ws://h:1"), (" --model m", "m at ws://h:1")])
def test_an_edit_says_what_it_was(
    named: str, place: str, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VideoWriter("in.mkv", 64, 48, 16) as writer:
        writer.write(np.zeros((2, 48, 64, 3), np.uint8))
    damage = Damage()
    if damaged:
        monkeypatch.setattr(Damage, "__bool__", lambda self: True)
        monkeypatch.setattr(Damage, "__str__", lambda self: "three frames")
    report = EditReport(30, 2.5, 32, 48, 0.256, damage)
    prompts = {"prompts": ["a", "b", "c", "d", "e"]}
    case = Case(f"edit in.mkv out.mp4 -p x --url ws://h:1{named}", REMOTE, {},
                {UNTAUGHT: (["like", "monet"], prompts, "far from it")})  # fmt: skip
    result, _ = run(case, monkeypatch, answer=report)
    assert result.exception is None, result.output
    lines = result.output.splitlines()
    said = [
        "far from it",
        "this model does not know: like, monet; it edits by the rest. It knows, for example: a, b, "
        "c, d",
        *(["in.mkv: damaged: three frames"] * damaged),
        "out.mp4: 30 frames in 2.5 s (12.0 fps), edited at 48x32, 26% of tokens computed, model "
        f"{place}",
    ]
    assert [line for line in lines if line in said] == said


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("--sessions 1,2", [1, 2]),
        ("--sessions 1,3,2 --attack floods", [1, 3, 2, 3]),
        ("--sessions 2,1 --kills 1", [2, 1, 2]),
        ("--sessions 1,2 --soak 3s", [1, 2, 2]),
    ],
)
def test_every_run_of_cameras_is_in_the_report(
    words: str, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.bench import serve as bench
    from pipelines.bench.soak import HeldMemory

    calls: list[tuple[int, tuple[str, ...], bool]] = []
    passed, sampled = [0.0], list[bool]()

    def measure(url: str, load: Any, sessions: int, *, attacks: Any = (), kill: Any = None,
                every_second: Any = None, **_: Any) -> Any:  # fmt: skip
        calls.append((sessions, tuple(attacks), kill is not None))
        sampled.append(every_second is not None)
        passed[0] += 0.6
        return SimpleNamespace(to_dict=lambda: {"sessions": sessions, "call": len(calls)})

    monkeypatch.setattr("serve.client.cameras.measure", measure)
    waited = list[tuple[int, int]]()  # after how many runs, and for what was held before them
    monkeypatch.setattr("pipelines.bench.room.held", lambda url: 7 + len(calls))
    monkeypatch.setattr(
        "pipelines.bench.room.until_left", lambda url, before: waited.append((len(calls), before))
    )
    monkeypatch.setattr(HeldMemory, "seconds", property(lambda self: passed[0]), raising=False)
    monkeypatch.setattr(HeldMemory, "growth", lambda self: {"hub": 0.01})
    monkeypatch.setattr(HeldMemory, "sample", lambda self: None)
    monkeypatch.setattr(bench, "parse_attacks", lambda text: [text] if text else [])
    for name in ("facts", "table", "memory_table"):
        monkeypatch.setattr(bench, name, lambda *_: "")
    soaks: list[Any] = []
    monkeypatch.setattr(bench, "soak_line", lambda found: soaks.append(found) or "")
    monkeypatch.setattr("serve.client.served_model", lambda *_, **__: MODEL)
    for name, answer in (SERVES | {KILLER: "killer"}).items():
        module, _, function = name.rpartition(".")
        monkeypatch.setattr(f"{module}.{function}", lambda *_, a=answer, **__: a)
    result = CliRunner().invoke(
        app, ["bench", "serve", *words.split(), "--json", "r.json"], standalone_mode=False
    )
    assert result.exception is None, result.output
    report = json.loads(Path("r.json").read_text())
    assert [found["sessions"] for found in report["runs"]] == runs
    assert report["model"] == MODEL | {"work_size": "native"}, "as the settings say"
    assert ("soak" in report, "memory" in report) == ("--soak" in words,) * 2
    assert soaks == [found for name, found in report.items() if name == "soak"]
    assert [attacks for _, attacks, _ in calls if attacks] == [("floods",)] * ("floods" in words)
    assert waited == [(4, 7)] * ("floods" in words)
    lasting = len(calls) - len(words.split()[1].split(",")) if "--soak" in words else 0
    assert sampled == [False] * (len(calls) - lasting) + [True] * lasting
    assert [killed for *_, killed in calls] == [False] * (len(calls) - 1) + ["--kills" in words]


@pytest.mark.parametrize(
    ("different", "kills", "told"),
    [([], 2, None), (["a", "b"], 2, "2 weights differ after the kills, a is the first"),
     ([], 1, "the training ended before 1 of the kills; give more --steps")],
)  # fmt: skip
def test_kills_say_whether_the_weights_are_the_same(
    different: list[str], kills: int, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = {"step": 4, "worker": 1, "signal": "kill", "from_step": 3, "lost": 1.0}
    report = {"different": different, "kills": [kill] * kills, "stage": "distill", "workers": 2,
              "steps": 20, "seconds_alone": 10.04, "seconds_killed": 21.25}  # fmt: skip
    case = Case("bench train --kills 2 --json k.json", KILLS, {})
    result, _ = run(case, monkeypatch, answer=report)
    line = f"distill, 2 workers, 20 steps: 10.0 s alone, 21.2 s with {kills} kills"
    assert line in result.output.splitlines()
    assert ("The weights are the same, bit for bit." in result.output) == (not different)
    assert (str(result.exception)[: len(told)] if told else result.exception) == told
    assert json.loads(Path("k.json").read_text())["different"] == different


def test_a_simulated_day_is_told_for_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []

    def simulate(day: Any, rule: Any) -> dict[str, float]:
        asked.append((day, rule))
        assert not logging.getLogger("x").isEnabledFor(logging.ERROR)
        if rule == "bad":
            raise ValueError
        return {"n": float(len(asked))}

    monkeypatch.setattr("pipelines.bench.simulation.world.simulate", simulate)
    monkeypatch.setattr("pipelines.bench.simulation.tally.table", lambda day, results: "")
    day: Any = SimpleNamespace(hours=3.0)
    rules: Any = {"ships": "one", "other": "two"}
    measured._simulate(day, rules, tmp_path / "d.json")
    assert asked == [(day, "one"), (day, "two")]
    runs = json.loads((tmp_path / "d.json").read_text())["runs"]
    assert runs == {"ships": {"n": 1.0}, "other": {"n": 2.0}}
    bad: Any = {"ships": "bad"}
    with pytest.raises(ValueError):  # noqa: PT011  # the simulation's own
        measured._simulate(day, bad, None)
    assert logging.root.manager.disable == logging.NOTSET  # all is said again, not errors alone


def config_of(output: Path) -> PipelineConfig:
    config = PipelineConfig(output=str(output))
    config.tracking.uri, config.tracking.model_name = "http://m", "mine"
    return config


def test_the_demo_says_where_everything_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened, streamed = config_of(tmp_path), [], []
    result: Any = SimpleNamespace(output=tmp_path, version="4", aliases=["a"], model=Path("m"))
    monkeypatch.setattr(commands, "load_config", lambda *given: (asked.append(given), config)[1])
    asked: list[Any] = []

    def stream(runner: Any, found: Any, settings: Any, serving: Any) -> Any:
        streamed.append((runner, found, settings))
        return SimpleNamespace(metrics={"fps": 16.0})

    monkeypatch.setattr(commands, "edit_sample", lambda *given: streamed.append(given))
    monkeypatch.setattr(commands, "stream_live", stream)
    monkeypatch.setattr(commands, "print_result", lambda *_: None)
    monkeypatch.setattr(commands, "write_page", lambda found: tmp_path / "index.html")
    monkeypatch.setattr(commands, "open_page", lambda page, console: opened.append(page))
    monkeypatch.setattr(commands, "command_name", str)

    def pipeline(settings: Any, view: StageView, *, then: Any) -> Any:
        assert list(view._tasks)[-3:] == ["register", "edit", "live"]
        then("runner", result)
        return result

    monkeypatch.setattr(commands, "_run", pipeline)
    page = StringIO()
    commands.run_demo(["a=1"], Console(file=page, width=20))
    assert asked == [("demo", ["a=1"])]
    assert streamed == [("runner", result), ("runner", result, config)]
    lines = page.getvalue().splitlines()
    assert lines[1] == "Done in 0 s."
    assert lines[2:6] == [
        "  before   source.mp4",
        "  after    edited.mp4  (make it sunset)",
        "  live     live.mp4  (models:/mine@a over WebSocket: 16.0 fps)",
        "  page     index.html  (all of this to look at)",
    ]
    assert "  liveedit edit source.mp4 mine.mp4 --prompt 'make it night'" in lines
    assert opened == [tmp_path / "index.html"]


@pytest.mark.parametrize(("done", "kept"), [(["data", "vae"], "data, vae"), ([], "nothing yet")])
def test_a_training_that_is_stopped_says_what_is_kept(
    done: list[str], kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: Any, view: StageView, **_: Any) -> None:
        view.finished += done
        error = KeyboardInterrupt()
        error.add_note("at step 7")
        raise error

    monkeypatch.setattr(commands, "run_pipeline", stopped)
    page = StringIO()
    with pytest.raises(KeyboardInterrupt):
        commands.run_train(config_of(tmp_path), Console(file=page, width=20))
    assert page.getvalue() == (
        f"\nStopped. Finished and kept: {kept}. Run the same command again to go on. at step 7\n"
    )


def test_stages_that_were_chosen_reach_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(commands, "run_pipeline", lambda *_, choice, then: chosen.append(choice))
    planned: list[Any] = []
    monkeypatch.setattr(commands, "plan_pipeline", lambda *given: planned.append(given) or [])
    console, config = Console(file=StringIO()), config_of(tmp_path)
    commands.run_train(config, console, first="causal")
    commands.run_train(config, console, only="vae")
    assert [(choice.first, choice.only) for choice in chosen] == [("causal", None), (None, "vae")]
    monkeypatch.setattr(commands, "known_card", {"H100": "H100", None: "ours"}.__getitem__)
    monkeypatch.setattr(commands, "legend", lambda lines, card, compute: [f"on {card}"])
    commands.print_plan(config, console, first="causal", card="H100")
    commands.print_plan(config, console, only="vae")
    assert console.file.getvalue().split("\n")[-2:] == ["on ours", ""]  # type: ignore[attr-defined]
    assert [(c.first, c.only, card) for *_, c, card in planned] == [
        ("causal", None, "H100"), (None, "vae", "ours"),
    ]  # fmt: skip


@pytest.mark.parametrize("said", [[], ["first", "it did not take 1"]])
def test_what_was_not_told_is_sent_to_where_it_belongs(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Box:
        def __init__(self, output: Path, uri: str, experiment: str, warn: Any) -> None:
            events.append((output, uri, experiment))
            self.warn = warn

        def __enter__(self) -> Box:
            return self

        def put_refused_back(self) -> None:
            events.append("put back")

        def __exit__(self, *_: object) -> None:
            for line in said:
                self.warn(line)

    @contextmanager
    def locked(output: Path) -> Iterator[None]:
        assert output == tmp_path
        events.append("locked")
        yield
        events.append("unlocked")

    monkeypatch.setattr("pipelines.stages.running.runner.locked", locked)
    monkeypatch.setattr("pipelines.tracking.outbox.Outbox", Box)
    monkeypatch.setattr("pipelines.tracking.tracker.check_reachable", events.append)
    page = StringIO()
    monkeypatch.setattr(sending, "console", Console(file=page, width=20))
    config = config_of(tmp_path)
    config.tracking.experiment = "mine"
    (tmp_path / "tracking").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    if said:
        with pytest.raises(TrackingError, match=r"^it did not take 1$"):
            sending.send(tmp_path, "http://other")
        assert page.getvalue() == ""
    else:
        sending.send(tmp_path, "http://other")
        assert page.getvalue() == f"http://other has all of {tmp_path}\n"
    assert events == [
        "http://other", "locked", (tmp_path, "http://other", "mine"), "put back", "unlocked",
    ]  # fmt: skip
