"""Register the best adapter as a model version, so that `models:/<name>/<version>` is best/.

A version belongs to one sweep and one adapter, known by its digest. Writing the same adapter again
adds no version. A better adapter, found after a resume, becomes the next version.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

ADAPTER = "adapter_model.safetensors"
DIGEST = "adapter.sha256"


def register(client: Any, name: str, run: str, folder: Path, tags: dict[str, str], text: str) -> str:
    """Upload the folder to the run and make it a version of `name`; return the version's number.

    May fail anywhere and be called again. client: an MlflowClient; text: the version's description
    in Markdown, updated where it has changed.
    """
    digest = _digest(folder / ADAPTER)
    versions = [found for found in client.search_model_versions(f"run_id = '{run}'") if found.name == name]
    for version in versions:
        if version.tags.get(DIGEST) == digest:
            if version.description != text:
                client.update_model_version(name, version.version, text)
            return str(version.version)
    # an older version keeps its files
    place = folder.name if not versions else f"{folder.name}-{len(versions) + 1}"
    client.log_artifacts(run, str(folder), place)
    _create_model(client, name)
    source = f"{client.get_run(run).info.artifact_uri}/{place}"
    return str(client.create_model_version(name, source, run, {**tags, DIGEST: digest}, description=text).version)


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException  # here, because loading mlflow takes seconds

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name, description="Best adapters of sweeps; each version names its sweep.")
        except MlflowException as late:  # another sweep was quicker
            if late.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
