"""The wire, version 1: frozen dataclasses <-> the JSON text of control messages.

Frames, which are binary, are in `codec`.

Two additions to the published messages, sent to nobody who did not ask for them: `"mask": true` in
`open` makes the server send a `mask` message before the frames of each chunk, and with
`"queue": true` an open that finds no room waits and hears `queued` until `opened` comes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from infra.runtime.errors import UserError
from serve.wire.codes import Code

SUBPROTOCOL = "liveedit.v1"
PATH = "/v1/stream"
MAX_TEXT = 64 * 1024  # characters of a control message
LARGEST = 2**64  # that a number may be: JSON has integers of any length, which no float can hold

Mode = Literal["live", "lossless"]
Format = Literal["jpeg", "png", "webp", "rgb24"]
Detail = Literal["source", "off"]  # what an edit made at another size gets of the source
NORMAL_CLOSE = 1000
STOPPED = "stopped"  # reason of `closed` when the server ends
SPENT = "spent"  # and when the tenant's minutes are used up

RETRY_AFTER_S = 5.0  # what a refusal for lack of room advises


@dataclass(frozen=True)
class Open:
    prompt: str
    width: int
    height: int
    fps: float
    mode: Mode
    format: Format
    seed: int | None = None
    resume: str | None = None
    received: int | None = None
    mask: bool | None = None
    queue: bool | None = None
    work_size: str | None = None  # as `modeling.detail.work_size` reads it; None: the server's
    detail: Detail | None = None
    model: str | None = None  # by name; None: the server's first


@dataclass(frozen=True)
class Prompt:
    prompt: str


@dataclass(frozen=True)
class Close:
    pass


@dataclass(frozen=True)
class InQueue:
    """No editor has room yet: `place` counts from 1, `expected_s` is a guess."""

    place: int
    expected_s: float


@dataclass(frozen=True)
class Opened:
    session: str
    resume: str
    model: str
    chunk_frames: int
    first_chunk_frames: int
    width: int
    height: int
    next_frame: int
    work_size: str | None = None  # WIDTHxHEIGHT
    detail: Detail | None = None
    unknown: str | None = None  # words of the prompt that the model was never taught


@dataclass(frozen=True)
class Chunk:
    """`latency_ms`: from the arrival of the chunk's last source frame until it is ready to send."""

    index: int
    first_frame: int
    frames: int
    latency_ms: float
    compute_ms: float
    recomputed: float
    steps: int


@dataclass(frozen=True)
class Mask:
    """Which tokens chunk `index` recomputed: `data` is base64 of bits, most significant first,
    [latents, rows, columns]; a row is a strip of 16 pixels."""

    index: int
    latents: int
    rows: int
    columns: int
    data: str


@dataclass(frozen=True)
class PromptApplied:
    prompt: str
    first_frame: int
    unknown: str | None = None  # words of it that the model was never taught


@dataclass(frozen=True)
class QualityApplied:
    """From `first_frame` on the session is edited like this: `level` is "full" as it asked, and
    under pressure one of `serve.admission.rungs`."""

    level: str
    first_frame: int
    work_size: str  # WIDTHxHEIGHT
    steps: int


@dataclass(frozen=True)
class Dropped:
    first_frame: int
    frames: int


@dataclass(frozen=True)
class Closed:
    frames: int
    reason: str


@dataclass(frozen=True)
class Error:
    code: Code
    message: str
    retry_after_s: float | None = None


class WireError(UserError):
    """What goes out as an `error` message; `code` is one of the protocol's error codes."""

    def __init__(self, code: Code, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after_s = code, message, retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross processes
        return WireError, (self.code, self.message, self.retry_after_s)

    @classmethod
    def of(cls, told: Error) -> WireError:
        return cls(told.code, told.message, told.retry_after_s)

    @property
    def told(self) -> Error:
        return Error(self.code, self.message, self.retry_after_s)


ClientMessage = Open | Prompt | Close
ServerMessage = (
    InQueue | Opened | Chunk | Mask | PromptApplied | QualityApplied | Dropped | Closed | Error
)
Message = ClientMessage | ServerMessage

NAMES: dict[type, str] = {
    Open: "open",
    Prompt: "prompt",
    Close: "close",
    InQueue: "queued",
    Opened: "opened",
    Chunk: "chunk",
    Mask: "mask",
    PromptApplied: "prompt_applied",
    QualityApplied: "quality",
    Dropped: "dropped",
    Closed: "closed",
    Error: "error",
}
CLIENT_TYPES = {NAMES[kind]: kind for kind in get_args(ClientMessage)}
SERVER_TYPES = {NAMES[kind]: kind for kind in get_args(ServerMessage)}

_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "Mode": (str,),
    "Format": (str,),
    "Detail": (str,),
    "Code": (str,),
}
_CHOICES = {
    "Mode": get_args(Mode),
    "Format": get_args(Format),
    "Detail": get_args(Detail),
    "Code": get_args(Code),
}


def to_json(message: Message) -> str:
    """A control message as it is sent; absent optional fields are left out."""
    values = {name: getattr(message, name) for name in message.__dataclass_fields__}
    present = {name: value for name, value in values.items() if value is not None}
    return json.dumps({"type": NAMES[type(message)], **present}, separators=(",", ":"))


def parse_client(text: str) -> ClientMessage:
    """A client's control message. Raises WireError `bad_request` that names the field."""
    message = _parse(text, CLIENT_TYPES)
    assert isinstance(message, Open | Prompt | Close)
    return message


def parse_server(text: str) -> ServerMessage | None:
    """A server's control message, None for a type this version does not know."""
    if _load(text).get("type") not in SERVER_TYPES:
        return None
    message = _parse(text, SERVER_TYPES, lenient=True)
    assert not isinstance(message, Open | Prompt | Close)
    return message


def _load(text: str) -> dict[str, Any]:
    if len(text) > MAX_TEXT:
        raise WireError(
            "bad_request", f"a control message of {len(text)} characters; at most {MAX_TEXT}"
        )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError("bad_request", f"a text message must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise WireError(
            "bad_request", f"a control message must be an object, got {type(values).__name__}"
        )
    return values


def _parse(text: str, types: dict[str, type], lenient: bool = False) -> Message:
    values = _load(text)
    name = values.pop("type", None)
    kind = types.get(name) if isinstance(name, str) else None
    if kind is None:
        raise WireError("bad_request", f"type must be one of {sorted(types)}, got {_shown(name)}")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown and not lenient:
        raise WireError(
            "bad_request", f"{name} has no field {_shown(unknown[0])}; it takes {sorted(known)}"
        )
    out = {}
    for field in known.values():
        value = values.get(field.name)
        if value is None:
            if "None" not in str(field.type):
                raise WireError("bad_request", f"{name}.{field.name} is missing")
            continue
        out[field.name] = _checked(f"{name}.{field.name}", value, str(field.type))
    message: Message = kind(**out)
    return message


def _checked(name: str, value: Any, annotation: str) -> Any:
    kind = annotation.removesuffix(" | None")
    wanted = _TYPES[kind]
    right = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
    if not right or (isinstance(value, int) and abs(value) > LARGEST):
        raise WireError("bad_request", f"{name} must be {kind}, got {_shown(value)}")
    choices = _CHOICES.get(kind)
    if choices and value not in choices:
        raise WireError("bad_request", f"{name} must be one of {choices}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
