"""A model directory: what training exports, the registry points at and the editor loads.

config.json               format version, origin of the layout, every size
transformer.safetensors   (absent in a directory that holds only a VAE)
vae.safetensors           (absent in a directory that holds only a transformer)
text/                     text encoder weights, if the model brings its own
card.json                 lineage: dataset and config hashes, commit, parent model, metrics
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.runtime.errors import UserError
from modeling.config import ModelConfig
from modeling.diffusion.transformer import Transformer
from modeling.fingerprint import file_fingerprint
from modeling.presets import PRESETS
from modeling.streaming.policies import POLICIES
from modeling.text.build import TEXT_ENCODERS
from modeling.vae.build import VAES, build_vae
from modeling.vae.streaming import StreamingVae

FORMAT_VERSION = 1


class ModelError(UserError):
    """A model directory that cannot be read or written; the message names the file and remedy."""


@dataclass
class Model:
    """Networks of a model directory. A part the directory does not hold is None."""

    config: ModelConfig
    transformer: Transformer | None
    vae: StreamingVae | None
    card: dict[str, Any]
    path: Path | None


def save_model(
    path: str | Path,
    config: ModelConfig,
    *,
    transformer: Mapping[str, Tensor] | nn.Module | None = None,
    vae: Mapping[str, Tensor] | nn.Module | None = None,
    text: Path | Callable[[Path], None] | None = None,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model directory at `path`, which must not exist or be an older model directory.

    `dtype` converts floating-point weights (None keeps theirs). `text` is a folder that is copied
    to `text/`, or a function that writes that folder. The directory appears whole or not at all.
    """
    path = Path(path)
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not is_model_dir(path):
        raise ModelError(f"{path} holds other files; give a new folder for the model")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        if text is not None:
            if callable(text):
                text(draft / "text")
            else:
                shutil.copytree(text, draft / "text")
            config = replace(config, text=replace(config.text, path="text"))
        _write_json(draft / "config.json", _plain(config))
        _write_json(draft / "card.json", dict(card))
        for name, part in (("transformer", transformer), ("vae", vae)):
            if part is not None:
                save_file(_weights(part, dtype), draft / f"{name}.safetensors")
        for file in (draft, *draft.rglob("*")):  # mkdtemp and safetensors write for the owner only
            file.chmod(0o755 if file.is_dir() else 0o644)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            path.rename(old / "model")
            draft.rename(path)
            shutil.rmtree(old)
        else:
            draft.rename(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model directory {path} could not be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def _plain(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` holds. A guide that nobody chose is left out: models had none once, and
    the same model has the same fingerprint."""
    values = asdict(config)
    if config.stream.guide_blur is None:
        del values["stream"]["guide_blur"]
    return {"format_version": FORMAT_VERSION, **values}


def is_model_dir(path: Path) -> bool:
    """Whether `path` is a model directory of any version (other tools write a config.json too)."""
    try:
        return "format_version" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a model directory."""
    values = _read_json(Path(path) / "config.json")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has model format {version}, this version reads {FORMAT_VERSION}; "
            "export or import the model again with this version"
        )
    config = _build(ModelConfig, values, f"{path}/config.json")
    assert isinstance(config, ModelConfig)
    try:
        check_choices(config)
    except ValueError as error:
        raise ModelError(f"{path}/config.json: {error}") from error
    if config.text.path is not None and not Path(config.text.path).is_absolute():
        text = str((Path(path) / config.text.path).resolve())
        config = replace(config, text=replace(config.text, path=text))
    return config


def set_guide(path: str | Path, blur: float | None, figures: Mapping[str, Any]) -> None:
    """Record which guide of detail a model's streams take (`StreamConfig.guide_blur`), and in its
    card the `figures` that it was chosen by. It is another model from then on: what comes out of it
    differs, so its fingerprint does. Raises ModelError where it cannot be written."""
    path = Path(path)
    replace(read_config(path).stream, guide_blur=blur)  # an error if it cannot be
    config = _read_json(path / "config.json")
    config["stream"].pop("guide_blur", None)
    if blur is not None:
        config["stream"]["guide_blur"] = blur
    try:
        for name, value in (  # a card that claims it stands beside nothing else
            ("config", config),
            ("card", read_card(path) | {"guide": dict(figures)}),
        ):
            draft = path / f".{name}.json"
            _write_json(draft, value)
            draft.replace(path / f"{name}.json")
    except OSError as error:
        raise ModelError(f"the guide of {path} could not be recorded: {error}") from error


def latents_identity(path: str | Path, config: ModelConfig) -> str:
    """The hash of what a stream's latents mean: two models that say the same can go on with each
    other's streams, from their latents."""
    stream = config.stream
    sizes = repr((config.vae, stream.chunk_latents, stream.window_latents, stream.sink_latents))
    vae = file_fingerprint(Path(path) / "vae.safetensors")
    return hashlib.sha256(f"{sizes} {vae}".encode()).hexdigest()


def check_choices(config: ModelConfig) -> None:
    """UserError if `config` names a VAE, a text encoder or a policy that does not exist."""
    VAES[config.vae.kind], TEXT_ENCODERS[config.text.kind]
    if config.stream.mask_cache is not None:
        POLICIES[config.stream.mask_cache.policy]


def read_card(path: str | Path) -> dict[str, Any]:
    return _read_json(Path(path) / "card.json")


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Model:
    """Networks of a model directory, in evaluation mode on `device`; `dtype` None keeps the files'.

    `path` may also be a preset's name: the networks then have random weights, drawn from seed 0.
    """
    if str(path) in PRESETS and not Path(path).exists():
        return _random_model(str(path), device, dtype)
    path = Path(path)
    config, card = read_config(path), read_card(path)
    transformer, vae = None, None
    if (path / "transformer.safetensors").is_file():
        with torch.device("meta"):
            transformer = Transformer(config.transformer)
        load_weights(transformer, path / "transformer.safetensors", device, dtype)
    if (path / "vae.safetensors").is_file():
        vae = build_vae(config.vae)
        load_weights(vae, path / "vae.safetensors", device, dtype)
    if transformer is None and vae is None:
        raise ModelError(f"{path} holds neither transformer.safetensors nor vae.safetensors")
    return Model(config, transformer, vae, card, path)


def load_weights(
    module: nn.Module, file: Path, device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Put a safetensors file's tensors into `module`; names and shapes must match exactly."""
    try:
        with safe_open(file, "pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no readable safetensors file ({error})") from error
    wanted = module.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in wanted]
    wrong += [
        f"{name} is {list(state[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if wrong:
        raise ModelError(f"{file} does not fit its config.json: " + "; ".join(wrong))
    state = {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in state.items()
    }
    module.load_state_dict(state, assign=True)
    module.to(device).eval().requires_grad_(False)


def _random_model(name: str, device: torch.device | str, dtype: torch.dtype | None) -> Model:
    config = PRESETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = Transformer(config.transformer)
        vae = build_vae(config.vae)
    for module in (transformer, vae):
        module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Model(config, transformer, vae, {"preset": name, "weights": "random, seed 0"}, None)


def _weights(
    part: Mapping[str, Tensor] | nn.Module, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    state = part.state_dict() if isinstance(part, nn.Module) else part
    return {
        name: value.detach()
        .to(device="cpu", dtype=dtype if value.is_floating_point() else None)
        .contiguous()
        for name, value in state.items()
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent} is no model directory: {path.name} is missing")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """JSON `value` as the dataclass (or plain type) `kind`; errors name the key `where`."""
    if get_origin(kind) is UnionType:
        if value is None and NoneType in get_args(kind):
            return None
        return _build(next(arg for arg in get_args(kind) if arg is not NoneType), value, where)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ModelError(f"{where} must be an object, found {value!r}")
        known = {field.name for field in fields(kind)}
        if unknown := sorted(set(value) - known):
            raise ModelError(
                f"{where} has unknown keys {', '.join(unknown)}; it was written by another version"
            )
        hints = get_type_hints(kind)
        values = {
            name: _build(hints[name], item, f"{where}:{name}") for name, item in value.items()
        }
        try:
            return cast(Any, kind)(**values)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{where}: {error}") from error
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        if not isinstance(value, list):
            raise ModelError(f"{where} must be a list, found {value!r}")
        return tuple(_build(item_kind, item, where) for item in value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ModelError(f"{where} is {value!r}; known values are {get_args(kind)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelError(f"{where} must be {kind.__name__}, found {value!r}")
    return value
