"""What the variants of a model are judged on: LiveEdit-Bench, or a dataset of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from data.manifest import read_dataset_info
from modeling.editor import StreamingEditor
from pipelines.config.ablation import Variant
from pipelines.config.benchmark import BenchConfig
from pipelines.config.pipeline import EvaluateConfig
from pipelines.evaluation.bench.intervals import summarise, with_success
from pipelines.evaluation.bench.run import chosen, run
from pipelines.evaluation.bench.systems import OurModel
from pipelines.evaluation.evaluate import evaluate


class Judge(Protocol):
    @property
    def clips(self) -> int:
        """How many clips a variant is judged on."""

    @property
    def resamples(self) -> int:
        """Of the bootstrap."""

    def judge(
        self, editor: StreamingEditor, variant: Variant, on_clip: Callable[[], None]
    ) -> dict[str, Any]:
        """A report with `clips` (rows with a `name`), `overall`, `kinds`, `settings`, `made`."""


@dataclass(frozen=True)
class Bench:
    """LiveEdit-Bench."""

    config: BenchConfig

    @property
    def clips(self) -> int:
        return len(chosen(self.config))

    @property
    def resamples(self) -> int:
        return self.config.resamples

    def judge(
        self, editor: StreamingEditor, variant: Variant, on_clip: Callable[[], None]
    ) -> dict[str, Any]:
        config = self.config
        system = OurModel(
            editor,
            variant.get("seed", config.seed),
            variant.get("work_size", config.work_size),
            variant.get("detail", config.detail),
        )
        return run(system, config, on_clip=lambda judged: on_clip())


@dataclass(frozen=True)
class Pairs:
    """The pairs of a dataset, at their own size and without detail if a variant says no other."""

    dataset: str
    config: EvaluateConfig

    @property
    def clips(self) -> int:
        samples = read_dataset_info(self.dataset).samples
        return min(self.config.clips or samples, samples)

    @property
    def resamples(self) -> int:
        return BenchConfig.resamples

    def judge(
        self, editor: StreamingEditor, variant: Variant, on_clip: Callable[[], None]
    ) -> dict[str, Any]:
        config = replace(self.config, seed=variant.get("seed", self.config.seed))
        report = evaluate(
            editor,
            self.dataset,
            config,
            on_clip=lambda clip: on_clip(),
            work_size=variant.get("work_size", "full"),
            detail="source" if variant.get("detail") else "off",
        )
        rows = [
            with_success({"name": str(n), "kind": "pair", **row}, config.success_db, 0)
            for n, row in enumerate(report["clips"])
        ]
        return {
            "clips": rows,
            "overall": {"pairs": summarise(rows, self.resamples)},
            "kinds": {},
            "settings": report["settings"],
            "made": f"{len(rows)} pairs of {self.dataset} ({report['dataset_hash'][:12]})",
        }
