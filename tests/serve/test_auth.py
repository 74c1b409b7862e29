"""Who is let in: tokens are compared whole, and in a time that says nothing."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import auth
from serve.auth import allowed, read_tokens

TOKENS = ("zero", "secret-one", "geheim-ü")


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{scheme} {token}"}


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_token_opens(token: str, scheme: str) -> None:
    assert allowed(TOKENS, bearer(token, scheme), {})
    assert allowed(TOKENS, {}, {"token": token})
    assert allowed(TOKENS, bearer(f" {token} "), {})


@pytest.mark.parametrize("token", TOKENS)
def test_no_part_of_a_token_opens_and_nothing_longer(token: str) -> None:
    wrong = {token[:n] for n in range(len(token))} | {token[n:] for n in range(1, len(token))}
    wrong |= {token + "x", "x" + token, token * 2, token.upper(), token.swapcase(), "*"}
    wrong |= {f"{token},zero", f"{token} zero"}
    for given_token in wrong:
        assert not allowed(TOKENS, bearer(given_token), {}), given_token
        assert not allowed(TOKENS, {}, {"token": given_token}), given_token


@given(st.text(max_size=12))
def test_only_the_tokens_open(text: str) -> None:
    assert allowed(TOKENS, {}, {"token": text}) == (text.strip() in TOKENS)


def test_another_scheme_is_no_token() -> None:
    for scheme in ("Basic", "Bear", "Bearerx", "Token", ""):
        assert not allowed(TOKENS, bearer("zero", scheme), {})
    assert not allowed(TOKENS, {"authorization": "zero"}, {})


def test_a_wrong_header_is_not_mended_by_the_address() -> None:
    assert not allowed(TOKENS, bearer("wrong"), {"token": "zero"})
    assert allowed(TOKENS, bearer("x", "Basic"), {"token": "zero"})


def test_without_tokens_everybody_is_let_in() -> None:
    assert allowed((), {}, {})
    assert allowed([], bearer("x"), {})
    assert not allowed((token for token in TOKENS), {}, {})


@pytest.mark.parametrize("given_token", ["zero", "geheim-ü", "x"])
def test_every_token_is_compared_in_constant_time(
    given_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth, "hmac", Watched)
    assert allowed(TOKENS, bearer(given_token), {}) is (given_token in TOKENS)
    assert len(compared) == len(TOKENS)  # whichever it is


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("one\ntwo\n", ("one", "two")),
        ("# ours\n\n  one  \n#two\nthree", ("one", "three")),
        ("one # not a comment\n", ("one # not a comment",)),
    ],
)
def test_a_file_has_a_token_a_line(text: str, tokens: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(text)
    assert read_tokens(tmp_path / "tokens") == tokens


@pytest.mark.parametrize("text", ["", "\n \n", "# nobody\n"])
def test_a_file_without_tokens_lets_nobody_in(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ValueError, match="holds no token; write one a line"):
        read_tokens(tmp_path / "tokens")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    unreadable: list[Any] = [tmp_path, tmp_path / "absent"]
    for path in unreadable:
        with pytest.raises(ValueError, match=r"cannot be read"):
            read_tokens(path)
