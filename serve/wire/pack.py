"""Messages between our processes <-> bytes: any frozen dataclass of plain values.

What a value is travels with it, so a new field or message needs nothing here. Bytes and pixels
are not copied into the header but follow it as they are. Nothing is unpickled: only the dataclasses
that a connection is made for come out of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from serve.wire.pipe import Piece

DIALECT_BYTES = 8


def pack(message: Any) -> tuple[bytes, list[Piece]]:
    """A header and the parts that follow it.

    Takes None, numbers, text, bytes, arrays of uint8 and bool, and lists, tuples, dataclasses and
    dicts (by text) of these. Raises TypeError for what is none of them.
    """
    parts: list[Piece] = []
    plain = _plain(message, parts)
    header = {"message": plain, "sizes": [len(part) for part in parts]}
    return json.dumps(header, ensure_ascii=False).encode(), parts


def parse(header: bytes) -> tuple[Any, list[int]]:
    """The message without its parts, for `unpack`, and the bytes of each part that follows.

    Raises ValueError.
    """
    try:
        found = json.loads(header)
        return found["message"], [int(size) for size in found["sizes"]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"no header of ours: {error}") from error


def unpack(plain: Any, parts: list[np.ndarray], kinds: Iterable[type]) -> Any:
    """The message, arrays of which lie in `parts`, uint8 [bytes] each.

    Raises ValueError for one that is not made of `kinds`.
    """
    try:
        return _value(plain, parts, {kind.__name__: kind for kind in kinds})
    except (LookupError, TypeError) as error:
        raise ValueError(f"no message of ours: {error!r}") from error


def dialect(kinds: Iterable[type]) -> bytes:
    """`DIALECT_BYTES` that are others where one of the dataclasses has another name or field."""
    said = sorted(f"{k.__name__} {[(f.name, f.type) for f in fields(k)]}" for k in kinds)
    return hashlib.sha256("\n".join(said).encode()).digest()[:DIALECT_BYTES]


def _plain(value: Any, parts: list[Piece]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(item, parts) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, parts) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item, parts) for key, item in value.items()}}
    if isinstance(value, bytes):
        parts.append(value)
        return {"bytes": len(parts) - 1}
    if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.bool_):
        flat = np.packbits(value) if value.dtype == np.bool_ else np.ascontiguousarray(value)
        parts.append(flat.reshape(-1).data)
        return {"array": len(parts) - 1, "shape": value.shape, "bits": value.dtype == np.bool_}
    if is_dataclass(value):
        named = {field.name: _plain(getattr(value, field.name), parts) for field in fields(value)}
        return {"kind": type(value).__name__, "fields": named}
    raise TypeError(f"a {type(value).__name__} cannot go to another process: {value!r:.80}")


def _value(plain: Any, parts: list[np.ndarray], kinds: dict[str, type]) -> Any:
    if isinstance(plain, list):
        return [_value(item, parts, kinds) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "tuple" in plain:
        return tuple(_value(plain["tuple"], parts, kinds))
    if "dict" in plain:
        return {key: _value(item, parts, kinds) for key, item in plain["dict"].items()}
    if "bytes" in plain:
        return parts[plain["bytes"]].tobytes()
    if "array" in plain:
        shape, flat = tuple(plain["shape"]), parts[plain["array"]]
        if plain["bits"]:
            flat = np.unpackbits(flat, count=math.prod(shape)).view(np.bool_)
        return flat.reshape(shape)
    named = {name: _value(value, parts, kinds) for name, value in plain["fields"].items()}
    return kinds[plain["kind"]](**named)
