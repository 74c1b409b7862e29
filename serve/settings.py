"""What an operator can set; `serve.app:app` takes the same names as args."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from infra.runtime.errors import UserError
from modeling.detail.work_size import work_size
from serve.admission.decisions import Scale
from serve.limits import Limits
from serve.tenants import read_tenants
from serve.wire.protocol import Detail

NewVersion = Literal["finish", "move"]
LISTS = ("models", "allowed_origins", "warm_sizes")  # settings that are lists of texts
FRAME = re.compile(r"([1-9]\d{1,4})x([1-9]\d{1,4})")  # width and height


@dataclass(frozen=True)
class ServeSettings:
    """Plain values only: they cross processes and come from YAML.

    `model` is a model directory, a preset's name, or `models:/NAME@ALIAS`; `models` are several.
    """

    model: str | None = None
    models: tuple[str, ...] = ()  # several, of which clients choose one by name
    on_new_version: NewVersion = "finish"  # sessions stay with theirs; or "move" to the new one
    hub_memory_gb: float = 2.0  # of states and edited frames, kept for sessions that come back
    editor_memory_gb: float = 0.0  # of weights that an editor holds at most; 0 for no bound
    device: str = "auto"  # "auto" is cuda where there is one
    fp8: bool = False  # most linear layers in 8 bits, on GPUs that can
    work_size: str = "native"  # that frames are edited at, where the client does not choose
    detail: Detail = "source"  # and what of the source the edit gets; or "off"
    warm_sizes: tuple[str, ...] = ()  # of frames, WIDTHxHEIGHT, that editors are warm for at start
    token_file: str | None = None  # tenants and hashes of their tokens; none: everybody is let in
    allowed_origins: tuple[str, ...] = ()  # pages from elsewhere that may use it: https://HOST
    max_sessions: int = 8  # of one editor replica
    measured_capacity: bool = True  # fewer than max_sessions when a chunk costs too much
    degrade: bool = True  # live sessions are edited less well before others are refused
    min_editors: int = 1  # replicas with a model, at least
    max_editors: int = 1  # at most; Ray Serve scales between
    spare_editors: int = 0  # that stand ready beyond those that are needed
    downscale_delay_s: float = 600.0  # that an editor must be too many before it goes
    editor_gpus: float = 0.0  # of one editor replica
    editor_cpus: float = 1.0  # of one editor replica, also its threads
    gpu_hour_cost: float = 0.0  # of an hour of an editor's compute, for `cost_total`; 0 for none
    fronts: int = 1  # replicas that own the sockets
    front_cpus: float = 0.5  # of one front
    stop_s: float = 30.0  # that sessions have to finish when the application is stopped
    drain_s: float = 120.0  # that a replica in the way has for giving its sessions back
    log_format: str = "text"  # or "json": every field of a line under its name
    log_dir: str | None = None  # where logs are kept; none: in Ray's folder, which goes with it
    traces: str | None = None  # a folder for each chunk's way as JSON lines, or "otlp"; none: off
    link_host: str | None = None  # replicas listen for each other there; none: their node's address
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.models):
            raise UserError(
                f"serve needs `model` or, for several, `models`, got model={self.model!r} and "
                f"models={list(self.models)}; each is a model directory, a preset or "
                "models:/NAME@ALIAS"
            )
        if self.on_new_version not in get_args(NewVersion):
            raise UserError(
                "serve setting on_new_version must be one of "
                f"{', '.join(get_args(NewVersion))}, got {self.on_new_version!r}"
            )
        for name in ("editor_memory_gb", "gpu_hour_cost"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"serve setting {name} must be 0 or more, got {getattr(self, name)}"
                )
        if not 0 < self.hub_memory_gb < math.inf:
            raise UserError(
                f"serve setting hub_memory_gb must be more than 0, got {self.hub_memory_gb}"
            )
        for name in ("max_sessions", "min_editors", "fronts"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"serve setting {name} must be 1 or more, got {getattr(self, name)}"
                )
        if self.max_editors < self.min_editors:
            raise UserError(
                f"serve setting max_editors={self.max_editors} is less than "
                f"min_editors={self.min_editors}; raise it"
            )
        try:
            work_size(self.work_size, 480, 832, (480, 832))
        except UserError as error:
            raise UserError(f"serve setting work_size: {error}") from error
        if self.detail not in get_args(Detail):
            raise UserError(
                f"serve setting detail must be one of {', '.join(get_args(Detail))}, got "
                f"{self.detail!r}"
            )
        if self.log_format not in ("text", "json"):
            raise UserError(
                f"serve setting log_format must be text or json, got {self.log_format!r}"
            )
        for size in self.warm_sizes:
            if not FRAME.fullmatch(size):
                raise UserError(
                    f"serve setting warm_sizes holds {size!r}; a size of frames is WIDTHxHEIGHT, "
                    "such as 1280x720"
                )
        for origin in self.allowed_origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise UserError(
                    f"serve setting allowed_origins holds {origin!r}; an origin is "
                    "https://HOST or https://HOST:PORT, without a path"
                )

    @classmethod
    def from_args(cls, args: dict[str, Any]) -> ServeSettings:
        """Raises UserError that names an unknown key or a value of the wrong type."""
        values = dict(args)
        limits = values.pop("limits", None) or {}
        if not isinstance(limits, dict):
            raise UserError(f"serve setting limits has fields (limits.max_fps), got {limits!r}")
        lists = {name: values.pop(name, ()) for name in LISTS}
        for name, given in lists.items():
            if not isinstance(given, list | tuple) or not all(isinstance(o, str) for o in given):
                raise UserError(f"serve setting {name} must be a list of texts, got {given!r}")
        _check("", cls, values, skip={"limits", *lists})
        _check("limits.", Limits, limits)
        tuples: dict[str, Any] = {name: tuple(given) for name, given in lists.items()}
        return cls(**values, **tuples, limits=Limits(**limits))

    @property
    def references(self) -> tuple[str, ...]:
        """What `model` or `models` say; the first is for clients that do not choose."""
        return self.models or (str(self.model),)

    @property
    def warm_frames(self) -> list[tuple[int, int]]:
        """Heights and widths of `warm_sizes`."""
        found = [FRAME.fullmatch(size) for size in self.warm_sizes]
        return [(int(size[2]), int(size[1])) for size in found if size]

    @property
    def scale(self) -> Scale:
        return Scale(self.min_editors, self.max_editors, self.spare_editors, self.downscale_delay_s)

    @property
    def logging(self) -> dict[str, Any]:
        """Of every replica, as Ray Serve takes it; our access log has the real paths."""
        return {
            "encoding": self.log_format.upper(),
            "log_level": "INFO",
            "logs_dir": self.log_dir,
            "enable_access_log": False,
        }

    def check_files(self) -> None:
        """Raises UserError for a file it names that cannot be used."""
        if self.token_file:
            read_tenants(self.token_file)


def _check(
    prefix: str, cls: type, values: dict[str, Any], skip: frozenset[str] | set[str] = frozenset()
) -> None:
    known = {f.name: str(f.type) for f in fields(cls) if f.name not in skip}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(prefix + near for near in close)}?"
            told = hint if close else f"it takes {', '.join(prefix + k for k in sorted(known))}"
            raise UserError(f"serve has no setting {prefix}{name}; {told}")
        kinds: dict[str, tuple[type, ...]] = {
            "str": (str,),
            "Detail": (str,),
            "NewVersion": (str,),
            "int": (int,),
            "float": (int, float),
            "bool": (bool,),
        }
        kind = known[name].removesuffix(" | None")
        optional = known[name].endswith("None")
        right = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
        if not right and not (optional and value is None):
            raise UserError(f"serve setting {prefix}{name} must be {known[name]}, got {value!r}")
