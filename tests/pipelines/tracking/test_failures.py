"""What becomes of what MLflow, its store and our own files answer with an error."""

from __future__ import annotations

import os
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from infra.runtime.errors import UserError
from modeling.model_dir import ModelError
from pipelines.tracking import registry, tracker
from pipelines.tracking.sender import MissingRunError, will_never_take
from pipelines.tracking.tracker import TrackingError, root_cause


def chained(*errors: Exception, cause: bool = True) -> Exception:
    """The last of these errors, each because of the one before."""
    for before, error in pairwise(errors):
        error.__cause__, error.__context__ = (before, None) if cause else (None, before)
    return errors[-1]


@pytest.mark.parametrize("cause", [True, False])
def test_what_is_told_of_an_error_is_what_it_began_with(cause: bool) -> None:
    first = OSError("\n" + "x" * 300 + "\nmore")
    assert root_cause(chained(first, KeyError("b"), ValueError("c"), cause=cause)) == (
        f"OSError: {'x' * 200}"
    )
    assert root_cause(KeyError()) == "KeyError: "


def refusal(code: str) -> MlflowException:
    error = MlflowException("no")
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "never"),
    [
        (refusal("INVALID_PARAMETER_VALUE"), True),
        (refusal("BAD_REQUEST"), True),
        (refusal("RESOURCE_DOES_NOT_EXIST"), True),
        (refusal("INTERNAL_ERROR"), False),
        (refusal("TEMPORARILY_UNAVAILABLE"), False),
        (ImportError("boto3"), True),
        (MissingRunError("gone"), True),
        (FileNotFoundError("a.png"), True),
        (ModelError("models/start is no model directory"), True),
        (ConnectionError("down"), False),
        (OSError("full"), False),
        (chained(refusal("BAD_REQUEST"), TrackingError("x")), True),
        (chained(ImportError("b"), ValueError("y"), TrackingError("x")), True),
        (chained(refusal("INTERNAL_ERROR"), TrackingError("x")), False),
    ],
)
def test_what_would_be_refused_for_ever_is_not_sent_for_ever(error: Exception, never: bool) -> None:
    assert will_never_take(error) is never


@pytest.mark.parametrize("code", ["RESOURCE_DOES_NOT_EXIST", "INTERNAL_ERROR"])
def test_a_registry_that_does_not_answer_may_hold_a_version(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> Any:
        raise refusal(code)

    monkeypatch.setattr(registry, "client_for", fail)
    assert registry.holds("http://m", "n", "1", Path("/m")) == (code == "INTERNAL_ERROR")


@pytest.mark.parametrize(
    ("uri", "boto3", "answer", "refused"),
    [
        ("https://h", None, {"x": "s3://b/x", "0": "/d"}, "s3://b/x"),
        ("http://h", None, {"x": "mlflow-artifacts:/x", "0": "s3://b/0"}, None),
        ("http://h", None, {"0": "s3://b/0"}, "s3://b/0"),
        ("http://h", "there", {"x": "s3://b/x"}, None),
        ("sqlite:///m.db", None, {"x": "s3://b/x"}, None),
        ("http://h", None, MlflowException("down"), None),
        ("http://h", None, ConnectionError("down"), None),
    ],
)
def test_artifacts_that_this_process_would_have_to_write_to_s3_need_a_package(
    uri: str,
    boto3: str | None,
    answer: dict[str, str] | Exception,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as a server says so, which nobody waits for."""

    def experiment(name: str) -> Any:
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(artifact_location=answer[name]) if name in answer else None

    client = SimpleNamespace(get_experiment_by_name=experiment, get_experiment=experiment)
    monkeypatch.setattr(tracker, "client_for", lambda uri: client)
    monkeypatch.setattr(tracker, "find_spec", lambda name: boto3)
    told = rf"tracking.uri={uri} has the artifacts of x in {refused}, which .*s3-artifacts"
    with pytest.raises(TrackingError, match=told) if refused else nullcontext():
        tracker.check_artifacts(uri, "x")


@pytest.mark.parametrize("error", [MlflowException("a"), OSError("a")])
def test_a_store_that_fails_is_named(error: Exception) -> None:
    told = r"tracking.uri=http://m stopped working \(\w+: a\)"
    with pytest.raises(TrackingError, match=told), tracker.naming("http://m"):
        raise error
    with pytest.raises(ZeroDivisionError), tracker.naming("http://m"):
        raise ZeroDivisionError
    assert issubclass(TrackingError, UserError)
