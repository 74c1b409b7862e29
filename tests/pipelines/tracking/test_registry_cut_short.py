"""Moving an alias takes several requests: what is left when the process ends after any of them."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from infra.runtime.registry import BEFORE, SHARE
from pipelines.tracking import registry
from pipelines.tracking.tracker import CHECK_ENV

ALIAS = "production"


class Ended(Exception):  # noqa: N818  # the process was killed here
    pass


class Registry:
    """The aliases and tags of one registered model; ends after `left` more changes."""

    def __init__(self, alias: str, before: str) -> None:
        self.tracking_uri = "http://mlflow"
        self.aliases, self.tags = {ALIAS: alias}, {BEFORE + ALIAS: before}
        self.left = 99
        self.seen: list[tuple[str, str | None]] = []  # the alias and its share after each change

    def get_registered_model(self, name: str) -> Any:
        return SimpleNamespace(aliases=dict(self.aliases), tags=dict(self.tags))

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._change(self.aliases, alias, version)

    def set_registered_model_tag(self, name: str, tag: str, value: str) -> None:
        self._change(self.tags, tag, value)

    def delete_registered_model_tag(self, name: str, tag: str) -> None:
        self._change(self.tags, tag, None)

    def _change(self, table: dict[str, str], key: str, value: str | None) -> None:
        if self.left == 0:
            raise Ended
        self.left -= 1
        if value is None:
            del table[key]
        else:
            table[key] = value
        self.seen.append((self.aliases[ALIAS], self.tags.get(SHARE + ALIAS)))


def use(found: Registry, patch: pytest.MonkeyPatch) -> Registry:
    def find(reference: str, uri: str) -> Any:
        tail = reference.removeprefix("models:/liveedit")
        number = found.aliases[tail[1:]] if tail[0] == "@" else tail[1:]
        return SimpleNamespace(name="liveedit", version=number)

    patch.setattr(registry, "client_for", lambda uri: found)
    patch.setattr(registry, "find_version", find)
    patch.setattr(registry, "check_files", lambda reference, version: None)
    return found


@pytest.mark.parametrize(("changes", "then"), [(0, "2"), (1, "1"), (2, "1")])
def test_a_rollback_after_one_that_was_cut_short_goes_to_the_one_before(
    changes: int, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = use(Registry("3", "1,2"), monkeypatch)
    found.left = changes
    if changes < 2:
        with pytest.raises(Ended):
            registry.rollback("liveedit", ALIAS, "uri")
    else:
        registry.rollback("liveedit", ALIAS, "uri")
    assert found.aliases[ALIAS] == ("3" if changes == 0 else "2")
    found.left = 99
    assert registry.rollback("liveedit", ALIAS, "uri").version == then
    assert found.aliases[ALIAS] == then


@pytest.mark.parametrize(("share", "told"), [(0.25, "0.25"), (1.0, None)])
def test_a_server_never_sees_a_canary_without_its_share(
    share: float, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = use(Registry("1", ""), monkeypatch)
    registry.promote("models:/liveedit/2", ALIAS, "uri", share)
    assert found.tags[BEFORE + ALIAS] == "1"
    assert {share for alias, share in found.seen if alias == "2"} == {told}
    registry.promote("models:/liveedit/2", ALIAS, "uri")
    assert found.seen[-1] == ("2", None)


@pytest.mark.parametrize(
    ("code", "there"), [("RESOURCE_DOES_NOT_EXIST", False), ("TEMPORARILY_UNAVAILABLE", True)]
)
def test_a_registry_that_does_not_answer_is_not_waited_for(
    code: str, there: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str | None] = []

    def ask(name: str, version: str) -> None:
        waits.extend(os.environ.get(variable) for variable in CHECK_ENV)
        error = MlflowException("no")
        error.error_code = code
        raise error

    client = SimpleNamespace(get_model_version=ask)
    monkeypatch.setattr(registry, "client_for", lambda uri: client)
    assert registry.holds("uri", "liveedit", "1", tmp_path) is there
    assert waits == list(CHECK_ENV.values())
