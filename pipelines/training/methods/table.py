"""The training methods by name: a new one is a `base.Stage` and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modeling.model_dir import Model
from modeling.tables import Table
from pipelines.training.methods.base import Setting, Stage
from pipelines.training.methods.causal import CausalTraining
from pipelines.training.methods.distill import DistillTraining
from pipelines.training.methods.foundation import FoundationTraining
from pipelines.training.methods.vae import VaeTraining
from pipelines.training.run_folder import TrainingError


@dataclass(frozen=True)
class Method:
    """`make(setting, model)` gets the model that the stage starts from."""

    make: Callable[[Setting, Model], Stage]
    transformer: bool = True  # whether that model must have one


METHODS = Table(
    "training method",
    {
        "vae": Method(VaeTraining, transformer=False),
        "foundation": Method(FoundationTraining),
        "causal": Method(CausalTraining),
        "distill": Method(DistillTraining),
    },
)


def build_stage(setting: Setting, model: Model) -> Stage:
    """The stage called `setting.stage`, with its own method or the one that its section names."""
    method = METHODS[setting.section.method or setting.stage]
    if method.transformer and model.transformer is None:
        raise TrainingError(
            f"stage {setting.stage} starts from {setting.job.start}, which holds no transformer; "
            "give a model directory with transformer.safetensors"
        )
    return method.make(setting, model)
