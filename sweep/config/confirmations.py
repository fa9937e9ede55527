"""Ask for what a sweep folder alone may not decide.

The folder may come from someone else. Permission to run a model's own code or a metric's function,
the command at the end, and the address that MLflow's credentials are sent to, come from the command
line or the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import InputError
from sweep.config.sweep import SweepConfig

CODE, ADDRESS, ON_END = "model.trust_remote_code", "tracking.uri", "tracking.on_end"
CONFIRMED = (CODE, ADDRESS)
"""Fields that a resume may repeat, and must not change."""
CREDENTIALS = (
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_SECRET",
)  # fmt: skip
NAMED_ADDRESS = "MLFLOW_TRACKING_URI"


def refuse_unconfirmed(config: SweepConfig, given: Mapping[str, Any], environment: Mapping[str, str], home: Path | None) -> None:
    """Raise InputError if the folder's config asks for more than the command line and the environment allow.

    given: dotted path -> value of the command line. home: the user's home folder, if there is one.
    """
    if config.model.trust_remote_code and given.get(CODE) is not True:
        allowed = f"a sweep folder cannot permit that the model's own code runs; if you trust it, add {CODE}=true"
        raise InputError(CODE, True, allowed)
    if config.tracking.on_end is not None and given.get(ON_END) != config.tracking.on_end:
        allowed = f"a sweep folder cannot name what is started or posted to; repeat it if it is yours, or add {ON_END}=null"
        raise InputError(ON_END, config.tracking.on_end, allowed)
    for name, metric in config.metrics.own.items():
        if not any(given.get(key) == metric.function for key in own_keys(name)):
            allowed = f"a sweep folder cannot permit that a function runs; if you trust it, add metrics.{name}={metric.function}"
            raise InputError(f"metrics.{name}", metric.function, allowed)
    if given.get(ADDRESS) != config.tracking.uri:
        refuse_foreign_address(config, f"{ADDRESS}={config.tracking.public_uri}", environment, home)


def own_keys(name: str) -> tuple[str, ...]:
    """Return the keys under which the command line may name the function of a metric."""
    return f"metrics.{name}", f"metrics.{name}.function", f"metrics.own.{name}", f"metrics.own.{name}.function"


def own_functions(config: SweepConfig) -> dict[str, str]:
    """Return dotted key -> function of the user's metrics, which a resume may repeat and must not change."""
    return {key: metric.function for name, metric in config.metrics.own.items() for key in own_keys(name)}


def refuse_foreign_address(config: SweepConfig, way_out: str, environment: Mapping[str, str], home: Path | None) -> None:
    """Raise InputError if MLflow's credentials would go to a server that only the sweep folder names.

    way_out: what the user can type to name the server too.
    """
    uri, known = config.tracking.uri or "", credentials(environment, home)
    if config.tracking.name == "none" or not known or urlsplit(uri).scheme in ("", "sqlite", "file"):
        return
    if _origin(uri) != _origin(environment.get(NAMED_ADDRESS, "")):
        allowed = f"only the sweep folder names this server, and {known} would be sent to it; if that is right, add {way_out}"
        raise InputError(ADDRESS, config.tracking.public_uri, allowed)


def credentials(environment: Mapping[str, str], home: Path | None) -> str | None:
    """Name the first of MLflow's credentials that this user has, or None."""
    found = next((name for name in CREDENTIALS if environment.get(name)), None)
    file = home and home / ".mlflow" / "credentials"
    return found or (str(file) if file and file.is_file() else None)


def _origin(uri: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port: what decides where a request goes."""
    parts = urlsplit(uri)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
