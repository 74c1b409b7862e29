"""From pairs to a registered model: the stages in order, finished ones not run again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from pipelines.config.load import to_plain, to_yaml
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages import preflight
from pipelines.stages.chain import Chain
from pipelines.stages.data import pairs
from pipelines.stages.encode import encode
from pipelines.stages.evaluate import evaluate
from pipelines.stages.register import PipelineResult, register
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.plan import Planned, Planner
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import EVERYTHING, Enough, StageRunner, locked
from pipelines.stages.start import start, teacher_source
from pipelines.stages.train import train
from pipelines.tracking.outbox import Outbox, Run


def run_pipeline(
    config: PipelineConfig,
    view: StageView,
    *,
    choice: Choice = EVERYTHING,
    then: Callable[[StageRunner, PipelineResult], None] | None = None,
) -> PipelineResult | None:
    """Run every stage of `choice` that is not finished, and then what the caller adds.

    None if `choice` ends before the last stage. Raises UserError for what the user can mend,
    before anything starts wherever that can be known, and GateMissedError.
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
        runner = StageRunner(output, parent, view, choice)
        result = None
        shared = resources.enter_context(ExitStack())
        try:
            with suppress(Enough):
                result = run_stages(Chain(config, output, runner, shared), source)
            shared.close()  # of this process's Rays there is one at a time
            if then and result:
                then(runner, result)
        except BaseException as error:
            parent.stop(error)
            raise
        if result:
            parent.log_metrics(result.metrics)
        parent.finish()
        return result


def plan_pipeline(
    config: PipelineConfig, view: StageView, choice: Choice, card: str | None = None
) -> list[Planned]:
    """What `run_pipeline` would do now, stage by stage, on GPUs called `card`; see
    `pipelines.stages.running.plan`."""
    source = preflight.check(config, writes=False)
    output, tracking = Path(config.output).absolute(), config.tracking
    assert tracking.uri is not None
    nobody = Run(Outbox(output, tracking.uri, tracking.experiment, view.warn), "")
    planner = Planner(config, output, nobody, view, choice, card)
    with suppress(Enough), ExitStack() as resources:
        run_stages(Chain(config, output, planner, resources), source)
    return planner.lines


def run_stages(chain: Chain, source: Path | None) -> PipelineResult:
    """`source` is the model directory that `model.start` names, if it names one."""
    training = pairs(chain, "train")
    heldout = pairs(chain, "heldout")
    new = start(chain, source)
    with_vae = train(chain, "vae", new, training, heldout)
    encoded = encode(chain, with_vae, training)
    foundation = train(chain, "foundation", with_vae, encoded, heldout)
    causal = train(chain, "causal", foundation, encoded, heldout)
    teacher = teacher_source(chain.config) or foundation
    final = train(chain, "distill", causal, encoded, heldout, teacher=teacher)
    return register(chain, final, heldout, evaluate(chain, final, heldout))
