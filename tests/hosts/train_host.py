"""Trains the foundation stage on the Ray at RAY_ADDRESS, a worker on each of two hosts.

START DATASET OUTPUT STEPS; prints a line for every report, and where it goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from infra.runtime.environment import variable
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.training.job import make_job
from pipelines.training.trainer import train_stage

start, dataset, output, steps = sys.argv[1:]
config = PipelineConfig(output=output)
config.compute = ComputeConfig(address=variable("RAY_ADDRESS"), workers=2)
config.foundation.steps, config.foundation.log_every = int(steps), 5
config.foundation.checkpoint_every = 10
job = make_job(
    "foundation", config, start=Path(start), dataset=dataset, output=Path(output) / "model"
)
train_stage(
    job,
    on_progress=lambda report: print(f"step {report.step} resumed {report.resumed}", flush=True),
    say=lambda text: print(text, flush=True),
)
print("trained", flush=True)
