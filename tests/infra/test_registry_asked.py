"""Environment and registry as all read them; the registry answers what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from infra.runtime import registry
from infra.runtime.environment import (
    become,
    environment,
    everything,
    set_default,
    unless_set,
    variable,
)
from infra.runtime.registry import Pointed, Registered, RegistryError

A, EMPTY, B = "LIVEEDIT_A", "LIVEEDIT_EMPTY", "LIVEEDIT_B"


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A, "a")
    monkeypatch.setenv(EMPTY, "")
    monkeypatch.setenv(B, "")
    monkeypatch.delenv(B)  # and so after the test, whoever sets it


def test_an_empty_variable_is_none_and_what_is_set_goes_before_a_default(variables: None) -> None:
    assert [variable(name) for name in (A, EMPTY, B)] == ["a", None, None]
    defaults = {A: "x", EMPTY: "y", B: "z"}
    assert unless_set(defaults) == {A: "a", EMPTY: "", B: "z"}
    for name, value in defaults.items():
        set_default(name, value)
    assert [variable(name) for name in (A, EMPTY, B)] == ["a", None, "z"]


def test_variables_are_as_they_were_afterwards_whatever_happens(variables: None) -> None:
    def fail() -> None:
        with environment({A: None, EMPTY: "e", B: "b"}):
            assert [everything().get(name) for name in (A, EMPTY, B)] == [None, "e", "b"]
            raise OSError("inside")

    with pytest.raises(OSError, match="inside"):
        fail()
    assert [everything().get(name) for name in (A, EMPTY, B)] == ["a", "", None]


def test_another_s_environment_is_taken_over_whole(variables: None) -> None:
    before = everything()
    try:
        become({B: "b"})
        assert everything() == {B: "b"}
    finally:
        become(before)
    everything()[A] = "a copy's"
    assert variable(A) == "a"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """The registry answers with these functions; what it was asked."""

    def answering(**answers: Callable[..., Any]) -> list[Any]:
        asked: list[Any] = []

        def noting(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                asked.append((name, *arguments))
                return answer(*arguments)

            return call

        client = SimpleNamespace(**{name: noting(name, a) for name, a in answers.items()})

        def connect(uri: str) -> Any:
            asked.append(uri)
            return client

        monkeypatch.setattr(registry, "client_for", connect)
        return asked

    return answering


def refuse(*_: Any) -> Any:
    raise MlflowException("not there")


@pytest.mark.parametrize(
    ("reference", "call"),
    [
        ("models:/ours@production", ("get_model_version_by_alias", "ours", "production")),
        ("models:/ours/3", ("get_model_version", "ours", "3")),
        ("ours/3", ("get_model_version", "ours", "3")),
    ],
)
def test_a_reference_is_an_alias_or_a_number(
    ask: Callable[..., list[Any]], reference: str, call: tuple[str, ...]
) -> None:
    asked = ask(**{call[0]: lambda *_: "the version"})
    assert registry.find_version(reference, "http://there") == "the version"  # type: ignore[comparison-overlap]
    assert asked == ["http://there", call]


@pytest.mark.parametrize(
    "reference", ["models:/", "models:/ours", "models:/ours@", "models:/@a", "models:/ours/3@a"]
)
def test_what_is_neither_or_both_is_no_reference(
    ask: Callable[..., list[Any]], reference: str
) -> None:
    asked = ask()
    with pytest.raises(RegistryError, match=f"{reference!r} is no model reference"):
        registry.find_version(reference, "http://there")
    assert asked == []


@pytest.mark.parametrize("reference", ["models:/ours@gone", "models:/ours/9"])
@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["one", "two"], "is not in the registry at http://there, which holds one, two; train"),
        ([], "is not in the registry at http://there, which holds nothing; train"),
        *(
            (
                error,
                r"http://there does not answer \(not there\), so models:/o.* cannot be looked up",
            )
            for error in (MlflowException("not there"), ConnectionError("not there"))
        ),
    ],
)
def test_what_is_not_there_is_told_with_what_is(
    ask: Callable[..., list[Any]], reference: str, models: list[str] | Exception, said: str
) -> None:
    def found() -> list[Any]:
        if isinstance(models, Exception):
            raise models
        return [SimpleNamespace(name=name) for name in models]

    ask(
        get_model_version=refuse,
        get_model_version_by_alias=refuse,
        search_registered_models=found,
    )
    with pytest.raises(RegistryError, match=said) as raised:
        registry.find_version(reference, "http://there")
    assert reference in str(raised.value)


def test_an_alias_that_is_gone_or_cannot_be_asked_for_is_named(
    ask: Callable[..., list[Any]],
) -> None:
    model = SimpleNamespace(aliases={"other": 3}, tags={})
    ask(get_registered_model=lambda name: model)
    with pytest.raises(RegistryError, match="ours@gone is no longer in the registry at http://t"):
        registry.pointed("models:/ours@gone", "http://t")

    def hang_up(name: str) -> Any:
        raise ConnectionError("not there")

    for answer in (refuse, hang_up):
        ask(get_registered_model=answer)
        with pytest.raises(RegistryError, match="at http://t has no answer for ours: not there"):
            registry.pointed("models:/ours@gone", "http://t")


def test_a_version_s_files_are_found_where_its_tag_says(tmp_path: Path) -> None:
    def version(**tags: str) -> Any:
        named = {getattr(registry, name): value for name, value in tags.items()}
        return SimpleNamespace(name="ours", version=3, tags=named)

    for place, told in (({}, "a place it does not name"), ({"LOCATION": "/gone"}, "/gone")):
        with pytest.raises(RegistryError, match=f"r is version 3, whose files lie at {told}, wh"):
            registry.located("r", version(**place))
    with pytest.raises(RegistryError, match=f"files lie at {tmp_path}, which cannot be read here"):
        registry.located("r", version(LOCATION=str(tmp_path)))  # a folder of something else
    (tmp_path / "config.json").touch()
    found = [
        registry.located("r", version(LOCATION=str(tmp_path), **more))
        for more in ({}, {"FINGERPRINT": "f"})
    ]
    assert found == [Registered("ours version 3", tmp_path, print_) for print_ in ("", "f")]


def test_a_client_reads_and_writes_one_registry_and_tells_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://another")
    client = registry.client_for("http://there")
    assert (client.tracking_uri, client._registry_uri) == ("http://there", "http://there")
    assert variable("MLFLOW_DISABLE_TELEMETRY") == "true"


@pytest.mark.parametrize(
    ("before", "share", "found"),
    [
        ("1,2,3", "0.25", Pointed("3", 0.25, "2")),  # the latest of those before it
        ("2,3,1", None, Pointed("3", 1.0, "1")),
        ("3", "1", Pointed("3")),
        ("", "0", Pointed("3", 0.0)),
        ("", "nan", None), ("", "half", None), ("", "1.01", None), ("", "-0.1", None),
    ],
)  # fmt: skip
def test_an_alias_says_which_version_was_before_it_and_what_share_is_its(
    before: str, share: str | None, found: Pointed | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {registry.BEFORE + "production": before, registry.SHARE + "other": "0.5"}
    if share is not None:
        tags[registry.SHARE + "production"] = share
    model = SimpleNamespace(aliases={"production": 3}, tags=tags)
    client = SimpleNamespace(get_registered_model=lambda name: model)
    monkeypatch.setattr(registry, "client_for", lambda uri: client)
    if found is None:
        with pytest.raises(RegistryError, match="a share of new sessions is from 0 to 1"):
            registry.pointed("models:/ours@production", "sqlite:///x.db")
    else:
        assert registry.pointed("models:/ours@production", "sqlite:///x.db") == found
