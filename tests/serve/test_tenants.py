"""Who is let in: tokens are kept as hashes, compared whole, and read again when they change."""

from __future__ import annotations

import logging
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipelines.cli import app
from serve.tenants import EVERYBODY, Tenant, Tenants, given_token, hash_token, read_tenants
from tests.serve.tokens import write_tokens

HASH = hash_token("secret")
TOKENS = {"zero": "zero", "one": "secret-one", "umlaut": "geheim-ü"}


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(str(write_tokens(tmp_path / "tokens", TOKENS)))


def test_a_hash_is_sha_256_of_the_token() -> None:
    wanted = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    assert f"sha256:{wanted}" == HASH


@pytest.mark.parametrize("name", list(TOKENS))
def test_each_token_is_its_tenants_and_no_part_of_it_is(tenants: Tenants, name: str) -> None:
    token = TOKENS[name]
    assert tenants.find(token) == Tenant(name)
    wrong = {token[:n] for n in range(len(token))} | {token[n:] for n in range(1, len(token))}
    wrong |= {token + "x", "x" + token, token * 2, token.upper(), token.swapcase(), "*"}
    wrong |= {hash_token(token), hash_token(token).removeprefix("sha256:")}  # what a thief reads
    for other in wrong - set(TOKENS.values()):
        assert tenants.find(other) is None, other


@given(st.text(max_size=12))
def test_without_a_file_everybody_is_let_in(text: str) -> None:
    assert Tenants().find(text) is EVERYBODY
    assert Tenants().open


@pytest.mark.parametrize(
    ("header", "query", "protocols", "token"),
    [
        ("Bearer a", "", (), "a"),
        ("bearer  a ", "b", ("liveedit.token.c",), "a"),
        ("Bearer wrong", "a", (), "wrong"),  # not mended by the address
        ("Bearer", "a", ("liveedit.token.b",), ""),
        ("Basic a", "", (), ""),
        ("a", "", (), ""),
        ("", "a", (), "a"),
        ("Basic x", "a", (), "a"),
        ("", "b", ("liveedit.v1", "liveedit.token.a"), "a"),
        ("", "", ("liveedit.v1",), ""),
    ],
)
def test_where_a_request_carries_its_token(
    header: str, query: str, protocols: tuple[str, ...], token: str
) -> None:
    assert given_token({"authorization": header}, {"token": query}, protocols) == token


def test_a_file_gives_tenants_their_limits(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(
        f'# ours\n[a]\ntokens = ["{HASH}", "{hash_token("next")}"]\nmax_sessions = 4\n'
        "opens_per_minute = 30\nminutes_per_day = 0.5\n"
        f'["b.c-d_e"]\ntokens = ["{hash_token("b")}"]\n'
    )
    tenant = Tenant("a", max_sessions=4, opens_per_minute=30, minutes_per_day=0.5)
    assert read_tenants(tmp_path / "tokens") == {
        HASH: tenant, hash_token("next"): tenant, hash_token("b"): Tenant("b.c-d_e"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("secret\n", "is no TOML .*liveedit token NAME >> FILE"),
        ("", "holds no token"),
        ("# nobody\n", "holds no token"),
        ("[a]\ntokens = []\n", "holds no token"),
        ("[a]\n", "a.tokens must be a list of hashes"),
        ('[a]\ntokens = ["secret"]\n', "a.tokens must be a list of hashes"),
        (f'[a]\ntokens = ["{HASH[:-1]}"]\n', "a.tokens must be a list of hashes"),
        (f'[a]\ntokens = "{HASH}"\n', "a.tokens must be a list of hashes"),
        ("a = 1\n", "a is no section"),
        (f'["a b"]\ntokens = ["{HASH}"]\n', "'a b' is no tenant's name"),
        (f'[everybody]\ntokens = ["{HASH}"]\n', "'everybody' is no tenant's name"),
        (f'[a]\ntokens = ["{HASH}"]\nmax_sesions = 1\n', "a has no limit max_sesions"),
        (f'[a]\ntokens = ["{HASH}"]\nmax_sessions = 0\n', "a.max_sessions must be .* above 0"),
        (f'[a]\ntokens = ["{HASH}"]\nmax_sessions = 1.5\n', "a.max_sessions must be int"),
        (f'[a]\ntokens = ["{HASH}"]\nmax_sessions = true\n', "a.max_sessions must be int"),
        (f'[a]\ntokens = ["{HASH}"]\nminutes_per_day = "1"\n', "a.minutes_per_day must be float"),
        (f'[a]\ntokens = ["{HASH}"]\n[b]\ntokens = ["{HASH}"]\n', "b and a have the same token"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ValueError, match=named):
        read_tenants(tmp_path / "tokens")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "binary"):
        with pytest.raises(ValueError, match=r"cannot be read \(.*liveedit token NAME >> FILE"):
            Tenants(str(path))


def test_a_changed_file_counts_at_once_and_a_broken_one_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    tenants = Tenants(str(write_tokens(path, {"a": "old"})))
    assert tenants.find("old") == Tenant("a")
    write_tokens(path, {"a": "new"}, max_sessions=2)
    assert tenants.find("old") is None
    assert tenants.find("new") == Tenant("a", max_sessions=2)
    path.write_text("half a li")
    assert tenants.find("new") == Tenant("a", max_sessions=2)
    os.remove(path)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert tenants.find("new") == Tenant("a", max_sessions=2)
    assert len(caplog.records) == 2  # each change is said once
    assert "tenants stay as they were: the token file" in caplog.text
    # In place, and as long as before.
    write_tokens(path, {"a": "new"})
    assert tenants.find("new") == Tenant("a")
    here = path.stat()
    write_tokens(path, {"a": "now"})
    os.utime(path, ns=(here.st_atime_ns, here.st_mtime_ns + 1))
    assert (path.stat().st_ino, path.stat().st_size) == (here.st_ino, here.st_size)
    assert (tenants.find("new"), tenants.find("now")) == (None, Tenant("a"))
    # As Kubernetes does it: another file takes the name, here of the same time and length.
    here = path.stat()
    write_tokens(tmp_path / "next", {"b": "next"})
    os.utime(tmp_path / "next", ns=(here.st_atime_ns, here.st_mtime_ns))
    os.replace(tmp_path / "next", path)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (here.st_mtime_ns, here.st_size)
    assert (tenants.find("now"), tenants.find("next")) == (None, Tenant("b"))


def test_the_command_writes_what_the_server_reads(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["token", "acme", "--sessions", "4", "--minutes", "90"])
    assert made.exit_code == 0
    token = made.stderr.split()[-1]
    assert len(token) >= 43  # 32 bytes
    assert token not in made.stdout
    assert list(tomllib.loads(made.stdout)) == ["acme"]
    (tmp_path / "tokens").write_text(made.stdout)
    tenant = Tenant("acme", max_sessions=4, minutes_per_day=90.0)
    assert Tenants(str(tmp_path / "tokens")).find(token) == tenant
    other = CliRunner().invoke(app, ["token", "acme"])
    assert other.stderr.split()[-1] != token
