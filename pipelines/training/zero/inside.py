"""DeepSpeed from the inside: what it does not promise to keep, and its files, here alone.

With another DeepSpeed, look here first.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from infra.runtime.environment import set_default
from pipelines.training.zero.adam import settle_first_moment

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of every parameter
_GATHERED = 64  # parameters that `copy_weights` makes whole at a time
ZeroEngine = Any  # deepspeed.DeepSpeedEngine, which is imported late: it takes seconds


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its shared-memory kernel for CPU collectives.

    That kernel is compiled by the first `initialize` on a CPU (minutes, needs a compiler) and gloo
    serves as well. `__compatible_ops__` is internal, and a test guards it.
    """
    if not torch.cuda.is_available():
        set_default("DS_ACCELERATOR", "cpu")
    set_default("DEEPSPEED_LOG_LEVEL", "warning")
    with _light_imports():
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _light_imports() -> Iterator[None]:
    """Keep DeepSpeed from importing what nobody here uses, four fifths of the time it takes.

    Its autotuner imports MLflow if it is there, and Muon's kernels are decorated with
    `torch.compile`, which imports the whole compiler; both before any engine exists.
    """
    compile_, mlflow = torch.compile, sys.modules.get("mlflow")
    sys.modules["mlflow"] = mlflow  # type: ignore[assignment]  # None makes its import fail
    torch.compile = lambda function=None, **_: function or (lambda f: f)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compile_
        if mlflow is None:
            del sys.modules["mlflow"]


def save_engine(
    engine: ZeroEngine, folder: Path, tag: str, collect: Callable[[Any, str], None]
) -> None:
    """Give each file of DeepSpeed's checkpoint in `folder` to `collect(state_dict, path)` instead
    of writing it; a collective."""
    files = engine.checkpoint_engine
    before, files.save = files.save, collect
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        files.save = before


def shard(network: nn.Module, config: dict[str, Any]) -> None:
    """Split the parameters of `network`, which lies in the host's memory and is the same on every
    rank, over all ranks, so that no device ever holds them all; `config` is of ZeRO-3.

    Each rank takes its own part from there. `Init` itself would bring every parameter whole to
    every device, and then have all of them sent what rank 0 has.
    """
    into = import_deepspeed().zero.Init(module=nn.Module(), config_dict_or_path=config)
    parameter: Any
    for parameter in network.parameters():
        if not hasattr(parameter, "ds_id"):
            into._convert_to_deepspeed_param(parameter)
            parameter.partition()
            parameter.data = parameter.data.to(into.local_device)  # nothing, on that device


def shard_frozen(network: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The same of a network that is only asked; call what is returned, which gathers its weights
    layer by layer. A collective."""
    shard(network, config)
    engine, *_ = import_deepspeed().initialize(
        model=network, config=config, dist_init_required=False
    )
    module: nn.Module = engine.module
    return module.eval().requires_grad_(False)


def load_engine(engine: ZeroEngine, folder: Path, tag: str) -> None:
    """Load `engine` from a checkpoint of DeepSpeed's, tag "universal" on any number of ranks.

    Learning rate, weight decay and betas stay what this engine was made with. A universal
    checkpoint of ZeRO-3 comes with one step counter for all groups, which each would count up.
    """
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in engine.optimizer.param_groups
    ]
    if tag == "universal" and not engine.zero_optimization():
        _load_whole(engine, folder / tag / "zero")
    else:
        engine._config.load_universal_checkpoint = tag == "universal"
        engine.load_checkpoint(str(folder), tag=tag)
    for group, ours in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(ours)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        state["step"] = state["step"].clone()
    settle_first_moment(inner)


def _load_whole(engine: ZeroEngine, folder: Path) -> None:
    """What ZeRO-0, whose ranks hold all of it, takes from the parameters of a universal checkpoint;
    DeepSpeed has no way from there."""

    def part(name: str, key: str) -> Any:
        value = torch.load(folder / name / f"{key}.pt", weights_only=False, map_location="cpu")
        return torch.as_tensor(value["param"] if isinstance(value, dict) else value)

    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer, state = engine.optimizer, {}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(trained):
        name, shape = names[parameter], parameter.shape
        parameter.data.copy_(part(name, "fp32").view(shape))
        moments = {key: part(name, key).view(shape) for key in MOMENTS}
        state[place] = moments | {"step": part(name, "step").float()}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def make_universal(
    source: Path, target: Path, zero_stage: int, workers: int, trained: list[str]
) -> None:
    """Write DeepSpeed's checkpoint in `source`, of an engine with these parameters, as one that so
    many ranks of any ZeRO stage can load, in either precision."""
    target.mkdir(parents=True)
    if not list(source.glob("*optim_states.pt")):  # of ZeRO-0, which DeepSpeed does not convert
        _split(source, target, trained)
    else:
        _convert(source, target)
    _refit(target, zero_stage, workers)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a line and a bar a file
        ds_to_universal.main(options)


def _split(source: Path, target: Path, trained: list[str]) -> None:
    """What DeepSpeed makes of ZeRO-1 and 2, of the one file that ZeRO-0 leaves."""
    (file,) = source.glob("*model_states.pt")
    state = torch.load(file, weights_only=False, map_location="cpu")
    optimizer, weights = state.pop("optimizer"), state["module"]
    # As `make_engine` numbers them: matrices first.
    ordered = sorted(trained, key=lambda name: weights[name].dim() <= 1)
    for place, name in enumerate(ordered):
        had = optimizer["state"].get(place, {})  # nothing of what has not stepped yet
        parts = {key: had.get(key, torch.zeros_like(weights[name])) for key in MOMENTS}
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        for key, value in (parts | {"fp32": weights[name]}).items():
            torch.save({"param": value.contiguous()}, folder / f"{key}.pt")
        torch.save(had.get("step", torch.zeros(())), folder / "step.pt")
    version = import_deepspeed().__version__
    groups = {"ds_version": version, "param_groups": optimizer["param_groups"]}
    torch.save(groups, target / "zero" / "optimizer_state.pt")
    torch.save(state, target / file.name)


def _refit(made: Path, zero_stage: int, workers: int) -> None:
    """What ZeRO-3 and the others, each, look for elsewhere in a universal checkpoint: the files
    that are named after ranks, and Adam's step."""
    one = next(made.glob("*model_states.pt"))
    ranks = [f"zero_pp_rank_{rank}_" for rank in range(workers)] if zero_stage == 3 else [""]
    for rank in ranks:
        file = made / f"{rank}mp_rank_00_model_states.pt"
        if not file.exists():
            file.symlink_to(one.name)
    file = made / "zero" / "optimizer_state.pt"
    state = torch.load(file, weights_only=False)
    inner = state.get("optimizer_state_dict")  # ZeRO-3's alone
    if zero_stage == 3 and inner is None:
        step = torch.load(next(file.parent.rglob("step.pt")), weights_only=False)
        groups = state["param_groups"]
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    elif zero_stage < 3 and inner is not None:
        state["ds_version"] = import_deepspeed().__version__
        for parameter in filter(Path.is_dir, file.parent.iterdir()):
            for part in parameter.iterdir():
                torch.save({"param": torch.load(part)}, part)
            torch.save(inner["state"][0]["step"], parameter / "step.pt")
    torch.save(state, file)


def master_shards(engine: ZeroEngine) -> dict[str, Tensor]:
    """This rank's float32 part of every parameter, as flat views of what the optimizer steps.

    A parameter of which this rank holds nothing is left out.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    shards: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            shards[name] = safe_get_local_fp32_param(parameter).detach()
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
            if parameter._hp_mapping is not None:
                shards[name] = parameter._hp_mapping.get_hp_fragment().detach()
        else:
            assert parameter.dtype == torch.float32, "ZeRO-0 trains in float32 only"
            shards[name] = parameter.detach().view(-1)
    return shards


def shard_starts(engine: ZeroEngine) -> dict[str, int]:
    """Where in its flat parameter each of `master_shards` begins."""
    starts: dict[str, int] = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            starts[name] = distributed.get_rank() * parameter.ds_tensor.numel()
        elif getattr(parameter, "_hp_mapping", None) is not None:
            starts[name] = parameter._hp_mapping.lp_fragment_address.start
        elif not hasattr(parameter, "_hp_mapping"):
            starts[name] = 0
    return starts


def full_weights(engine: ZeroEngine, keep: bool = True) -> dict[str, Tensor]:
    """All trained weights of the engine's network, whole and in float32 on the CPU; a collective.

    A rank that does not `keep` them takes part and gets an empty dict.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        full = safe_get_full_fp32_param(parameter)
        full = parameter.detach() if full is None else full
        if keep:
            weights[name] = full.to("cpu", torch.float32, copy=True)
    return weights


@torch.no_grad()
def copy_weights(engine: ZeroEngine, target: nn.Module) -> None:
    """The weights of a ZeRO-3 engine's network, whole, into `target` of the same shape; a
    collective."""
    from deepspeed.runtime.zero import GatheredParameters

    copies = dict(target.named_parameters())
    named = list(engine.module.named_parameters())
    for first in range(0, len(named), _GATHERED):
        some = named[first : first + _GATHERED]
        with GatheredParameters([parameter for _, parameter in some]):
            for name, parameter in some:
                copies[name].copy_(parameter)
