"""Who may use the server and how much: named tenants, whose tokens are kept as hashes.

    [acme]                              # TOML; `liveedit token acme` writes a section like this
    tokens = ["sha256:9f86d081..."]     # several while one replaces another
    max_sessions = 4                    # at once
    opens_per_minute = 30
    minutes_per_day = 600               # of its sessions together, by UTC

A token is 32 random bytes, so one round of SHA-256 is as good as many: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from infra.runtime.errors import UserError

log = logging.getLogger(__name__)

HASH = "sha256:"
PROTOCOL = "liveedit.token."  # a WebSocket subprotocol that carries a token: pages set no headers
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it is a label of metrics


@dataclass(frozen=True)
class Tenant:
    """Limits that are None are none."""

    name: str
    max_sessions: int | None = None
    opens_per_minute: int | None = None
    minutes_per_day: float | None = None


EVERYBODY = Tenant("everybody")  # without a file of tenants


def new_token() -> str:
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """As it stands in the file."""
    return HASH + hashlib.sha256(token.encode()).hexdigest()


def read_tenants(path: str | Path) -> dict[str, Tenant]:
    """Tenants by the hashes of their tokens.

    Raises UserError that names the file, the tenant and what is wrong. A file without a token is
    wrong too: empty it would let nobody in, and absent everybody.
    """
    try:
        sections = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the token file {path} cannot be read ({reason}); check the path, or begin one with "
            "`liveedit token NAME >> FILE`"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"the token file {path} is no TOML ({error}); it holds tenants and hashes of their "
            "tokens: write them with `liveedit token NAME >> FILE`"
        ) from error
    found: dict[str, Tenant] = {}
    for name, section in sections.items():
        tenant, hashes = _tenant(f"the token file {path}: ", name, section)
        for given in hashes:
            if given in found:
                raise UserError(
                    f"the token file {path}: {name} and {found[given].name} have the same token"
                )
            found[given] = tenant
    if not found:
        raise UserError(f"the token file {path} holds no token; `liveedit token NAME` makes one")
    return found


def _tenant(where: str, name: str, section: Any) -> tuple[Tenant, list[str]]:
    if not NAME.fullmatch(name) or name == EVERYBODY.name:
        raise UserError(f"{where}{name!r} is no tenant's name; letters, digits, . _ and - are")
    if not isinstance(section, dict):
        raise UserError(f"{where}{name} is no section; write [{name}]")
    limits = dict(section)
    hashes = limits.pop("tokens", None)
    if not isinstance(hashes, list) or not all(
        isinstance(h, str) and re.fullmatch(HASH + "[0-9a-f]{64}", h) for h in hashes
    ):
        raise UserError(
            f"{where}{name}.tokens must be a list of hashes, sha256: and 64 hex digits; "
            "`liveedit token NAME` makes them"
        )
    known = {f.name: str(f.type) for f in fields(Tenant) if f.name != "name"}
    for key, value in limits.items():
        if key not in known:
            raise UserError(f"{where}{name} has no limit {key}; it takes {sorted(known)}")
        kinds = int if known[key].startswith("int") else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{where}{name}.{key} must be {known[key]} above 0, got {value!r}")
    return Tenant(name, **limits), hashes


def given_token(
    headers: Mapping[str, str], query: Mapping[str, str], subprotocols: Sequence[str] = ()
) -> str:
    """The token that a request carries: `Authorization: Bearer`, else a subprotocol's, else
    `?token=`; empty when there is none. A header that is there is not mended by the others."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    for offered in subprotocols:
        if offered.startswith(PROTOCOL):
            return offered.removeprefix(PROTOCOL)
    return query.get("token", "").strip()


class Tenants:
    """The tenants of a file as it is now; without a file everybody is let in, as one tenant."""

    def __init__(self, path: str | None = None) -> None:
        """Raises UserError for a file that is wrong."""
        self._path = Path(path) if path else None
        self._found = read_tenants(path) if path else {}
        self._version = self._stamp()

    @property
    def open(self) -> bool:
        return self._path is None

    def find(self, token: str) -> Tenant | None:
        """Whose token it is, by the file as it is now."""
        if self._path is None:
            return EVERYBODY
        self._refresh()
        return self._found.get(hash_token(token))

    def _stamp(self) -> tuple[int, ...]:
        if self._path is None:
            return ()
        try:
            state = self._path.stat()
        except OSError:
            return ()
        return state.st_mtime_ns, state.st_ino, state.st_size

    def _refresh(self) -> None:
        """A file that has become wrong changes nothing: half a line must lock nobody out."""
        if (stamp := self._stamp()) == self._version:
            return
        self._version = stamp
        assert self._path is not None
        try:
            self._found = read_tenants(self._path)
        except ValueError as error:
            log.error("tenants stay as they were: %s", error)
        else:
            names = sorted({tenant.name for tenant in self._found.values()})
            log.info("tenants were read again: %s", ", ".join(names))
