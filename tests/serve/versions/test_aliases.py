"""The catalog is what a real registry says, a few seconds later."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infra.runtime.registry import (
    BEFORE,
    SHARE,
    Pointed,
    RegistryError,
    find_version,
    pointed,
)
from serve.admission.admission import Editor, Warm
from serve.versions.aliases import FOLLOW_S, Aliases
from serve.versions.catalog import Catalog
from serve.versions.rolling import Offer
from serve.versions.source import ModelSource, find_models, menu_of
from tests.known_editors import TURNED, write_known_model
from tests.serve.registry import Registry

if TYPE_CHECKING:
    from infra.runtime.registry import ModelVersion

pytestmark = pytest.mark.anyio

REFERENCE = "models:/followed@production"
NAME = "followed@production"
V1, V2, V3 = (f"followed version {number}" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def followed(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Three versions of a model; of the third the files are no longer what they were."""
    folder = tmp_path_factory.mktemp("models")
    for number, paints in enumerate(({}, {"paints": TURNED}, {}), 1):
        made = write_known_model(folder / str(number), **paints)  # type: ignore[arg-type]
        registry.register("followed", "newest", made)
    (folder / "3" / "vae.safetensors").write_bytes(b"")
    return registry


def move(registry: Registry, version: int, **tags: str) -> None:
    client = registry.client
    client.set_registered_model_alias("followed", "production", str(version))
    for tag in (SHARE, BEFORE):
        value = tags.get(tag.split(".")[1])
        if value:
            client.set_registered_model_tag("followed", f"{tag}production", value)
        elif f"{tag}production" in client.get_registered_model("followed").tags:
            client.delete_registered_model_tag("followed", f"{tag}production")


@pytest.fixture
def follower(followed: Registry) -> Aliases:
    move(followed, 1)
    made = Aliases(Catalog())
    made.serve(find_models([REFERENCE, "demo"], followed.uri))
    return made


def editors(*models: str) -> list[Editor]:
    return [Editor("a", 12, 8, models=dict.fromkeys(models, Warm(12)))]


def offered(follower: Aliases, *models: str) -> Offer:
    return follower.catalog.menu(editors(*models)).offers[0]


async def test_an_alias_that_moves_is_a_target(followed: Registry, follower: Aliases) -> None:
    await follower.look()
    assert offered(follower, V1) == Offer(NAME, V1)
    move(followed, 2)
    await follower.look()
    assert offered(follower, V1, V2) == Offer(NAME, V1, V2)
    assert follower.sources[V2].name == follower.described(V2)["name"] == V2
    one, two = (follower.catalog.versions[key] for key in (V1, V2))
    assert one.lineage == two.lineage != ""  # one VAE: sessions can move
    assert one.size == sum(
        file.stat().st_size for file in Path(follower.sources[V1].directory).glob("*.safetensors")
    )
    move(followed, 1)
    await follower.look()
    assert offered(follower, V1, V2) == Offer(NAME, V1)


async def test_a_canary_is_a_tag_also_after_a_restart(followed: Registry) -> None:
    move(followed, 2, share="0.25", before="1,2")
    fresh = Aliases(Catalog())
    fresh.serve(find_models([REFERENCE], followed.uri))
    assert offered(fresh, V2) == Offer(NAME, V2)  # what was built, until the registry is asked
    await fresh.look()
    assert offered(fresh, V1, V2) == Offer(NAME, V1, V2, 0.25)
    move(followed, 2, before="1")
    await fresh.look()
    assert offered(fresh, V1, V2) == Offer(NAME, V1, V2)


async def test_files_that_are_not_what_was_registered_are_no_target(
    followed: Registry, follower: Aliases, caplog: pytest.LogCaptureFixture
) -> None:
    await follower.look()
    move(followed, 3)
    for _ in range(2):  # it may be mended: it is looked at again
        await follower.look()
        assert offered(follower, V1) == Offer(NAME, V1)
        assert follower.catalog.failed.keys() == {V3}
        assert follower.catalog.notes(editors(V1)) == [
            f"{V3} takes no sessions: it could not be loaded"
        ]
    assert caplog.text.count(f"{V3} takes no sessions") == 1  # every three seconds would be much
    broken = Path(follower.sources[V1].directory).parent / "3" / "vae.safetensors"
    broken.write_bytes((broken.parent.parent / "1" / "vae.safetensors").read_bytes())
    await follower.look()  # it is what was registered again
    assert follower.catalog.failed == {}
    assert offered(follower, V1, V3) == Offer(NAME, V1, V3)
    broken.write_bytes(b"")
    for version, failed in ((1, set()), (3, {V3}), (1, set())):  # and back to what it was
        move(followed, version)
        await follower.look()
        assert follower.catalog.failed.keys() == failed


async def test_a_registry_that_does_not_answer_changes_nothing(
    followed: Registry, follower: Aliases, caplog: pytest.LogCaptureFixture
) -> None:
    """And is complained of once, until it has answered."""
    move(followed, 2)
    await follower.look()
    ask = follower.ask

    errors: list[str] = []

    def silent(reference: str, uri: str) -> Pointed:
        raise RegistryError(errors.pop(0))

    for _ in range(2):
        follower.ask = silent
        errors += ["it is down", "it is down", "it has no such model"]
        while errors:
            await follower.look()
        assert offered(follower, V1, V2) == Offer(NAME, V1, V2)
        follower.ask = ask
        await follower.look()
    assert caplog.text.count("stays as it is: it is down") == 2
    assert caplog.text.count("stays as it is: it has no such model") == 2
    move(followed, 1)
    await follower.look()
    assert offered(follower, V1, V2) == Offer(NAME, V1)


@pytest.mark.parametrize("share", ["some", "-0.1", "1.5", "nan"])
def test_a_share_that_is_none_is_named(followed: Registry, share: str) -> None:
    move(followed, 2, share=share)
    with pytest.raises(RegistryError, match=f"liveedit.share.production={share!r}.*from 0 to 1"):
        pointed(REFERENCE, followed.uri)
    move(followed, 2)
    assert pointed(REFERENCE, followed.uri) == Pointed("2")
    with pytest.raises(RegistryError, match="is no longer in the registry"):
        pointed("models:/followed@nobody", followed.uri)
    with pytest.raises(RegistryError, match="has no answer for absent"):
        pointed("models:/absent@production", followed.uri)


async def test_an_editor_that_starts_gets_what_is_served_by_now(
    followed: Registry, follower: Aliases
) -> None:
    serves = find_models([REFERENCE, "demo"], followed.uri)
    move(followed, 2)
    await follower.look()
    assert [source.key for source in follower.first(serves, editors(V1))] == ["demo", V1]
    follower.catalog.settle(editors(V1, V2))
    assert [source.key for source in follower.first(serves, editors(V2))] == ["demo", V2]
    # One of a later deploy, which the hub has not heard of.
    more = (*serves, *find_models(["natural"]))
    assert {source.key for source in follower.first(more, editors(V2))} == {"demo", V2, "natural"}


async def test_the_registry_is_asked_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    follower, done = Aliases(Catalog()), list[object]()

    async def look() -> None:
        done.append("look")

    async def sleep(seconds: float) -> None:
        done.append(seconds)
        if len(done) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(follower, "look", look)
    monkeypatch.setattr("serve.versions.aliases.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await follower.run()
    assert done == ["look", FOLLOW_S] * 2


async def test_what_follows_no_alias_is_what_the_newest_deploy_says() -> None:
    """A folder of the same name, elsewhere."""
    follower, (built,) = Aliases(Catalog()), find_models(["demo"])
    follower.serve((built,))
    follower.serve((replace(built, version=replace(built.version, key="elsewhere/demo")),))
    assert offered(follower) == Offer("demo", "elsewhere/demo")
    # Nor does an editor that was built with it start with what the hub has known so far.
    other = ModelSource("natural")
    newest = replace(built, source=other, version=replace(built.version, key=other.key))
    assert follower.first((newest,), []) == [other]


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_known_model(tmp_path / folder / "same")
    references = [str(tmp_path / folder / "same") for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"a/same and .*b/same would both be called same"):
        find_models(references)
    assert [offer.name for offer in menu_of(find_models([references[0], "demo"])).offers] == [
        "same", "demo",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), KeyError("a tag")])
async def test_whatever_goes_wrong_the_registry_is_asked_again(
    followed: Registry, follower: Aliases, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(reference: str, uri: str) -> Pointed:
        raise error

    ask, follower.ask = follower.ask, fail
    await follower.look()
    assert f"{NAME} stays as it is" in caplog.text
    assert offered(follower, V1) == Offer(NAME, V1)
    follower.ask = ask
    move(followed, 2)
    await follower.look()
    assert offered(follower, V1, V2) == Offer(NAME, V1, V2)


async def test_a_name_that_is_served_no_more_while_it_is_looked_up(
    followed: Registry,
    follower: Aliases,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def find(reference: str, uri: str) -> ModelVersion:
        follower.serve(find_models(["demo"]))
        return find_version(reference, uri)

    move(followed, 2)
    monkeypatch.setattr("serve.versions.aliases.find_version", find)
    await follower.look()
    assert caplog.text == ""
    assert [offer.name for offer in follower.catalog.menu(editors("demo")).offers] == ["demo"]


async def test_what_has_not_moved_is_not_looked_up_again(
    follower: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few seconds it would be a fingerprint of gigabytes."""
    found: list[str] = []

    def find(reference: str, uri: str) -> ModelVersion:
        found.append(reference)
        return find_version(reference, uri)

    monkeypatch.setattr("serve.versions.aliases.find_version", find)
    for _ in range(3):
        await follower.look()
    assert len(found) == 1


async def test_a_name_that_is_served_again_is_looked_up_again(
    followed: Registry, follower: Aliases
) -> None:
    """With what it was when the application was built, which is not what its alias says now."""
    built = find_models([REFERENCE], followed.uri)
    move(followed, 2)
    await follower.look()
    assert offered(follower, V1, V2) == Offer(NAME, V1, V2)
    follower.serve(find_models(["demo"]))
    follower.serve(built)
    assert offered(follower, V1, V2) == Offer(NAME, V1)
    await follower.look()
    assert offered(follower, V1, V2) == Offer(NAME, V1, V2)
