from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from modeling.config import TextConfig
from modeling.importing.text import (
    check_umt5,
    convert_wan_umt5,
    infer_umt5,
    keep_encoder,
    write_text_folder,
)
from modeling.text.build import build_text_encoder
from modeling.text.encoder import CACHED_PROMPTS, IDLE_CALLS
from modeling.text.umt5 import Umt5Encoder, clean_prompt, load_umt5
from modeling.text.words import split_words, word_vector

REFERENCE = Path(__file__).parents[2] / "reference"
WORDS = TextConfig("words", dim=64, tokens=8)
VOCABULARY = ["<pad>", "</s>", "<unk>", "make", "the", "red", "blue", "circle", "sky", "&", "a"]


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words that ends a text as T5's does."""
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def umt5() -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(vocab_size=64, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(umt5: UMT5EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    umt5.save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


def encoder(folder: Path, tokens: int = 16) -> Umt5Encoder:
    built = build_text_encoder(TextConfig("umt5", dim=32, tokens=tokens, path=str(folder)))
    assert isinstance(built, Umt5Encoder)
    return built


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class TestWords:
    def test_case_and_punctuation_do_not_matter(self) -> None:
        words = build_text_encoder(WORDS)
        a, b = words.encode(["Make the (red) circle blue!", "make the red circle  blue"])
        assert torch.equal(a, b)
        assert split_words("don't -- STOP.") == ["don't", "stop"]

    def test_order_of_words_matters(self) -> None:
        words = build_text_encoder(WORDS)
        a, b = words.encode(["red to blue", "blue to red"])
        assert relative_error(a, b) > 0.1
        # A set of tokens, as cross-attention reads them, must differ too.
        assert relative_error(a.sort(dim=0).values, b.sort(dim=0).values) > 0.1

    def test_zero_after_the_true_length(self) -> None:
        text = build_text_encoder(WORDS).encode(["one two three", ""])
        assert text.shape == (2, 8, 64)
        assert text.dtype == torch.float32
        assert text[0, :3].abs().sum(-1).min() > 1
        assert not text[0, 3:].any()
        assert not text[1].any()

    def test_vectors_never_change(self) -> None:
        # Encoded datasets and trained models depend on these very numbers.
        expected = torch.tensor([-0.6863, -0.4030, -0.1721, -1.5618])
        torch.testing.assert_close(word_vector("red", 64)[:4], expected, atol=1e-4, rtol=0)
        found = build_text_encoder(WORDS).fingerprint()
        assert found == hashlib.sha256(b"words-1/64/8").hexdigest()

    def test_a_words_place_is_a_code_of_waves(self) -> None:
        """Sines of wavelengths from 2 pi words to 200 pi, then their cosines."""
        text = build_text_encoder(TextConfig("words", dim=4, tokens=3)).encode(["a a b"])[0]
        for place, word in enumerate("aab"):
            angles = [place, place / 10]
            code = [math.sin(x) for x in angles] + [math.cos(x) for x in angles]
            torch.testing.assert_close(text[place], word_vector(word, 4) + torch.tensor(code))

    def test_vectors_have_unit_variance_and_little_in_common(self) -> None:
        vectors = torch.stack([word_vector(f"word{n}", 4096) for n in range(50)])
        assert abs(float(vectors.var()) - 1) < 0.01
        cosines = torch.corrcoef(vectors) - torch.eye(50)
        assert cosines.abs().max() < 0.1

    def test_a_long_prompt_is_cut_and_said_so(self, caplog: pytest.LogCaptureFixture) -> None:
        words = build_text_encoder(WORDS)
        with caplog.at_level(logging.WARNING):
            long, short = words.encode(["a b c d e f g h i j", "a b c d e f g h"])
        assert torch.equal(long, short)
        (said,) = caplog.messages  # the other fits
        assert said.startswith("prompt of 10 tokens is cut to the first 8: 'a b c")

    def test_any_width(self) -> None:
        assert build_text_encoder(TextConfig("words", dim=7, tokens=4)).encode(["a"]).shape[2] == 7


class TestUmt5:
    def test_equals_transformers(self, umt5: UMT5EncoderModel, folder: Path) -> None:
        prompts = ["make the red circle blue", "make  the\nsky red", ""]
        found = encoder(folder).encode(prompts)
        ids = [[3, 4, 5, 7, 6, 1], [3, 4, 8, 5, 1], [1]]
        for row, tokens in zip(found, ids, strict=True):
            with torch.no_grad():
                wanted = umt5(torch.tensor([tokens])).last_hidden_state[0]
            assert relative_error(row[: len(tokens)], wanted) < 1e-5
            assert not row[len(tokens) :].any()

    def test_bf16_weights(self, umt5: UMT5EncoderModel, folder: Path, tmp_path: Path) -> None:
        exact = encoder(folder).encode(["make the circle blue"])
        state = keep_encoder(umt5.state_dict())
        half = {name: tensor.bfloat16() for name, tensor in state.items()}
        write_text_folder(tmp_path / "half", half, infer_umt5(half), folder / "tokenizer")
        text = encoder(tmp_path / "half")
        found = text.encode(["make the circle blue"])
        assert found.dtype == torch.float32
        assert 0 < relative_error(found, exact) < 1e-2
        held = {weight.dtype for weight in text._model.encoder.block.parameters()}
        assert held == {torch.bfloat16}  # again, once it is done: they are 11 GB

    def test_cleaning(self) -> None:
        assert clean_prompt("  a &amp;amp;\n b\t\tc ") == "a & b c"

    def test_long_prompts_keep_the_end_token(
        self, umt5: UMT5EncoderModel, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            found = encoder(folder, tokens=4).encode(["make the red circle blue", "a red sky"])
        with torch.no_grad():
            wanted = umt5(torch.tensor([[3, 4, 5, 1]])).last_hidden_state
        assert relative_error(found[:1], wanted) < 1e-5
        (said,) = caplog.messages  # the other's end is its fourth
        assert said.startswith("prompt of 6 tokens is cut to the first 4: 'make")

    def test_loaded_late_shared_and_released(self, folder: Path) -> None:
        one, two = encoder(folder), encoder(folder)
        assert not one.loaded
        first = one.encode(["make the sky blue"])
        two.encode(["a red sky"])
        assert one._model is two._model
        one.release()
        two.release()
        assert torch.equal(one.encode(["make the sky blue"]), first)
        assert not one.loaded, "a cached prompt must not load the weights again"
        one.encode(["a new circle"])
        assert one.loaded

    def test_an_encoder_on_another_device_is_another_one(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Loaded:
            def __init__(self, weights: Path, device: torch.device) -> None:
                self.device = device

        monkeypatch.setattr("modeling.text.umt5.load_umt5", Loaded)
        encoders = [encoder(folder).to(device) for device in ("cpu", "meta", "meta")]
        for one in encoders:
            one._load()
        assert [str(one._model.device) for one in encoders] == ["cpu", "meta", "meta"]
        assert encoders[1]._model is encoders[2]._model
        for one, stays in zip(encoders, (True, False, False), strict=True):
            assert one.to("cpu").loaded is stays

    def test_a_folder_may_hold_weights_and_tokenizer_side_by_side(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """As transformers writes it; of a tokenizer its older form is enough."""
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(folder / part, tmp_path / "one", dirs_exist_ok=True)
        wanted = encoder(folder).encode(["make the sky red"])
        assert torch.equal(encoder(tmp_path / "one").encode(["make the sky red"]), wanted)
        (tmp_path / "one" / "tokenizer.json").rename(tmp_path / "one" / "spiece.model")
        assert encoder(tmp_path / "one").tokenizer_files == tmp_path / "one"

    def test_freed_when_only_remembered_prompts_are_served(self, folder: Path) -> None:
        text = encoder(folder)
        for _ in range(IDLE_CALLS):
            text.encode(["make the sky red"])
        assert text.loaded
        text.encode(["make the sky red"])
        assert not text.loaded
        assert not Umt5Encoder._shared, "nobody else may hold the weights"
        text.encode(["make the sky blue"])
        assert text.loaded
        for _ in range(IDLE_CALLS):  # and again, counted from there
            assert text.loaded
            text.encode(["make the sky red"])
        assert not text.loaded

    def test_few_prompts_are_remembered(self, folder: Path) -> None:
        text = encoder(folder)
        text.encode(["the circle", *(f"a {n}" for n in range(CACHED_PROMPTS))])
        assert len(text._cache) == CACHED_PROMPTS
        assert "the circle" not in text._cache
        text.encode(["a 0"])  # so that "a 1" is what was asked for longest ago
        text.encode(["the circle"])
        assert "a 0" in text._cache
        assert "a 1" not in text._cache

    def test_fingerprint_follows_weights_and_tokenizer(self, folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        assert encoder(copy).fingerprint() == encoder(folder).fingerprint()
        weights = copy / "text_encoder" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        changed = encoder(copy).fingerprint()
        assert changed != encoder(folder).fingerprint()
        tokenizer = copy / "tokenizer" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace("sky", "sea"))
        assert encoder(copy).fingerprint() != changed

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("no weights folder", "holds no UMT5 text encoder"),
            ("no tokenizer", "holds no tokenizer"),
            ("other size", "embeddings of size 32, not 33"),
            ("no path", "names no folder"),
        ],
    )
    def test_what_is_missing_is_named(
        self, folder: Path, tmp_path: Path, change: str, message: str
    ) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        if change == "no weights folder":
            shutil.rmtree(copy / "text_encoder")
        if change == "no tokenizer":
            shutil.rmtree(copy / "tokenizer")
        dim = 33 if change == "other size" else 32
        path = None if change == "no path" else str(copy)
        with pytest.raises(ValueError, match=message):
            build_text_encoder(TextConfig("umt5", dim=dim, tokens=8, path=path))

    def test_missing_weights_are_an_error(self, umt5: UMT5EncoderModel, tmp_path: Path) -> None:
        state = keep_encoder(umt5.state_dict())
        config = infer_umt5(state)
        tokens, name = write_tokenizer(tmp_path / "tokens"), "encoder.final_layer_norm.weight"
        for wrong in ({}, {name: torch.ones(31)}):
            del state[name]
            write_text_folder(
                place := tmp_path / f"text{len(wrong)}", state | wrong, config, tokens
            )
            with pytest.raises(ValueError, match=rf"text{len(wrong)}.* missing or .*{name}"):
                encoder(place).encode(["a"])
            state |= {name: torch.ones(32)}


class TestWanLayout:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_outputs_equal_wan(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = load_file(REFERENCE / "umt5_tiny.safetensors")
        original = {
            name.removeprefix("weight."): tensor
            for name, tensor in tensors.items()
            if name.startswith("weight.")
        }
        state = convert_wan_umt5(original)
        config = infer_umt5(state)
        check_umt5(state, config, "reference")
        tokenizer, mask = write_tokenizer(tmp_path / "tokens"), tensors["input.mask"]

        def embed(name: str, weights: dict[str, Tensor]) -> Tensor:
            write_text_folder(tmp_path / name, weights, config, tokenizer)
            model = load_umt5(tmp_path / name / "text_encoder", torch.device("cpu"))
            assert model.dtype == weights["shared.weight"].dtype
            with torch.no_grad():
                return model(tensors["input.ids"], mask).last_hidden_state * mask[..., None]

        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        found, wanted = embed("text", stored), tensors["output.embeddings"]
        if dtype == torch.bfloat16:  # Wan's file is in bf16: what its rounded weights mean
            wanted = embed("wide", {name: tensor.float() for name, tensor in stored.items()})
        assert relative_error(found, wanted) < 1e-5

    def test_full_size_names_and_shapes(self) -> None:
        shapes = json.loads((REFERENCE / "umt5_xxl.keys.json").read_text())
        original = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        state = convert_wan_umt5(original)
        config = infer_umt5(state)
        check_umt5(state, config, "reference")
        assert (config["d_model"], config["num_layers"], config["num_heads"]) == (4096, 24, 64)
