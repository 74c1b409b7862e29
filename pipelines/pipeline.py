"""From pairs to a registered model: the stages in order, finished ones not run again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pipelines.config.load import to_plain, to_yaml
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages import preflight
from pipelines.stages.chain import Chain
from pipelines.stages.data import pairs
from pipelines.stages.encode import encode
from pipelines.stages.evaluate import evaluate
from pipelines.stages.progress import StageView
from pipelines.stages.register import PipelineResult, register
from pipelines.stages.runner import StageRunner, locked
from pipelines.stages.start import start
from pipelines.stages.train import train
from pipelines.tracking.outbox import Outbox


def run_pipeline(
    config: PipelineConfig,
    view: StageView,
    *,
    then: Callable[[StageRunner, PipelineResult], None] | None = None,
) -> PipelineResult:
    """Run every stage of `config` that is not finished, and then what the caller adds.

    Raises ValueError for what the user can mend, before anything starts wherever that can be known.
    """
    source = preflight.check(config)
    output = Path(config.output).absolute()
    tracking = config.tracking
    assert tracking.uri is not None
    with ExitStack() as resources:
        resources.enter_context(locked(output))
        (output / "config.yaml").write_text(to_yaml(config))
        outbox = Outbox(output, tracking.uri, tracking.experiment, view.warn)
        parent = resources.enter_context(outbox).start_pipeline(config.name, to_plain(config))
        parent.log_artifact(output / "config.yaml")
        runner = StageRunner(output, parent, view)
        shared = resources.enter_context(ExitStack())
        try:
            result = run_stages(Chain(config, output, runner, shared), source)
            shared.close()  # of this process's Rays there is one at a time
            if then:
                then(runner, result)
        except BaseException as error:
            parent.stop(error)
            raise
        parent.log_metrics(result.metrics)
        parent.finish()
        return result


def run_stages(chain: Chain, source: Path | None) -> PipelineResult:
    """`source` is the model directory that `model.start` names, if it names one."""
    training = pairs(chain, "train")
    heldout = pairs(chain, "heldout")
    new = start(chain, source)
    with_vae = train(chain, "vae", new, training)
    encoded = encode(chain, with_vae, training)
    foundation = train(chain, "foundation", with_vae, encoded)
    causal = train(chain, "causal", foundation, encoded)
    final = train(chain, "distill", causal, encoded, teacher=foundation)
    return register(chain, final, evaluate(chain, final, heldout))
