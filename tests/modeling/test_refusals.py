"""Every refusal, from one list of mistakes; what lies just inside each border is taken.

Those of model directories, importers and weight files are in `test_model_dir_refusals`,
`test_importers` and `test_checkpoint_files`, beside the files that they need.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from modeling.config import MaskCacheConfig, StreamConfig, TextConfig, TransformerConfig, VaeConfig
from modeling.diffusion.attention import bidirectional, chunk_causal, teacher_forcing
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.transformer import Transformer
from modeling.editor import StreamingEditor
from modeling.presets import PRESETS
from modeling.streaming.caches import mask_cache
from modeling.streaming.kv_cache import Cached, KVCache
from modeling.streaming.state import FORMAT_VERSION, StreamState
from modeling.text.build import build_text_encoder
from modeling.vae.build import build_vae
from tests.known_editors import CONFIG, known_editor, known_model

CPU = torch.device("cpu")
NETWORK = TransformerConfig(
    dim=24, ffn_dim=8, num_heads=2, num_layers=1, freq_dim=8, text_dim=8, text_tokens=4
)


def transformer(**changes: Any) -> TransformerConfig:
    return replace(NETWORK, **changes)


def stream(**changes: Any) -> StreamConfig:
    return replace(StreamConfig(height=64, width=96), **changes)


def cache(**changes: Any) -> KVCache:
    sizes = {"latent_height": 4, "latent_width": 6, "chunk_latents": 3, "window_latents": 9}
    return KVCache(NETWORK, batch=1, **(sizes | {"sink_latents": 3} | changes))


def see(frames: int = 3, rows: int = 2, columns: int = 3) -> Any:
    return Cached(cache()).begin(frames, rows, columns, 12, torch.device("cpu"))


def velocity(channels: int = 32, height: int = 4, width: int = 6, tokens: int = 4) -> Any:
    latents = torch.zeros(1, 3, channels, height, width)
    text = torch.zeros(1, tokens, 8)
    return Transformer(NETWORK)(latents, None, torch.zeros(1), text, bidirectional(3))


def encode(*shape: int) -> Any:
    return build_vae(VaeConfig("tiny", widths=(4,) * 4)).encode(torch.zeros(shape))


def opened(height: int = 32, width: int = 48) -> Any:
    return known_editor().open("red", height=height, width=width)


def push(*shape: int, dtype: Any = np.uint8) -> Any:
    return opened().push(np.zeros(shape, dtype))


def flushed_early() -> Any:
    editing = opened()
    editing.push(np.zeros((9, 32, 48, 3), np.uint8))  # nobody asks for the chunk
    return editing.flush()


def pushed_late() -> Any:
    editing = opened()
    editing.flush()
    return editing.push(np.zeros((1, 32, 48, 3), np.uint8))


def state(version: int | None = FORMAT_VERSION, **options: Any) -> bytes:
    """Of a stream with one chunk."""
    editing = known_editor(**options).open("red", height=32, width=48)
    list(editing.push(np.zeros((9, 32, 48, 3), np.uint8)))
    values = torch.load(io.BytesIO(editing.snapshot().to_bytes()), weights_only=True)
    values["format_version"] = version
    if version is None:
        del values["format_version"]
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return bytes(buffer.getvalue())


def restore(data: bytes, **options: Any) -> Any:
    """As of the same weights, which are drawn anew here, so that what lies behind is asked."""
    editor = known_editor(**options)
    return editor.restore(replace(StreamState.from_bytes(data), model=editor.identity))


def kv_of(chunks: int = 1, **changes: Any) -> Any:
    """The state of a cache of so many chunks and `changes`, in a cache without."""
    other = cache(**changes)
    for _ in range(chunks):
        other.commit()
    return cache().load_state_dict(other.state_dict())


def with_config(**changes: Any) -> Any:
    return replace(CONFIG, **changes)


def half_an_editor(part: str) -> Any:
    return StreamingEditor(replace(known_model(), **{part: None}), mask_cache=None)


# What was done wrong, and what the error must say.
MISTAKES: list[tuple[Callable[[], Any], str]] = [
    # sizes of networks
    *(
        (lambda name=name: transformer(**{name: 0}), rf"transformer\.{name} 0 is too small")
        for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_tokens")
    ),
    (lambda: transformer(dim=25), "dim 25 over num_heads 2 gives no even head size"),
    (lambda: transformer(dim=26), "dim 26 over num_heads 2 gives no even head size"),
    (lambda: VaeConfig("tiny", widths=(8, 8, 8)), r"vae\.widths \(8, 8, 8\) must be four"),
    (lambda: VaeConfig("tiny", widths=(8, 8, 8, 0)), r"vae\.widths \(8, 8, 8, 0\) must be four"),
    (lambda: VaeConfig("tiny", mean=(0.0,) * 15), r"vae\.mean has 15 values for 16"),
    (lambda: VaeConfig("wan", std=(1.0,) * 17), r"vae\.std has 17 values for 16"),
    *(
        (
            lambda sizes=sizes: VaeConfig("folded", *sizes),
            rf"vae\.widths .* and vae\.depths .*{sizes[2][-1]}\) of a folded VAE must be two",
        )
        for sizes in [
            (96, (8,), (2, 4, 5, 4)),
            (96, (8, 8), (2, 4, 5)),
            (96, (8, 0), (2, 4, 5, 4)),
            (96, (8, 8), (2, 4, 5, 0)),
        ]
    ),
    # the mask cache
    (lambda: MaskCacheConfig(threshold=0.0), r"mask_cache\.threshold 0\.0 must be above 0"),
    (lambda: MaskCacheConfig(dilate=-1), r"mask_cache\.dilate -1 0 or more"),
    *(
        (
            lambda name=name, scope=scope: MaskCacheConfig(name, scope=scope),
            rf"mask_cache\.scope {scope} does not fit policy {name}, .* set scope to block",
        )
        for name in ("follow", "settled")
        for scope in ("attention", "feedforward")
    ),
    (lambda: MaskCacheConfig(keep_ratio=0.0), r"keep_ratio 0\.0 is outside"),
    (lambda: MaskCacheConfig(keep_ratio=1.001), r"keep_ratio 1\.001 is outside"),
    (lambda: MaskCacheConfig(pruned_steps=(2, 0)), "holds step 0, which has nothing to reuse"),
    (
        lambda: stream(mask_cache=MaskCacheConfig(pruned_steps=(1, 4))),
        r"pruned_steps \(1, 4\) names a step beyond the 4",
    ),
    # streams
    *(
        (lambda name=name: stream(**{name: 0}), rf"stream\.{name} 0 is too small")
        for name in ("height", "width", "fps", "chunk_latents", "window_latents")
    ),
    (lambda: stream(sink_latents=-3), r"stream\.sink_latents -3 must be 0 or more"),
    (lambda: stream(shift=0.0), r"stream\.shift 0\.0 above 0"),
    (lambda: stream(window_latents=13), r"stream\.window_latents 13 .* must be multiples of"),
    (lambda: stream(sink_latents=4), r"stream\.sink_latents 4 must be multiples of"),
    (lambda: stream(window_latents=3), "window_latents 3 does not hold 3 sink .* raise it to 6"),
    (
        lambda: stream(window_latents=4, sink_latents=6, chunk_latents=2),
        "window_latents 4 does not hold 6 sink latents and a chunk of 2; raise it to 8 or lower",
    ),
    (lambda: stream(height=72), r"96x72 is not a multiple of 16 .* stream\.height=64 and .*=96"),
    (lambda: stream(width=90), r"90x64 is not a multiple of 16 .* stream\.width=96"),
    (lambda: stream(height=7), r"set stream\.height=16"),
    (lambda: stream(timesteps=()), "must fall from at most 1000 to at least 1"),
    (lambda: stream(timesteps=(500, 750)), "must fall from at most 1000 to at least 1"),
    (lambda: stream(timesteps=(1001, 500)), "must fall from at most 1000 to at least 1"),
    (lambda: stream(timesteps=(1000, 0)), "must fall from at most 1000 to at least 1"),
    # parts that do not fit each other
    (
        lambda: with_config(text=TextConfig("words", dim=64, tokens=24)),
        r"text\.dim 64 does not fit transformer\.text_dim 128;",
    ),
    (
        lambda: with_config(vae=VaeConfig("wan", latent_channels=8, mean=(0,) * 8, std=(1,) * 8)),
        r"vae\.latent_channels 8 does not fit transformer\.latent_channels 16",
    ),
    # noise levels
    (lambda: FlowSchedule(0.0), r"shift 0\.0 must be positive"),
    (lambda: FlowSchedule(5.0).warp((1000, 0)), "place 0 is outside 1..1000"),
    (lambda: FlowSchedule(5.0).warp((1001,)), "place 1001 is outside 1..1000"),
    # what tokens see
    (lambda: chunk_causal(7, 3), "7 latent frames cannot be cut into chunks of 3"),
    (lambda: teacher_forcing(6, 0), "6 latent frames cannot be cut into chunks of 0"),
    (
        lambda: bidirectional(3).begin(4, 2, 2, 12, torch.device("cpu")),
        "covers 3 frames, the input has 4",
    ),
    (lambda: cache(window_latents=10), "window of 10 latents with 3 sinks does not divide"),
    (lambda: cache(sink_latents=2), "window of 9 latents with 2 sinks does not divide"),
    (
        lambda: cache(sink_latents=12),
        "a window of 9 latents does not hold 12 sinks and a chunk of 3",
    ),
    (lambda: cache(sink_latents=9), "does not hold 9 sinks and a chunk of 3"),
    (lambda: see(frames=2), "2 latents of 2x3 tokens do not fit .* 3 latents of 2x3"),
    (lambda: see(rows=3), "3 latents of 3x3 tokens do not fit"),
    (lambda: see(columns=2), "3 latents of 2x2 tokens do not fit"),
    (lambda: kv_of(window_latents=12, latent_height=6), r"a KV state of shape \(1, 1, 27,"),
    (lambda: kv_of(latent_width=12, latent_height=12), "does not fit a cache of"),
    (lambda: kv_of(4, window_latents=15), r"a KV state of shape \(1, 1, 72, .* does not fit"),
    (lambda: kv_of(sink_latents=0), "with sinks of .* does not fit a cache of"),
    (lambda: kv_of(window_positions=False), "with sinks of .* does not fit a cache of"),
    # networks' inputs
    (lambda: velocity(channels=16), "takes 32 channels .* got 16"),
    (lambda: velocity(height=5), "latent size 5x6 must be even"),
    (lambda: velocity(width=7), "latent size 4x7 must be even"),
    (lambda: velocity(tokens=5), r"shape \(1, 5, 8\) do not fit \[batch, up to 4, 8\]"),
    (lambda: Transformer(NETWORK).prepare_text(torch.zeros(1, 4, 9)), "up to 4, 8"),
    (lambda: Transformer(NETWORK).prepare_text(torch.zeros(4, 8)), "up to 4, 8"),
    (lambda: encode(1, 5, 3, 20, 24), "pixels of 24x20 cannot be encoded"),
    (lambda: encode(1, 5, 3, 16, 20), "pixels of 20x16 cannot be encoded"),
    (lambda: encode(1, 5, 4, 16, 24), r"must be \[batch, frames, 3, .* got \[1, 5, 4"),
    (lambda: encode(5, 3, 16, 24), r"pixels must be \[batch, frames, 3"),
    (
        lambda: build_vae(VaeConfig("tiny")).decode_raw(torch.zeros(1, 1, 3, 2, 2)),
        r"latents must be \[batch, frames, 16",
    ),
    # editors and their streams
    (lambda: half_an_editor("transformer"), r"no transformer\.safetensors, so it cannot edit"),
    (lambda: half_an_editor("vae"), r"no vae\.safetensors, so it cannot edit"),
    (
        lambda: StreamingEditor(known_model(), mask_cache=None, fp8=True),
        "fp8 needs a GPU, the model is on cpu",
    ),
    (lambda: StreamingEditor.load("demo", fp8=True), "fp8 needs a GPU, the model is on cpu"),
    (lambda: opened(height=15), "frames of 48x15 are too small"),
    (lambda: opened(width=15), "frames of 15x32 are too small"),
    (lambda: push(1, 48, 32, 3), r"shape \(1, 48, 32, 3\) do not fit .* uint8 \[n, 32, 48, 3\]"),
    (lambda: push(1, 32, 48, 4), r"shape \(1, 32, 48, 4\) do not fit"),
    (lambda: push(32, 48, 3), r"shape \(32, 48, 3\) do not fit"),
    (lambda: push(1, 32, 48, 3, dtype=np.float32), r"type torch\.float32 .* do not fit"),
    (lambda: push(1, 32, 48, 3, dtype=np.int8), r"type torch\.int8 .* do not fit"),
    (flushed_early, r"complete chunks are waiting; exhaust push\(\) before flush"),
    (pushed_late, "the stream was flushed and takes no more frames"),
    # states
    (lambda: StreamState.from_bytes(b""), "no stream state in 0 bytes"),
    (lambda: StreamState.from_bytes(b"nonsense"), "no stream state in 8 bytes"),
    (lambda: StreamState.from_bytes(state()[:-100]), "no stream state in"),
    (lambda: restore(state(FORMAT_VERSION + 1)), "stream state has format 7, this version reads 6"),
    (lambda: restore(state(FORMAT_VERSION - 1)), "stream state has format 5, this version reads 6"),
    (lambda: restore(state(None)), "stream state has format None"),
    (lambda: restore(state(), sink_latents=0), "restore it with the model and size it was made"),
    (
        lambda: known_editor().restore(
            replace(StreamState.from_bytes(state()), model="", latents="x")
        ),
        r"edited by another model than .* \(fingerprint none, here \w{12}\); open a new stream",
    ),
    # choices by name
    (lambda: PRESETS["x"], "unknown preset 'x'"),
    (lambda: build_vae(VaeConfig("x")), "unknown VAE 'x'; there are folded, tiny, wan"),
    (
        lambda: build_text_encoder(TextConfig("x", dim=8, tokens=4)),
        "unknown text encoder 'x'; there are umt5, words",
    ),
    (
        lambda: mask_cache(MaskCacheConfig("x"), Transformer(NETWORK), stream(), (64, 96), CPU),
        "unknown mask-cache policy 'x'; there are budget, follow, published, settled",
    ),
    (
        lambda: StreamingEditor(known_model(), mask_cache=MaskCacheConfig("x")),
        "unknown mask-cache policy 'x'",
    ),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_refused(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_another_object_is_no_state() -> None:
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    with pytest.raises(ValueError, match="stream state has format None"):
        StreamState.from_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    "right",
    [
        lambda: transformer(dim=4, ffn_dim=1, num_heads=1, num_layers=1, text_dim=1, text_tokens=1),
        lambda: VaeConfig("tiny", widths=(1, 1, 1, 1)),
        lambda: VaeConfig("folded", widths=(1, 1), depths=(1, 1, 1, 1)),
        lambda: MaskCacheConfig("settled", threshold=1e-9, dilate=0, scope="block"),
        lambda: MaskCacheConfig("follow", scope="block"),
        lambda: MaskCacheConfig("published", scope="feedforward"),
        lambda: MaskCacheConfig(keep_ratio=1.0),
        lambda: MaskCacheConfig(keep_ratio=1e-9),
        lambda: stream(mask_cache=MaskCacheConfig(pruned_steps=(1, 3))),
        lambda: stream(mask_cache=MaskCacheConfig(pruned_steps=())),
        lambda: stream(
            height=16, width=16, fps=1, chunk_latents=1, window_latents=1, sink_latents=0
        ),
        lambda: stream(window_latents=6),
        lambda: stream(sink_latents=0, window_latents=3, shift=0.01),
        lambda: stream(timesteps=(1000, 1)),
        lambda: stream(timesteps=(1,)),
        lambda: FlowSchedule(0.1).warp((1000, 1)),
        lambda: chunk_causal(3, 3),
        lambda: cache(window_latents=6),
        lambda: see(),
        lambda: velocity(),
        lambda: kv_of(window_latents=9),
        lambda: kv_of(3, window_latents=12),
        lambda: encode(1, 1, 3, 8, 8),
        lambda: opened(height=16, width=16),
        lambda: list(push(0, 32, 48, 3)),
        lambda: restore(state()),
    ],
)
def test_the_border_itself_is_taken(right: Callable[[], Any]) -> None:
    right()


@pytest.mark.parametrize(
    ("steps", "pruned"), [(1, ()), (2, (1,)), (3, (1, 2)), (4, (1, 2)), (6, (1, 2))]
)
def test_the_usual_mask_cache_prunes_only_steps_that_there_are(
    steps: int, pruned: tuple[int, ...]
) -> None:
    stream = StreamConfig(32, 48, timesteps=tuple(range(1000, 1000 - steps, -1)))
    assert stream.usual_mask_cache == MaskCacheConfig(pruned_steps=pruned)
    assert replace(stream, mask_cache=stream.usual_mask_cache)  # or it would be refused
    own = MaskCacheConfig(keep_ratio=0.7, pruned_steps=())
    assert replace(stream, mask_cache=own).usual_mask_cache == own
