"""What is chosen by the GPU that is there, of made-up ones; and what only some models ask of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.runtime.errors import UserError
from modeling.config import Scope, VaeConfig
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import Transformer
from modeling.gpu.accelerate import accelerate, fast_detail
from modeling.gpu.conv import CausalConvolution
from modeling.streaming.forward import PlainForward
from modeling.streaming.kv_cache import KVCache
from modeling.vae.build import build_vae
from modeling.vae.streaming import StreamTape
from modeling.vae.wan import ResidualBlock, WanVae
from tests.data.test_defaults import left_out
from tests.modeling.gpu.test_fused import SIZES, FusedForward

if torch.cuda.is_available():
    pytest.skip("a real one is asked: test_accelerate", allow_module_level=True)
pytest.importorskip("triton", reason="Triton exists for Linux only")

pytestmark = pytest.mark.usefixtures("no_gradients")


class Queries(SimpleNamespace):
    def __len__(self) -> int:
        return self.shape[0]


@pytest.mark.parametrize(
    ("queries", "heads", "keys", "processors", "parts"),
    [
        (4680, 12, 18720, 132, 2),  # 444 tiles are 4 rounds, or 7 of half the length
        (1404, 12, 18720, 132, 1),  # 132 are one
        (1409, 12, 18720, 132, 2),  # 144 are two, or three halves
        (4680, 12, 18720, 148, 1),  # 444 are just three
        (4680, 12, 18721, 132, 1),  # no halves
        (4680, 12, 4094, 132, 1),  # too short to be worth it
        (4680, 12, 4096, 132, 2),
        (128 * 19, 1, 18720, 2, 1),  # 10 rounds or 9.5: not worth it
        (128 * 17, 1, 18720, 2, 2),  # 9 or 8.5
    ],
)
def test_attention_is_halved_where_that_leaves_less_of_a_gpu_idle(
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    heads: int,
    keys: int,
    processors: int,
    parts: int,
) -> None:
    from modeling.gpu.transformer import splits

    about = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    q: Any = Queries(shape=(queries, heads, 128), is_cuda=True, device="cuda")
    k: Any = Queries(shape=(keys, heads, 128))
    assert splits(q, k) == parts
    q.is_cuda = False
    assert splits(q, k) == 1


def test_attention_in_two_halves_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernel, which gives each half and the logarithm of its softmax's denominator, done by
    hand."""
    from modeling.gpu import transformer

    def halved(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        lse = logits.logsumexp(dim=-1, keepdim=True)
        return (logits - lse).exp() @ v, lse, q

    q, k, v = torch.randn(3, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    wanted = transformer.attend(q, k, v)
    with monkeypatch.context() as given:
        given.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", halved)
        given.setattr(transformer, "splits", lambda q, k: 2)
        found = transformer.attend(q, k, v)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("channels", "about", "taken"),
    [
        ((96, 96), {}, True), ((96, 192), {}, True), ((192, 192), {}, True), ((96, 3), {}, True),
        ((192, 96), {}, False), ((96, 32), {}, False), ((384, 384), {}, False),
        ((96, 96), {"dtype": torch.float16}, True), ((96, 96), {"dtype": torch.float32}, False),
        ((96, 96), {"size": (1, 3, 3)}, False), ((96, 96), {"capability": (9, 1)}, False),
        ((96, 96), {"capability": (8, 9)}, False),
    ],
)  # fmt: skip
def test_what_our_convolution_is_for(
    monkeypatch: pytest.MonkeyPatch, channels: tuple[int, int], about: dict[str, Any], taken: bool
) -> None:
    capability = about.get("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype = about.get("dtype", torch.bfloat16)
    conv = nn.Conv3d(*channels, about.get("size", (3, 3, 3)), device="meta", dtype=dtype)
    assert CausalConvolution.takes(conv) is taken


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (7, 9)])
def test_eight_bits_need_a_gpu_that_multiplies_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A1")
    said = rf"fp8 needs .* 8\.9 \(Ada\) or newer, A1 has {capability[0]}\.{capability[1]}; leave it"
    nothing: Any = None
    with pytest.raises(UserError, match=said):
        accelerate(nothing, nothing, fp8=True)


@pytest.mark.parametrize("scope", ["attention", "feedforward", "block"])
def test_a_step_may_keep_no_token_at_all(scope: Scope) -> None:
    from modeling.gpu.transformer import FusedTransformer

    network = Transformer(SIZES)
    for parameter in network.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5)
    for block in network.layers():
        block.ffn[1] = nn.GELU()
    shape = {"chunk_latents": 1, "latent_height": 2, "latent_width": 4}
    caches = [KVCache(SIZES, batch=1, window_latents=1, **shape) for _ in range(2)]
    forwards = (
        PlainForward(network, caches[0]),
        FusedForward(FusedTransformer(deepcopy(network)), caches[1]),
    )
    text, latents = network.prepare_text(torch.randn(1, 3, 8)), torch.randn(1, 1, 16, 2, 4)
    outputs = torch.randn(SIZES.num_layers, 1, 2, SIZES.dim)
    nothing = Reuse(scope, outputs, torch.empty(0, dtype=torch.long), fixed_size=False)
    wanted, found = (
        forward(latents, latents, torch.tensor([500.0]), text, nothing) for forward in forwards
    )
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)
    assert bool(found.any()) is (scope != "block")


@pytest.mark.parametrize("kept", [None, torch.tensor([1])])
def test_a_network_in_eight_bits_computes_about_the_same(kept: torch.Tensor | None) -> None:
    """With each layer's own weights: others would be another network altogether."""
    from modeling.gpu.transformer import FusedTransformer

    sizes = replace(SIZES, dim=32, ffn_dim=48, text_dim=16)
    network = Transformer(sizes)
    for parameter in network.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5)
    for block in network.layers():
        block.ffn[1] = nn.GELU("tanh")
    shape = {"chunk_latents": 1, "latent_height": 2, "latent_width": 4}
    caches = [KVCache(sizes, batch=1, window_latents=1, **shape) for _ in range(2)]
    forwards = (
        PlainForward(network, caches[0]),
        FusedForward(FusedTransformer(deepcopy(network), fp8=True), caches[1]),
    )
    text, latents = network.prepare_text(torch.randn(1, 3, 16)), torch.randn(1, 1, 16, 2, 4)
    reuse = None
    if kept is not None:
        reuse = Reuse("attention", torch.randn(sizes.num_layers, 1, 2, 32), kept, fixed_size=False)
    wanted, found = (
        forward(latents, latents, torch.tensor([500.0]), text, reuse) for forward in forwards
    )
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.15


@pytest.mark.parametrize("trained", [False, True])
def test_a_network_is_not_there_twice_unless_it_is_trained(trained: bool) -> None:
    """Queries, keys and values are one product; what is trained stays its optimizer's own."""
    from modeling.gpu.transformer import FusedTransformer

    network = Transformer(SIZES)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = FusedTransformer(network, trained=trained)
    for block, (weight, bias) in zip(network.layers(), fused._qkv, strict=True):
        for part in (block.self_attn.q, block.self_attn.k, block.self_attn.v):
            for own, joined in ((part.weight, weight), (part.bias, bias)):
                shares = own.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
                assert shares is not trained
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_each_layer_in_eight_bits_has_its_own_weights() -> None:
    from modeling.gpu.transformer import FusedTransformer

    network = Transformer(replace(SIZES, dim=32, ffn_dim=48))
    for parameter in network.parameters():
        parameter.normal_()
    made = FusedTransformer(network, fp8=True)._fp8
    for block, layers in zip(network.layers(), made, strict=True):
        first, _, last = block.ffn
        parts = [getattr(block.self_attn, part) for part in "qkv"]
        wanted = {
            "qkv": (torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])),
            "cross_q": (block.cross_attn.q.weight, block.cross_attn.q.bias),
            "ffn_in": (first.weight, first.bias),
            "ffn_out": (last.weight, last.bias),
        }
        assert layers.keys() == wanted.keys()
        for name, (weight, bias) in wanted.items():
            layer = layers[name]
            meant = (layer._weight.float() * layer._scales).t()
            torch.testing.assert_close(meant, weight, atol=0.02, rtol=0.07)
            assert torch.equal(layer._bias, bias)


def test_a_vae_with_its_frames_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs without a convolution of ours have it at the published widths: a block of each."""
    from modeling.gpu import vae as fused_vae

    monkeypatch.setattr(fused_vae, "_STACKED_ENCODING", (2,))
    monkeypatch.setattr(fused_vae, "_STACKED_DECODING", (8,))
    plain = build_vae(VaeConfig("wan", base_dim=2))
    for name, parameter in plain.named_parameters():
        parameter.uniform_(0.5, 1.5) if name.endswith("gamma") else parameter.normal_(std=0.2)
    fused = deepcopy(plain.requires_grad_(False))
    assert isinstance(plain, WanVae)
    assert isinstance(fused, WanVae)
    passes = fused_vae.FusedWanVae(fused)
    blocks = [(plain.encoder.downsamples[0], fused.encoder.downsamples[0], 2)]
    blocks.append((plain.decoder.middle[0], fused.decoder.middle[0], 8))
    for ours, theirs, channels in blocks:
        assert isinstance(theirs, ResidualBlock)
        for name in ("2", "6"):
            assert theirs.residual[name] in passes._stacked
            assert torch.equal(theirs.residual[name].weight, ours.residual[name].weight)
        x = torch.randn(1, channels, 2, 2, 2)
        caches = [torch.randn(1, channels, 2, 2, 2) for _ in range(2)]
        wanted, tape = ours(x, StreamTape(caches)), StreamTape(caches)
        inner = x.permute(0, 2, 3, 4, 1).contiguous()
        found = passes._layer(theirs, fused_vae.Sum(inner), tape).value().permute(0, 4, 1, 2, 3)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_what_is_left_out_is_plain() -> None:
    from modeling.gpu.kernels import resize, rows
    from modeling.gpu.transformer import FusedTransformer

    assert left_out(FusedTransformer) == {"fp8": False, "trained": False}
    assert left_out(rows.add_norm) == {"fp8": False}
    assert left_out(resize.resize) == {"kernel": "bicubic"}
    room = rows._room_for_fp8(2, 3, torch.device("meta"))
    assert {part.device.type for part in room} == {"meta"}


@pytest.mark.parametrize("kind", ["wan", "tiny"])
@pytest.mark.parametrize("fp8", [False, True])
def test_an_editors_networks_are_fused_rehearsed_and_then_graphed(
    monkeypatch: pytest.MonkeyPatch, kind: str, fp8: bool
) -> None:
    """In this order: what is rehearsed is what will run, and no graph is made of a rehearsal."""
    from modeling.gpu import graphs, rehearsal
    from modeling.gpu import vae as fused_vae

    network = Transformer(replace(SIZES, dim=32, ffn_dim=48))
    vae = build_vae(VaeConfig(kind, base_dim=2, widths=(4,) * 4))
    told: list[tuple[Any, ...]] = []
    for module, name in ((fused_vae, "fuse"), (rehearsal, "rehearse"), (graphs, "graph_passes")):
        monkeypatch.setattr(module, name, lambda *args, name=name: told.append((name, *args)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    made: Any = accelerate(network, vae, fp8=fp8)
    if kind == "wan":
        assert told.pop(0) == ("fuse", vae)
    rehearsed, graphed = told
    fused = rehearsed[2]
    assert rehearsed == ("rehearse", network, fused, vae)
    assert graphed == ("graph_passes", vae)
    assert bool(fused._fp8) is fp8
    assert (made.func, made.args[0].network) == (graphs.GraphedForward, fused)


def test_detail_on_a_gpu_is_each_of_its_kernels() -> None:
    from modeling.gpu.kernels import guide, resize, transfer

    assert fast_detail() == (resize.resize, guide.following, transfer.transfer)
