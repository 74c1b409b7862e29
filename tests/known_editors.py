"""Editors whose answer is known: real models, with weights set by hand.

    editor = known_editor()                       # a StreamingEditor; or
    path = write_known_model(tmp_path / "known")  # a model directory for everything that loads one
    source = block_clip(45, 64, 96)
    ...                                           # edit `source` by any door, with any seed
    assert_edited(edited, source, "paint it red")

One model does two things, by its prompt:

- no word of `PAINTS` in it: nothing changes. The output is the source at the detail of the VAE,
  which keeps the mean colour of every 8 x 8 block of every frame: right in colour, place and time.
- words of `PAINTS` ("red", "green", "blue"): each adds its colour to what is light. A token, 16 x
  16 pixels of one latent (a stream's first frame, four frames after), is light if its mean is above
  mid-grey.

Noise, seed, history and mask cache make no difference to it, so what differs from `expected_edit`
was lost on the way: a wrong prompt, a frame twice, an image turned, shifted or of other colours.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from modeling.config import (
    MaskCacheConfig,
    ModelConfig,
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
)
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.transformer import Block, Transformer
from modeling.editor import StreamingEditor
from modeling.model_dir import Model, save_model
from modeling.text.words import word_vector
from modeling.vae.tiny import MemoryBlock, TimeGrow, TimePool, TinyVae, UpsampleConv

UNCHANGED = "leave it as it is"
PAINTS = {"red": (60, 0, 0), "green": (0, 60, 0), "blue": (0, 0, 60)}  # levels added
Paints = Mapping[str, tuple[int, int, int]]
TURNED: Paints = {"red": PAINTS["blue"], "green": PAINTS["red"], "blue": PAINTS["green"]}
TOLERANCE = 1  # levels of 255: rounding, and weights in float32
BLOCK, TOKEN, GROUP = 8, 16, 4  # pixels, pixels, frames

_CHANNELS = 16  # of a latent: 12 hold (frame, colour), 4 hold nothing
_USED = 3 * GROUP
_VALUES = 4 * _CHANNELS  # of a token
_LARGE = 1000.0  # what a token's norm is made of, so that the norm hardly depends on the token
_RAW = 0.2  # a VAE's latents stay so small that its SoftClamp hardly bends them
_STD = 0.06  # of the raw latents, so that the standardised ones are as large as the noise

CONFIG = ModelConfig(
    transformer=TransformerConfig(
        dim=132, ffn_dim=8, num_heads=3, num_layers=1, freq_dim=32, text_dim=128, text_tokens=24
    ),
    vae=VaeConfig(kind="tiny", widths=(16,) * 4, mean=(0.0,) * _CHANNELS, std=(_STD,) * _CHANNELS),
    text=TextConfig(kind="words", dim=128, tokens=24),
    stream=StreamConfig(height=64, width=96, mask_cache=MaskCacheConfig()),
)


def known_editor(**stream: Any) -> StreamingEditor:
    """The editor itself; `stream` are fields of `StreamConfig` that differ from `CONFIG`'s."""
    model = known_model(**stream)
    return StreamingEditor(model, mask_cache=model.config.stream.mask_cache)


def write_known_model(
    path: Path, *, name: str = "known", paints: Paints = PAINTS, **stream: Any
) -> Path:
    """A model directory at `path`, for what loads one; its card says `name`. With `paints` of its
    own a version is told by the picture: of `TURNED`, "red" gives what "blue" gives elsewhere."""
    model = known_model(paints=paints, **stream)
    return save_model(
        path, model.config, transformer=model.transformer, vae=model.vae, card={"name": name}
    )


def known_model(*, paints: Paints = PAINTS, **stream: Any) -> Model:
    config = replace(CONFIG, stream=replace(CONFIG.stream, **stream))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer, vae = Transformer(config.transformer), TinyVae(config.vae)
    with torch.no_grad():
        _keep_blocks(vae)
        _return_source(transformer, config.stream)
        _paint_what_is_light(transformer, paints)
    for module in (transformer, vae):
        module.eval().requires_grad_(False)
    return Model(config, transformer, vae, {"name": "known"}, None)


def expected_edit(source: np.ndarray, prompt: str) -> np.ndarray:
    """What the editor makes of a whole clip, uint8 [n, height, width, 3]."""
    frames, height, width, _ = source.shape
    padding = ((0, -(frames - 1) % GROUP), (0, -height % TOKEN), (0, -width % TOKEN), (0, 0))
    padded = np.pad(source, padding, mode="edge").astype(np.float64)
    blocks = _means(padded, BLOCK)
    # The first frame is a latent of its own, as if it had come four times.
    tokens = _means(np.concatenate([padded[:1]] * (GROUP - 1) + [padded]), TOKEN)
    tokens = tokens.reshape(-1, GROUP, *tokens.shape[1:]).mean(axis=(1, 4))
    light = tokens.repeat(GROUP, 0)[GROUP - 1 :].repeat(2, 1).repeat(2, 2) > 127.5
    words = {word.strip(string.punctuation) for word in prompt.lower().split()}
    paint = np.sum([PAINTS[word] for word in words & PAINTS.keys()] or [(0, 0, 0)], axis=0)
    edited = (blocks + light[..., None] * paint).clip(0, 255).round().astype(np.uint8)
    return edited.repeat(BLOCK, 1).repeat(BLOCK, 2)[:frames, :height, :width]


def assert_edited(edited: np.ndarray, source: np.ndarray, prompt: str, within: int = 0) -> None:
    """`edited` is what the editor makes of `source`; `within` are levels that a codec may cost."""
    wanted = expected_edit(source, prompt)
    assert edited.shape == wanted.shape
    error = np.abs(edited.astype(int) - wanted).max(axis=(1, 2, 3))
    assert error.max() <= TOLERANCE + within, f"levels off, by frame: {error.tolist()}"


def block_clip(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A clip that loses nothing in the VAE, uint8 [frames, height, width, 3].

    Every block of every frame has a colour of its own; about half of the tokens are light, others
    in every latent. `height` and `width` may be any.
    """
    draw = np.random.default_rng(seed)
    rows, columns = -(-height // TOKEN), -(-width // TOKEN)
    latents = 1 + -(-(frames - 1) // GROUP)
    light = draw.integers(0, 2, (latents, rows, columns, 1)).repeat(GROUP, 0)[GROUP - 1 :]
    colours = draw.integers(-45, 46, (len(light), 2 * rows, 2 * columns, 3))
    blocks = 75 + 80 * light.repeat(2, 1).repeat(2, 2) + colours
    pixels = blocks.astype(np.uint8).repeat(BLOCK, 1).repeat(BLOCK, 2)
    return pixels[:frames, :height, :width]


def _means(frames: np.ndarray, size: int) -> np.ndarray:
    n, height, width, colours = frames.shape
    cells = frames.reshape(n, height // size, size, width // size, size, colours)
    return cells.mean(axis=(2, 4))


def _keep_blocks(vae: TinyVae) -> None:
    """Latent channel 3 * frame + colour is the mean of the block in that frame of the group."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    carried, first = range(_USED), range(3)
    halving = torch.zeros(3, 3)
    halving[1:, 1:] = 0.25  # with padding 1 and stride 2: the four pixels of a square
    centre = torch.eye(9)[4].view(3, 3)
    encoder, decoder = list(vae.encoder), list(vae.decoder)
    kept = 3  # channels of a frame so far
    for layer, following in zip(encoder, [*encoder[1:], None], strict=True):
        if isinstance(layer, TimePool):
            width = layer.conv.weight.shape[0]
            for frame in range(layer.stride):
                for channel in range(kept):
                    layer.conv.weight[frame * kept + channel, frame * width + channel] = 1
            kept *= layer.stride
        elif isinstance(layer, nn.Conv2d) and isinstance(following, MemoryBlock):
            _carry(layer, carried, halving)
    _carry(encoder[0], first, centre)
    _carry(encoder[-1], carried, _RAW * centre)
    cast(Tensor, encoder[-1].bias)[:_USED] = -0.5 * _RAW
    for layer in decoder:
        if isinstance(layer, TimeGrow):
            width = layer.conv.weight.shape[0] // layer.stride
            kept //= layer.stride
            for frame in range(layer.stride):
                for channel in range(kept):
                    layer.conv.weight[frame * width + channel, frame * kept + channel] = 1
        elif isinstance(layer, UpsampleConv):
            _carry(layer, carried, centre)
    _carry(decoder[1], carried, centre / _RAW)
    cast(Tensor, decoder[1].bias)[:_USED] = 0.5
    _carry(decoder[-1], first, centre)


def _carry(layer: nn.Module, channels: range, kernel: Tensor) -> None:
    for channel in channels:
        cast(nn.Conv2d, layer).weight[channel, channel] = kernel


def _return_source(transformer: Transformer, stream: StreamConfig) -> None:
    """Let the velocity be (noisy - source) / sigma at every step of `stream`.

    The head's norm divides by a token's size; two dimensions that are large in every token make
    that a constant, and its mean falls out of a difference. Blocks add nothing.
    """
    config = transformer.config
    for name, weight in transformer.named_parameters():
        if "norm" not in name and "time_embedding" not in name:
            weight.zero_()
    identity = torch.eye(_VALUES)
    embed = transformer.patch_embedding.weight.flatten(1)  # [dim, (channel, row, column)]
    embed[:_VALUES, :_VALUES] = identity
    embed[_VALUES : 2 * _VALUES, _VALUES:] = identity
    cast(Tensor, transformer.patch_embedding.bias)[-2:] = torch.tensor([_LARGE, -_LARGE])
    order = identity.view(_CHANNELS, 4, _VALUES).transpose(0, 1).flatten(0, 1)  # the head's
    size = _LARGE * (2 / config.dim) ** 0.5
    transformer.head.head.weight[:, :_VALUES] = order * size
    transformer.head.head.weight[:, _VALUES : 2 * _VALUES] = -order * size
    # The head multiplies by 1 + time: let time be 1 / sigma - 1.
    flow = FlowSchedule(stream.shift)
    timesteps = flow.warp(stream.timesteps)
    into, _, out = transformer.time_embedding
    assert isinstance(into, nn.Linear)
    assert isinstance(out, nn.Linear)
    nn.init.normal_(into.weight)
    out.weight.copy_(torch.eye(config.dim))
    cast(Tensor, out.bias).zero_()
    features = transformer.embed_time(timesteps)[:, 0].double()  # [steps, dim]
    fitted = torch.linalg.pinv(features) @ (1 / flow.sigma(timesteps).double() - 1)
    out.weight.copy_(fitted.float().expand(config.dim, -1))


def _paint_what_is_light(transformer: Transformer, paints: Paints) -> None:
    """Cross-attention with a head for each colour, whose key is its word.

    A light token's query points to the word, a dark one's to all that is not the word and has no
    value.
    """
    config = transformer.config
    into, _, out = transformer.text_embedding
    block = transformer.blocks[0]
    assert isinstance(into, nn.Linear)
    assert isinstance(out, nn.Linear)
    assert isinstance(block, Block)
    attn, steep, low, high = block.cross_attn, 200.0, 0.55, 0.65
    source = torch.zeros(_CHANNELS, 4, dtype=torch.bool)
    source[:_USED] = True
    (light,) = (source.flatten().nonzero() + _VALUES).T
    attn.norm_q.weight.fill_(4)
    for head, (word, colour) in enumerate(paints.items()):
        vector = word_vector(word, config.text_dim)
        for unit, threshold in ((2 * head, low), (2 * head + 1, high)):  # a step from 0 to 1
            into.weight[unit] = steep * vector / vector.square().sum()
            cast(Tensor, into.bias)[unit] = -steep * threshold
        out.weight[head, 2 * head : 2 * head + 2] = torch.tensor([1, -1]) / (steep * (high - low))
        place = head * config.head_dim
        attn.q.weight[place, light] = 1
        attn.q.weight[place, -2:] = -len(light) / 2  # takes out the mean of the norm
        attn.k.weight[place, head], cast(Tensor, attn.k.bias)[place] = 2, -1
        attn.v.weight[place, head] = 1
        for channel in range(_USED):
            dims = slice(_VALUES + 4 * channel, _VALUES + 4 * channel + 4)
            attn.o.weight[dims, place] = colour[channel % 3] / 255 * _RAW / _STD
