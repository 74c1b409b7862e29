"""What is done around DeepSpeed's own saving and loading, with a plain engine in its place."""

from __future__ import annotations

import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.training.zero import inside
from pipelines.training.zero.average import Ema
from pipelines.training.zero.inside import (
    import_deepspeed,
    load_engine,
    make_universal,
    master_shards,
    save_engine,
    shard_starts,
)
from tests.pipelines.training.plain import PlainEngine, setting


def engine(**section: Any) -> PlainEngine:
    here = setting("foundation", **section)
    made = PlainEngine(nn.Linear(3, 2), here.config.compute, here.section, 0.5)
    for group in made.optimizer.param_groups:
        group["weight_decay"] = here.section.weight_decay
    return made


def stepped(made: PlainEngine, loss: float = 1.0) -> PlainEngine:
    made.backward(loss * made(torch.ones(4, 3)).sum())
    made.step()
    return made


@pytest.mark.parametrize("there", [False, True])
def test_what_is_kept_from_deepspeed_s_imports_is_back_afterwards(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow, if it is imported already or not, and the compiler; also after an error."""
    mlflow, compiler = SimpleNamespace() if there else None, torch.compile
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    if there:
        monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with suppress(ZeroDivisionError), inside._light_imports():
        assert torch.compile(len) is torch.compile(dynamic=True)(len) is len
        assert sys.modules["mlflow"] is mlflow
        raise ZeroDivisionError
    assert torch.compile is compiler
    assert sys.modules.get("mlflow", "none") is (mlflow if there else "none")


def test_its_files_are_given_to_us_and_written_again_afterwards(tmp_path: Path) -> None:
    made = stepped(engine())
    given: list[str] = []
    save_engine(made, tmp_path / "one", "tag", lambda state, path: given.append(path))
    assert given == [str(tmp_path / "one" / "tag" / "engine.pt")]
    assert not Path(given[0]).exists()

    def full(state: Any, path: str) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_engine(made, tmp_path / "two", "tag", full)
    made.save_checkpoint(str(tmp_path / "three"), "tag", False)
    assert (tmp_path / "three" / "tag" / "engine.pt").is_file()


def test_a_loaded_engine_keeps_its_own_rates_betas_and_decay(tmp_path: Path) -> None:
    before = stepped(engine(betas=(0.8, 0.9), weight_decay=0.1))
    before.save_checkpoint(str(tmp_path), "tag", False)
    now = engine(betas=(0.5, 0.6), weight_decay=0.3)
    now.optimizer.param_groups[0]["lr"] = 0.125
    load_engine(now, tmp_path, "tag")
    (group,) = now.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.6), 0.3)
    for mine, theirs in zip(now.module.parameters(), before.module.parameters(), strict=True):
        assert mine.equal(theirs)
        state, was = now.optimizer.state[mine], before.optimizer.state[theirs]
        assert state["step"] == was["step"] == 1
        assert torch.equal(state["exp_avg_sq"], was["exp_avg_sq"])


def test_moments_of_zero_0_go_to_the_parameters_that_they_are_of(tmp_path: Path) -> None:
    """Its one file numbers matrices before biases and norms, whatever comes first in the network;
    the frozen one is none of them, and of what has not stepped yet there is nothing."""
    import_deepspeed()
    network = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    network[2].requires_grad_(False)
    network.register_parameter("still", nn.Parameter(torch.ones(3)))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.dim() > 1]
    vectors = [p for p in trained.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}])
    network(torch.arange(6.0).view(2, 3) ** 2).square().sum().backward()
    optimizer.step()
    state = {"module": network.state_dict(), "optimizer": optimizer.state_dict()}
    (tmp_path / "t").mkdir()
    torch.save(state, tmp_path / "t" / "mp_rank_00_model_states.pt")
    make_universal(tmp_path / "t", tmp_path / "universal", 0, 1, list(trained))
    made = tmp_path / "universal" / "zero"
    assert {path.name for path in made.iterdir() if path.is_dir()} == set(trained)
    for name, parameter in trained.items():
        steps = 0 if name == "still" else 1
        for key in ("exp_avg", "exp_avg_sq"):
            moment = torch.load(made / name / f"{key}.pt")["param"]
            wanted = optimizer.state[parameter][key] if steps else torch.zeros(3)
            assert torch.equal(moment, wanted), (name, key)
            assert moment.any() == bool(steps), (name, key)
        assert torch.load(made / name / "step.pt") == steps
        assert torch.equal(torch.load(made / name / "fp32.pt")["param"], parameter)


NUMBERS = {"first": torch.arange(4.0), "second": torch.arange(10.0, 16.0)}


def rank_of(begins: int, ends: int, zero_stage: int = 2) -> Any:
    """An engine whose rank holds this stretch of all ten numbers, as DeepSpeed marks it under
    ZeRO-1 and 2; under ZeRO-3 each parameter is cut in equal parts, one a rank."""
    parameters, place = {}, 0
    for name, numbers in NUMBERS.items():
        parameter = nn.Parameter(numbers.clone())
        low, high = max(begins - place, 0), min(ends - place, len(numbers))
        own, place = numbers[low:high].clone(), place + len(numbers)
        address, got = SimpleNamespace(start=low), SimpleNamespace(get_hp_fragment=lambda x=own: x)
        got.lp_fragment_address = address
        if zero_stage:
            parameter._hp_mapping = got if low < high else None  # type: ignore[attr-defined]
        parameters[name] = parameter
    named = SimpleNamespace(named_parameters=lambda: list(parameters.items()))
    return SimpleNamespace(module=named)


def test_where_a_ranks_part_begins_in_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard_starts(rank_of(0, 10, zero_stage=0)) == {"first": 0, "second": 0}
    assert shard_starts(rank_of(1, 3)) == {"first": 1}  # of the other it holds nothing
    assert shard_starts(rank_of(2, 7)) == {"first": 2, "second": 0}
    assert shard_starts(rank_of(7, 10)) == {"second": 3}
    sharded = nn.Parameter(torch.zeros(0))
    sharded.ds_id, sharded.ds_tensor = 0, torch.zeros(5)  # type: ignore[attr-defined]
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    module = SimpleNamespace(named_parameters=lambda: [("w", sharded)])
    assert shard_starts(SimpleNamespace(module=module)) == {"w": 15}


def test_averages_of_any_ranks_are_dealt_to_any_others() -> None:
    """Each takes what lies in its own stretch, whoever had it."""
    import_deepspeed()  # a fifth of what it takes to import it plainly
    for cuts in ((0, 10), (0, 5, 10), (0, 3, 7, 10), (0, 4, 10)):
        saved = []
        for begins, ends in pairwise(cuts):
            average = Ema(rank_of(begins, ends), 0.5)
            average.updates = 6
            for shard in average.shards.values():
                shard.mul_(-1)  # no longer what the network is
            saved.append(average.state_dict())
        for begins, ends in ((0, 10), (0, 6), (6, 10), (1, 9)):
            engine = rank_of(begins, ends)
            now = Ema(engine, 0.5)
            now.load_state_dicts(saved)
            assert now.updates == 6
            wanted = master_shards(engine)
            assert now.shards.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(now.shards[name], -value), (cuts, begins, ends, name)
