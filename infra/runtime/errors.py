"""Errors that whoever runs this can mend.

UserError
├── ClusterError            infra.runtime.ray: Ray cannot be started or reached
├── RegistryError           infra.runtime.registry: no such name, version or alias
├── DatasetError            data.store: cannot be read or written
├── FootageError            data.footage.material: photos and clips that make no pairs
├── PairListError           data.pairs: a list of pairs that cannot be ingested
├── VideoError              data.video.errors: cannot be read or written
├── FingerprintError        modeling.fingerprint: not the model that was meant
├── ModelError              modeling.model_dir: no model directory, or one that does not fit
├── WeightsError            modeling.importing.checkpoint_files: weights of no model of ours
├── ConfigError             pipelines.config.merge: a key, value or combination that cannot run
├── GateMissedError         pipelines.stages.running.gate: a stage not good enough to go on from
├── TrackingError           pipelines.tracking.tracker: MLflow cannot be used
├── TrainingError           pipelines.training.run_folder: would fail again in the same way
├── CheckpointError         pipelines.training.checkpoint: cannot be written or gone on from
├── StartError              serve.run: the application did not start
└── WireError               serve.wire.protocol: what a server refuses, with a code

Their message names the thing, the value and the remedy. They alone become one line on the command
line, and they alone keep a training from being restarted: any other error is a bug of ours, shows
where it was raised, and is tried again.
"""

from __future__ import annotations


class UserError(ValueError):
    """See above; itself raised where no kind of its own is worth a name."""
