"""The parts of the local stack: how each is started, where it answers, what it needs to be there.

The settings are those of compose.yaml, with this machine's folders and addresses in them.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from infra.runtime.environment import everything

INFRA = Path(__file__).parent.parent
HOST = "127.0.0.1"
BUCKET = "liveedit"
ACCESS_KEY = "liveedit"


@dataclass(frozen=True)
class Settings:
    """`data` is an absolute folder that holds everything that is kept, `application` the HOST:PORT
    that Prometheus watches; the rest are ports."""

    data: Path
    application: str
    mlflow: int
    s3: int
    prometheus: int
    grafana: int

    @property
    def environment_file(self) -> Path:
        return self.data / "environment.sh"

    @property
    def secret_key(self) -> str:
        """Of the S3 store."""
        return self._secret.read_text()

    @property
    def _secret(self) -> Path:
        return self.data / "s3-secret-key"

    def prepare(self) -> None:
        """Make the folder, the store's key and the file that a shell reads."""
        (self.data / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)
        if not self._secret.exists():
            self._secret.touch(mode=0o600)
            self._secret.write_text(secrets.token_hex(20))
        values = {
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{self.mlflow}",
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.s3}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.environment_file.touch(mode=0o600)
        lines = [f"export {name}={value}\n" for name, value in values.items()]
        self.environment_file.write_text("".join(lines))


@dataclass(frozen=True)
class Server:
    """A server. `ready` is a URL that answers when it is up, `address` what people open."""

    name: str
    port: int
    address: str
    ready: str
    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Missing:
    """A server that is not installed here."""

    name: str
    remedy: str


def mlflow(settings: Settings) -> Server | Missing:
    url = f"http://{HOST}:{settings.mlflow}"
    database = settings.data / "mlflow.db"
    if not database.exists():
        _make_database(database)
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        f"--backend-store-uri=sqlite:///{database}",
        f"--artifacts-destination={settings.data / 'artifacts'}",
        *(f"--host={HOST}", f"--port={settings.mlflow}", "--workers=1"),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return _part("mlflow", settings.mlflow, f"{url}/health", command, quiet)


def _make_database(path: Path) -> None:
    """MLflow's tables, all or none: it cannot go on with those of a start that was interrupted.

    Raises OSError with MLflow's reason.
    """
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments(max_results=1)"
    command = [sys.executable, "-c", code, f"sqlite:///{unfinished}"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        reason = made.stderr.strip().splitlines()[-1]
        raise OSError(f"MLflow cannot make its database {path}: {reason}")
    unfinished.replace(path)


def s3(settings: Settings) -> Server | Missing:
    if find_spec("nanio") is None:
        return Missing("s3", "pip install nanio, or use an S3 store that you have")
    command = [
        *(sys.executable, "-m", "nanio", "serve", "--host", HOST, "--port", str(settings.s3)),
        *("--data-dir", str(settings.data / "s3"), "--log-level", "warning", "--no-access-log"),
    ]
    keys = {"NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": settings.secret_key}
    return _part("s3", settings.s3, f"http://{HOST}:{settings.s3}/", command, keys)


def prometheus(settings: Settings) -> Server | Missing:
    binary = shutil.which("prometheus")
    if binary is None:
        return Missing(
            "prometheus", "apt install prometheus, or https://prometheus.io/download on the PATH"
        )
    folder = settings.data / "prometheus"
    folder.mkdir(exist_ok=True)
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copyfile(INFRA / "prometheus" / name, folder / name)
    (folder / "targets.yml").write_text(f"- targets: [{settings.application!r}]\n")
    command = [
        *(binary, f"--config.file={folder / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"),
        f"--web.listen-address={HOST}:{settings.prometheus}",
    ]
    url = f"http://{HOST}:{settings.prometheus}/-/ready"
    return _part("prometheus", settings.prometheus, url, command, {})


def grafana(settings: Settings) -> Server | Missing:
    binary = shutil.which("grafana")
    home = _grafana_home(Path(binary)) if binary else None
    if binary is None or home is None:
        return Missing("grafana", "https://grafana.com/grafana/download, its bin/ on the PATH")
    dashboards = INFRA / "grafana" / "dashboards"
    environment = {
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(settings.grafana),
        "GF_PATHS_DATA": str(settings.data / "grafana"),
        "GF_PATHS_PROVISIONING": str(INFRA / "grafana" / "provisioning"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "PROMETHEUS_URL": f"http://{HOST}:{settings.prometheus}",
        "DASHBOARDS": str(dashboards),
    }
    url = f"http://{HOST}:{settings.grafana}/api/health"
    command = [binary, "server", f"--homepath={home}"]
    return _part("grafana", settings.grafana, url, command, environment)


def _grafana_home(binary: Path) -> Path | None:
    """Where Grafana's own files are: beside its bin/, or where packages put them."""
    beside = binary.resolve().parent.parent
    for home in (beside, beside / "share" / "grafana", Path("/usr/share/grafana")):
        if (home / "conf" / "defaults.ini").is_file():
            return home
    return None


def _part(
    name: str, port: int, ready: str, command: list[str], environment: dict[str, str]
) -> Server:
    address = f"http://{HOST}:{port}"
    return Server(name, port, address, ready, command, {**everything(), **environment})


SERVERS: tuple[Callable[[Settings], Server | Missing], ...] = (mlflow, s3, prometheus, grafana)
