"""Keeps the catalog at what the registry says: an alias that moves is found within seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from infra.runtime.errors import UserError
from infra.runtime.registry import Pointed, RegistryError, find_version, pointed
from serve.admission.admission import Editor
from serve.versions import rolling
from serve.versions.catalog import Catalog
from serve.versions.source import ModelSource, Named, name_of, source_of

log = logging.getLogger(__name__)

FOLLOW_S = 3.0  # how often the registry is asked


class Aliases:
    """Args:
    ask: What an alias says, by reference and MLflow's address.
    """

    def __init__(self, catalog: Catalog, ask: Callable[[str, str], Pointed] = pointed) -> None:
        self.catalog, self.ask = catalog, ask
        self.sources: dict[str, ModelSource] = {}  # by key
        self._told: dict[str, dict[str, Any]] = {}  # by key: what `/v1/models` says
        self._serves: tuple[Named, ...] = ()
        self._seen: dict[str, Pointed] = {}  # by name
        self._silent = ""  # what the registry's last error was

    def serve(self, serves: tuple[Named, ...]) -> None:
        """From now on these are what clients choose from."""
        self._serves = serves
        for named in serves:
            self._know(named.source, named.told)
        moving = [named.name for named in serves if named.registry]
        self.catalog.serve({named.name: named.version for named in serves}, moving)
        self._seen.clear()

    def first(self, serves: Sequence[Named], editors: Iterable[Editor]) -> list[ModelSource]:
        """What an editor that starts loads, of what it was built to serve."""
        known = {offer.name: offer.stable for offer in self.catalog.offers(list(editors))}
        for named in serves:
            self._know(named.source, named.told)
            self.catalog.versions.setdefault(named.version.key, named.version)
        keys = [
            known.get(named.name, named.version.key) if named.registry else named.version.key
            for named in serves
        ]
        having = {key: sum(editor.holds(key) for editor in editors) for key in keys}
        versions, budget = self.catalog.versions, self.catalog.budget
        return [self.sources[key] for key in rolling.first(keys, versions, budget, having)]

    def described(self, key: str) -> dict[str, Any]:
        """What `/v1/models` says of a version that no editor has."""
        return self._told[key]

    async def run(self) -> None:
        """Looks for as long as it runs."""
        while True:
            await self.look()
            await asyncio.sleep(FOLLOW_S)

    async def look(self) -> None:
        """Asks the registry once; all stays as it is when it does not answer."""
        for named in self._serves:
            if named.registry:
                try:
                    await self._follow(named)
                except Exception:  # whatever MLflow or the files raise: it is asked again
                    log.exception("%s stays as it is", named.name)

    async def _follow(self, named: Named) -> None:
        try:
            found = await asyncio.to_thread(self.ask, named.reference, named.registry)
        except RegistryError as error:
            if str(error) != self._silent:
                log.warning("%s stays as it is: %s", named.name, error)
            self._silent = str(error)
            return
        self._silent = ""
        if self._seen.get(named.name) == found or named not in self._serves:
            return
        model, _, _ = name_of(named.reference).partition("@")
        target = await self._find(model, found.version, named.registry)
        if target is None:
            self._seen.pop(named.name, None)
            return
        before = None
        if found.before and found.share < 1:
            before = await self._find(model, found.before, named.registry)
        version = await asyncio.to_thread(self._version, target)
        earlier = None
        if before is not None:
            earlier = await asyncio.to_thread(self._version, before)
        if named not in self._serves:  # not any more
            return
        self._seen[named.name] = found
        self.catalog.point(named.name, version, found.share, earlier)

    async def _find(self, model: str, number: str, uri: str) -> ModelSource | None:
        """The version's source; None, and said, where an editor could not load it."""
        key, reference = f"{model} version {number}", f"models:/{model}/{number}"
        try:
            version = await asyncio.to_thread(find_version, reference, uri)
            source = await asyncio.to_thread(source_of, reference, version)
        except UserError as error:
            if self.catalog.failed.get(key) != str(error):
                log.error("%s takes no sessions: %s", key, error)
            self.catalog.failed[key] = str(error)
            return None
        self.catalog.failed.pop(key, None)
        self._know(source, await asyncio.to_thread(source.describe))
        return source

    def _know(self, source: ModelSource, told: dict[str, Any]) -> None:
        self.sources[source.key], self._told[source.key] = source, told

    def _version(self, source: ModelSource) -> rolling.Version:
        known: Mapping[str, rolling.Version] = self.catalog.versions
        return known.get(source.key) or source.version()
