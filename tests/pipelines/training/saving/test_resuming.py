"""What a checkpoint has to hold, over the real stages."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from data.loader import Loader, Split, loader
from infra.runtime.errors import UserError
from modeling.model_dir import load_model, read_config
from pipelines.training import checkpoint, saver
from pipelines.training.checkpoint import CheckpointError, choose
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Write
from tests.pipelines.training.benches import PAIRS, STAGES, TIMES, Bench, Scripted, write
from tests.pipelines.training.plain import setting

pytestmark = pytest.mark.usefixtures("alone", "plain_engines")


def weights(folder: Path) -> dict[str, Tensor]:
    model = load_model(folder)
    assert model.transformer is not None
    assert model.vae is not None
    parts = {"transformer": model.transformer, "vae": model.vae}
    return {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_training_equals_an_unbroken_one(bench: Callable[..., Bench], stage: str) -> None:
    """Bit for bit: weights, average, optimizer, place in the data and in the schedule; what is
    written only after another step is the state before it."""
    given: dict[str, Any] = {
        "steps": 5,
        "checkpoint_every": 2,
        "log_every": 1,
        "grad_accumulation": 2,
        "learning_rate": 1e-2,
        "final_learning_rate": 0.1,
        "warmup_steps": 3,
    }
    if stage == "distill":
        given |= {"generator_every": 2, "critic_learning_rate": 1e-2, "ema_decay": 0.3}
    whole = bench(stage, "whole").set(**given)
    training = whole.training()

    def keep(write: Write, step: int) -> None:
        def behind() -> None:
            while training.done == step:  # the next step has changed all there is
                time.sleep(0.001)
            whole.keep(write, step)

        Thread(target=behind).start()

    training.run(keep)
    assert [step for step, _ in whole.saved] == [2, 4]
    assert whole.said == []
    for done, saved in whole.saved:
        rest = bench(stage, f"rest-{done}").set(**given)
        rest.run(saved)
        assert [report.step for report in rest.reports] == list(range(done + 1, 6))
        assert [report.resumed for report in rest.reports] == [True] + [False] * (4 - done)
        assert rest.said == [f"goes on from its checkpoint at step {done}"]  # nothing else changed
        for mine, right in zip(rest.reports, whole.reports[done:], strict=True):
            for name, value in mine.metrics.items():
                assert name in TIMES or value == right.metrics[name], name
        found, wanted = weights(rest.folder / "model"), weights(whole.folder / "model")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert read_config(rest.folder / "model") == read_config(whole.folder / "model")
    trained = weights(whole.start)
    part = "vae" if stage == "vae" else "transformer"
    changed = {
        name.split(".")[0] for name in trained if not torch.equal(trained[name], wanted[name])
    }
    assert changed == {part}


def test_a_checkpoint_of_something_else_is_refused(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    first = bench().set(steps=3, checkpoint_every=2, grad_accumulation=3)
    first.run()
    ((_, saved),) = first.saved

    def other(name: str) -> Bench:
        return bench("foundation", name).set(steps=3)

    same = other("same").training(saved)
    assert (same.done, same.epochs) == (2, pytest.approx(2 * 3 / PAIRS))
    run = bench("distill", "networks").set(steps=3)
    with pytest.raises(
        ValueError, match=r"networks was \['transformer'\] and is \['critic', 'gen.*, or move"
    ):
        run.training(saved)
    run = other("steps").set(steps=1)
    with pytest.raises(ValueError, match=r"taken after 2 steps and foundation.steps is 1; set it"):
        run.training(saved)
    run = other("data")
    run.dataset = write(tmp_path / "other content", first=50)  # of the same size
    with pytest.raises(ValueError, match="saved with dataset"):
        run.training(saved)
    run = other("seed")
    run.config.seed = 1
    with pytest.raises(ValueError, match="saved with seed 0, now it is 1"):
        run.training(saved)


def test_other_workers_go_on_where_each_has_read_as_much(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    first = bench().set(steps=4, batch_size=2, checkpoint_every=2)
    first.config.compute.zero_stage = 0
    scripted(lambda step, micro: {"loss": 1.0})
    first.run()
    ((_, saved),) = first.saved
    rest = bench("foundation", "rest").set(steps=4, batch_size=2)
    rest.config.compute.zero_stage = 0
    stage = scripted(lambda step, micro: {"loss": 1.0})
    training = rest.training(saved, rank=1, world_size=2)
    assert (training.done, training.epochs) == (2, pytest.approx(4 / PAIRS))
    training.run(rest.keep)
    batches = loader(rest.dataset, Split(batch_size=2, rank=1, world_size=2))
    begin = next(iter(batches))["key"]
    batches.skip(4 / PAIRS)
    following = iter(batches)
    assert stage.keys == [key for _ in range(2) for key in next(following)["key"]]
    assert stage.keys[:2] != begin


def written(folder: Path, name: str, workers: int) -> Path:
    """A checkpoint of so many workers, each with one file, as far as it is looked at."""
    saved = folder / name
    saved.mkdir(parents=True)
    for rank in range(workers):
        data = f"of {rank}".encode()
        (saved / f"state-{rank}").write_bytes(data)
        files = {f"state-{rank}": hashlib.sha256(data).hexdigest()}
        manifest = {"workers": workers, "step": 1, "files": files}
        (saved / f"manifest-{rank}.json").write_text(json.dumps(manifest))
    return saved


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("part", range(4))
def test_every_file_of_a_checkpoint_is_looked_at_by_one_worker(
    workers: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (written(tmp_path, "checkpoint_1", 4) / f"state-{part}").write_text("torn")

    def gather(found: list[Any], mine: Any) -> None:
        found[0] = mine  # nobody else finds anything

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    folder = RunFolder(tmp_path)
    looks = part % workers
    with pytest.raises(CheckpointError, match=f"state-{part} is not as it was written"):
        choose(folder, setting("foundation", looks, workers))
    for rank in set(range(workers)) - {looks}:
        assert choose(folder, setting("foundation", rank, workers))[0] is not None


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_worker_finds_damaged_all_pass_over(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, _ = (written(tmp_path, f"checkpoint_{n}", 2) for n in (1, 2))
    rounds = iter(["state-9 is not as it was written", None])

    def gather(found: list[Any], mine: Any) -> None:
        assert mine is None
        found[rank], found[1 - rank] = mine, next(rounds)

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    saved, wrong = choose(RunFolder(tmp_path), setting("foundation", rank, 2))
    assert saved == older
    assert wrong == ["checkpoint_2: state-9 is not as it was written"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("lost", "torn", "goes"),
    [
        ("manifest-0.json", False, True),
        ("manifest-1.json", False, True),
        ("manifest-0.json", True, False),
        ("state-0", False, False),
        ("state-1", True, False),
    ],
)
def test_what_was_never_finished_goes_where_there_is_an_older_one_and_damage_stays(
    lost: str, torn: bool, goes: bool, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first worker, and of one alone there is nothing else."""

    def gather(found: list[Any], mine: Any) -> None:
        theirs = next(rounds)
        found[:] = [mine or theirs, theirs]

    rounds = iter(["torn", "torn", None])  # the newer one alone, then before the older
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    newer = written(tmp_path, "checkpoint_2", 2)
    (newer / lost).write_text("{") if torn else (newer / lost).unlink()
    here = setting("foundation", rank, 2)
    with pytest.raises(
        CheckpointError, match=rf"foundation cannot .* in {tmp_path} .*checkpoint_2:"
    ):
        choose(RunFolder(tmp_path), here)
    older = written(tmp_path, "checkpoint_1", 2)
    saved, (wrong,) = choose(RunFolder(tmp_path), here)
    assert (saved, wrong.partition(": ")[0]) == (older, "checkpoint_2")
    assert newer.exists() is not (goes and rank == 0)


@pytest.mark.parametrize(
    ("before", "now", "workers", "compute", "made_anew"),
    [
        (0, 0, 2, {}, False),  # each holds the whole
        (0, 1, 1, {}, True),
        (1, 0, 2, {}, True),
        (1, 1, 1, {}, False),  # nothing has changed
        (1, 1, 2, {}, True),
        (1, 1, 1, {"precision": "bf16"}, True),
        (1, 1, 1, {"offload": "optimizer"}, True),
    ],
)
def test_parts_that_these_workers_cannot_load_are_made_anew_for_the_time_of_loading(
    before: int,
    now: int,
    workers: int,
    compute: dict[str, Any],
    made_anew: bool,
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    first, rest = (bench(name=name).set(steps=2, checkpoint_every=1) for name in ("a", "b"))
    first.config.compute.zero_stage = before
    first.run()
    rest.config.compute = replace(rest.config.compute, zero_stage=now, **compute)
    place, saved = rest.folder / ".universal", rest.folder / "checkpoint_000000"
    (place / "of one that was killed").mkdir(parents=True)
    made: list[Any] = []
    loaded: list[Any] = []

    def make(source: Path, target: Path, *of: Any) -> None:
        assert not (place / "of one that was killed").exists()
        target.mkdir(parents=True)
        made.append((source, target, *of))

    monkeypatch.setattr(checkpoint, "make_universal", make)
    monkeypatch.setattr(checkpoint, "load_engine", lambda _, *where: loaded.append(where))
    rest.training(first.saved[0][1], world_size=workers)
    of = (now, workers, ["weight", "bias"])
    if made_anew:
        assert made == [
            (saved / name / "state", place / name / "universal", *of) for name in ("one", "two")
        ]
        assert loaded == [(place / name, "universal") for name in ("one", "two")]
        assert not place.exists()
    else:
        assert (made, loaded) == ([], [(saved / name, "state") for name in ("one", "two")])


def test_a_disk_that_fails_behind_the_steps_is_named_at_the_next_and_leaves_no_part(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    run = bench().set(steps=9, checkpoint_every=3)
    failed = Event()

    def script(step: int, micro: int) -> dict[str, float]:
        assert step < 4 or not failed.is_set()
        assert step < 3 or failed.wait(60)  # in step 3, after 3 steps were saved
        return {"loss": 1.0}

    def keep(write: Write, step: int) -> None:
        def behind() -> None:
            with pytest.raises(UserError):
                write(run.folder / "progress.jsonl" / "no folder")
            failed.set()

        Thread(target=behind).start()

    scripted(script)
    with pytest.raises(ValueError, match=r"stage foundation .* at step 3 .*Not a directory"):
        run.training().run(keep)
    assert failed.is_set()
    assert not any(run.folder.glob(".part*"))
    assert not (run.folder / "model").exists()


def test_the_next_save_waits_for_the_one_before_and_says_so(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], monkeypatch: Any
) -> None:
    monkeypatch.setattr(saver, "TOLD_SECONDS", 0.03)
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=6, checkpoint_every=2)
    training = run.training()
    order: list[str] = []

    def keep(write: Write, step: int) -> None:
        order.append(f"takes {step}")

        def behind() -> None:
            while training.done < min(step + 2, 6):  # the next save's, or the end
                time.sleep(0.001)
            time.sleep(0.1)
            write(run.folder / f"saved-{step}")
            order.append(f"wrote {step}")

        Thread(target=behind).start()

    training.run(keep)
    assert order[:3] == ["takes 2", "wrote 2", "takes 4"]
    assert (run.folder / "saved-4" / "manifest-0.json").is_file()  # before the training ended
    (said,) = run.said
    assert said.startswith("step 4 waited 0 s until the checkpoint before was written; save less o")


def test_more_steps_follow_where_the_last_state_was_kept(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    first = bench().set(steps=4, checkpoint_every=3)
    first.config.compute.keep_finished = True
    scripted(lambda step, micro: {"loss": 1.0})
    first.run()
    assert [step for step, _ in first.saved] == [3, 4]
    assert (first.folder / "model").is_dir()
    more = bench("foundation", "more").set(steps=6, checkpoint_every=3)
    again = scripted(lambda step, micro: {"loss": 1.0})
    more.run(first.saved[-1][1])
    assert [step for step, _ in again.asked] == [4, 5]
    assert more.said == [
        "goes on from its checkpoint at step 4, with other settings: foundation.steps 4 -> 6"
    ]

    made = scripted(lambda step, micro: {"loss": 2.0})
    whole = bench("foundation", "whole").set(steps=4)  # killed before its model was written
    assert whole.run(first.saved[-1][1])["metrics"] == {"loss": 1.0}
    assert made.asked == []


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_as_many_workers_go_on_each_with_its_own_pairs(
    zero_stage: Any,
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exactly, whether or not their parts are others; the second of two, here without the first."""
    monkeypatch.setattr(checkpoint, "make_universal", lambda *_: None)
    monkeypatch.setattr(checkpoint, "load_engine", lambda *_: None)
    monkeypatch.setattr(Loader, "skip", lambda *_: pytest.fail("read as much, but not the same"))
    stage = scripted(lambda step, micro: {"loss": 1.0})
    whole = bench().set(steps=3, checkpoint_every=1)
    whole.config.compute.zero_stage = 0
    for rank in (0, 1):
        stage.keys.clear()
        whole.training(rank=rank, world_size=2).run(whole.keep)
    its_own = list(stage.keys)
    stage.keys.clear()
    rest = bench(name="rest").set(steps=3)
    rest.config.compute.zero_stage = zero_stage
    training = rest.training(whole.saved[0][1], rank=1, world_size=2)
    assert (training.done, training.epochs) == (1, pytest.approx(1 / 3))
    training.run(rest.keep)
    assert stage.keys == its_own[1:]
