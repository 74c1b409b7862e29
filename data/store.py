"""Files of a dataset on disk or S3, behind the five things a dataset needs of them.

S3 goes through s3fs: credentials, region and endpoint come from where every AWS tool takes them
(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `~/.aws`, instance roles).
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.runtime.environment import variable
from infra.runtime.errors import UserError

# A wrong address is found out in seconds, a short outage survived, a silent server costs a minute.
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 4, 10, 3
SCRATCH = ".liveedit-"


class DatasetError(UserError):
    """A dataset that cannot be read or written; names what, expected, found and the remedy."""


def open_store(uri: str | Path) -> Store:
    """The store behind a folder or an `s3://bucket/prefix`.

    Raises:
        DatasetError: another scheme, or no bucket.
    """
    text = str(uri)
    if text.startswith("s3://"):
        return S3Store(text)
    if "://" in text or text.startswith("s3:"):
        raise DatasetError(f"{text}: unknown place; give a folder or s3://bucket/prefix")
    return Store(Path(text))


class Store:
    """A folder. Writes are atomic: a name appears with its whole content or not at all."""

    remote = False  # whether `fetch` makes a copy

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def names(self) -> list[str]:
        """File names in the store, sorted; empty when the folder does not exist."""
        return (
            sorted(p.name for p in self.root.iterdir() if p.is_file()) if self.root.is_dir() else []
        )

    def read(self, name: str) -> bytes:
        with self.naming(name):
            return (self.root / name).read_bytes()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder for files on their way into the store; gone afterwards."""
        with self.naming(""):
            self.root.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix=SCRATCH, dir=self.root)
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, local: Path, name: str) -> None:
        """Moves a file of `scratch` into the store, at once."""
        with self.naming(name):
            os.replace(local, self.root / name)

    def write(self, scratch: Path, name: str, text: str) -> None:
        """Puts a text into the store, at once; `scratch` is where it is made."""
        local = scratch / name
        with self.naming(name):
            local.write_text(text, encoding="utf-8")
        self.put(local, name)

    def fetch(self, name: str, local: Path) -> Path:
        """A local file with the content of `name`: itself here; on S3 `local`, downloaded once."""
        del local
        return self.root / name

    def remove(self, name: str) -> None:
        with self.naming(name):
            (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise DatasetError(
                f"{self.uri}: {name} is missing; write or copy the dataset again"
            ) from error
        except OSError as error:
            what = f"{error.strerror or error}; check the folder's rights, or choose another"
            if error.errno == errno.ENOSPC:
                what = "the disk is full; free space and try again"
            if isinstance(error, FileExistsError | NotADirectoryError):
                what = "a file is in the way; choose another folder"
            where = f"{self.uri}/{name}".rstrip("/")
            raise DatasetError(f"{where}: {what}") from error


class S3Store(Store):
    """A bucket's prefix. An S3 object appears whole or not at all by itself."""

    remote = True

    def __init__(self, uri: str) -> None:
        self.uri, self.prefix = uri.rstrip("/"), uri.removeprefix("s3://").strip("/")
        if not self.prefix:
            raise DatasetError(f"{uri}: names no bucket; give s3://bucket/prefix")
        self._files: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}  # s3fs' event loop must not cross processes

    @property
    def files(self) -> Any:
        if self._files is None:
            import s3fs  # a second to import, and only S3 needs it

            self._files = s3fs.S3FileSystem(
                config_kwargs={
                    "connect_timeout": CONNECT_SECONDS,
                    "read_timeout": READ_SECONDS,
                    "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
                },
                use_listings_cache=False,
            )
            self._files.retries = 2  # of s3fs, around botocore's: five by itself
        return self._files

    def exists(self, name: str) -> bool:
        with self.naming(name):
            return bool(self.files.exists(f"{self.prefix}/{name}"))

    def names(self) -> list[str]:
        with self.naming(""):
            try:
                found = self.files.ls(self.prefix, detail=False)
            except FileNotFoundError:
                bucket = self.prefix.split("/")[0]
                if self.prefix != bucket and self.files.exists(bucket):
                    return []
                raise
        return sorted(path.rsplit("/", 1)[-1] for path in found)

    def read(self, name: str) -> bytes:
        with self.naming(name):
            return bytes(self.files.cat_file(f"{self.prefix}/{name}"))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
            yield Path(folder)

    def put(self, local: Path, name: str) -> None:
        with self.naming(name):
            self.files.put_file(str(local), f"{self.prefix}/{name}")
        local.unlink()

    def fetch(self, name: str, local: Path) -> Path:
        if not local.exists():
            # Several processes may share the folder: each downloads to a name of its own.
            part = local.with_name(f".{local.name}.{os.getpid()}.part")
            try:
                with self.naming(name):
                    self.files.get_file(f"{self.prefix}/{name}", str(part))
                    os.replace(part, local)
            finally:
                part.unlink(missing_ok=True)
        return local

    def remove(self, name: str) -> None:
        with self.naming(name):
            self.files.rm_file(f"{self.prefix}/{name}")

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        with _s3_errors(f"{self.uri}/{name}".rstrip("/")):
            yield


def s3_buckets() -> list[str] | None:
    """The buckets of the S3 that the environment names; None where its keys may not list them.

    Raises:
        DatasetError: it does not answer, or refuses the keys.
    """
    files = S3Store("s3://any").files
    with _s3_errors("S3"):
        try:
            return [bucket["Name"] for bucket in files.call_s3("list_buckets")["Buckets"]]
        except PermissionError as error:
            if "(AccessDenied)" not in str(error.__cause__):  # which is said of keys that are right
                raise
    return None


@contextmanager
def _s3_errors(where: str) -> Iterator[None]:
    import botocore.exceptions as boto

    endpoint = variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL")
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"{where}: no such bucket or object ({error}); make the bucket or check the name"
        ) from error
    except PermissionError as error:
        raise DatasetError(
            f"{where}: access denied ({error}); check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY and the bucket's policy"
        ) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise DatasetError(
            f"{where}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except (boto.BotoCoreError, boto.ClientError, OSError, TimeoutError) as error:
        raise DatasetError(
            f"{where}: S3 at {endpoint or 'AWS'} does not answer as it should "
            f"({type(error).__name__}: {error}); check AWS_ENDPOINT_URL and the network"
        ) from error
