"""The cases of `test_options_arrive` of what measures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from data.sample import Pair
from modeling.config import StreamConfig
from pipelines.bench.sharpness.guides import Guides
from pipelines.bench.simulation.day import VARIANTS
from pipelines.bench.subject import BenchOptions
from serve.admission.admission import Sizes
from serve.client.cameras import CameraLoad
from tests.pipelines.commands.calls import Case

STREAM, STORED = "pipelines.bench.stream.measure", "pipelines.bench.check.read_report"
TRAIN, KILLS = "pipelines.bench.train.measure", "pipelines.bench.kills.measure"
CAMERAS, KILLER = "serve.client.cameras.measure", "pipelines.bench.serve.killer"
SERVED = "pipelines.commands.serve.application"
SIMULATE = "pipelines.bench.simulation.world.simulate"
MODEL = {"width": 32, "height": 16, "fps": 12.0, "work_size": "full", "device": "cpu"}
THERE = {"serve.client.served_model": MODEL}
URL = "bench serve --url ws://h:1 --sessions 3"
PAIR = Pair(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8),
            np.zeros((1, 8, 8), bool), "x", 16.0)  # fmt: skip
SHARP = "pipelines.bench.sharpness"
PAIRS, COMPARE = f"{SHARP}.detail.pairs_by_kind", f"{SHARP}.detail.compare"
DETAIL = "bench detail f --kinds night,add --size 64x48 --frames 3"
PREPARED = {"data.footage.material.prepare": {"heldout": "held"}}
SHOWN = PREPARED | {
    PAIRS: [("night", PAIR)],
    COMPARE: {},
    "pipelines.bench.sharpness.detail.table": "",
}
LOADED, GUIDES = "modeling.model_dir.load_model", f"{SHARP}.guides.compare_guides"
VAE = SimpleNamespace(vae="vae", config=SimpleNamespace(stream=StreamConfig(height=16, width=32)))
SAME = {way: {"psnr": 50.0} for way in ("decoded", "blurred", "nothing edited, blurred")}
BLURRED = Guides(0.5, 40.0, {"night": SAME})
DAY = {"cost_s": 0.1, "chunk_frames": 12, "sizes": Sizes((16, 32), (16, 32)), "start_s": 1.0,
       "load_s": 2.0, "rungs": {}}  # fmt: skip
MEASURED = {STORED: {}, "pipelines.bench.simulation.day.measured": DAY}


SERVES = {SERVED: nullcontext(SimpleNamespace(stream_url="ws://here:1", models=lambda: [MODEL]))}


def options(**given: Any) -> dict[str, Any]:
    usual = {"model": "demo", "device": "cpu", "chunks": 8, "sessions": 8}
    return {"options": BenchOptions(**usual | given)}


def load(**given: Any) -> dict[str, Any]:
    usual = {"width": 32, "height": 16, "fps": 12.0}
    return {"load": CameraLoad(**usual | given)}


REPORT = SimpleNamespace(to_dict=dict)  # of cameras
BENCH = (
    Case("bench stream demo --size 64x48 --work-size 1/2 --detail off --vae tiny --chunks 3 "
         "--keep 0.4 --policy published --scope block --pruned-steps 1,2 --sessions 2 "
         "--device cpu --guide 0.5", STREAM,
         {"stored": None} | options(
             size=(48, 64), work_size="1/2", detail="off", vae="tiny", chunks=3, keep_ratio=0.4,
             policy="published", scope="block", pruned_steps=(1, 2), sessions=2, guide_blur=0.5)),
    Case("bench stream", STREAM, options()),
    Case("bench stream m --work-size 1/2 --no-cache", STREAM,
         options(model="m", work_size="1/2", detail="source", no_cache=True)),
    Case("bench stream --fp8", STREAM, options(fp8=True)),
    Case("bench stream --check s.json", STREAM, {"stored": {"a": 1}}, {STORED: {"a": 1}}),
    Case("bench stream --json a.json --plot b.png",
         "pipelines.commands.measure.stream.check_folders",
         {"files": (Path("a.json"), Path("b.png"))}),
    Case("bench train demo --stages causal,distill --gpus 2,4 --zero 1,3 --steps 7 vae.steps=3",
         TRAIN,
         {"options.stages": ("causal", "distill"), "options.workers": (2, 4),
          "options.zero": (1, 3), "options.steps": 7, "options.config.vae.steps": 3}),
    Case("bench train --json a.json", "pipelines.commands.measure.train.check_folders",
         {"files": (Path("a.json"),)}),
    Case("bench train", TRAIN,
         {"options.stages": ("foundation", "causal", "distill"), "options.workers": (1,),
          "options.zero": (2,), "options.steps": 5}),
    Case("bench train --check s.json", STORED, {"path": Path("s.json")}),
    Case("bench train demo --kills 2 --seed 5 --signals kill,term --stages causal --gpus 3 "
         "--steps 40", KILLS,
         {"kills": 2, "seed": 5, "signals": ("kill", "term"), "stage": "causal", "workers": 3,
          "steps": 40}),
    Case("bench train --kills 2", KILLS,
         {"kills": 2, "seed": 0, "signals": ("kill",), "stage": "distill", "workers": 2,
          "steps": None}),
    Case(f"{URL} --token t", "serve.client.served_model", {"url": "ws://h:1", "token": "t"}),
    Case(f"{URL} --token t --seconds 7 --size 64x48 --work-size 1/2 --detail off --fps 8 "
         "--mode lossless --format png --queue", CAMERAS,
         {"url": "ws://h:1", "sessions": 3, "attacks": ()} | load(
             width=64, height=48, work_size="1/2", detail="off", fps=8.0, mode="lossless",
             format="png", queue=True, seconds=7.0, token="t"), THERE),
    Case(f"{URL}", CAMERAS, load(), THERE),
    Case(f"{URL} --json a.json", "pipelines.commands.measure.serve.check_folders",
         {"files": (Path("a.json"),)}),
    Case(f"{URL} --attack all", "pipelines.bench.serve.parse_attacks", {"text": "all"}),
    Case("bench serve --soak 90s", "pipelines.bench.soak.seconds_of", {"text": "90s"}),
    Case("bench serve fronts=3", SERVED, {"settings.fronts": 3, "settings.min_editors": 1}),
    Case("bench serve --kills 2", SERVED,  # of which one is always left
         {"settings.fronts": 2, "settings.min_editors": 2, "settings.max_editors": 2}),
    Case("bench serve --kills 2 max_editors=5", SERVED,
         {"settings.fronts": 2, "settings.min_editors": 2, "settings.max_editors": 5}),
    Case("bench serve --sessions 1 --kills 2", KILLER, {"kills": 2, "kinds": None},
         SERVES | {CAMERAS: REPORT}),
    Case("bench serve --sessions 1 --kills 2 --chaos", KILLER, {"kills": 2, "kinds": "drawn"},
         SERVES | {CAMERAS: REPORT, "pipelines.bench.serve.at_random": "drawn"}),
    Case("bench serve --simulate r.json --hours 3 --cold 99 --ways ships --sessions 5 --kills 2 "
         "--fps 8 max_sessions=6", SIMULATE,
         {"day.sessions": 5, "day.hours": 3.0, "day.start_s": 99.0, "day.load_s": 2.0,
          "day.lost_machines": 2, "day.fps": 8.0, "day.max_sessions": 6,
          "variant": VARIANTS["ships"]}, MEASURED),
    Case("bench serve --simulate r.json --sessions 5", SIMULATE,
         {"day.hours": 24.0, "day.start_s": 1.0, "day.lost_machines": 0, "day.fps": 16.0},
         MEASURED),
    Case(DETAIL, PAIRS,
         {"footage": "held", "kinds": ("night", "add"), "height": 48, "width": 64, "frames": 3},
         PREPARED),
    Case(f"{DETAIL} --picture p.jpg", "pipelines.bench.sharpness.detail.save_picture",
         {"path": Path("p.jpg")}, SHOWN),
    Case(f"{DETAIL} --model m --device cpu", LOADED, {"path": Path("m"), "device": "cpu"}, SHOWN),
    Case(f"{DETAIL} --model m --work-size 32x16", GUIDES, {"vae": "vae", "work": (16, 32)},
         SHOWN | {LOADED: VAE}),
    Case(f"{DETAIL} --model m --write", "modeling.model_dir.set_guide",
         {"path": Path("m"), "blur": 0.5}, SHOWN | {LOADED: VAE, GUIDES: BLURRED}),
)  # fmt: skip
