"""Define where other programs can follow a sweep, and what hears of its end."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from engine.config.parsing import StrictModel
from engine.errors import InputError
from sweep.text import without_password


def is_address(on_end: str | None) -> bool:
    """Return whether tracking.on_end is an address to post to, not a command."""
    return on_end is not None and on_end.startswith(("http://", "https://"))


class TrackingConfig(StrictModel):
    """Set where other programs can follow the sweep: in MLflow, and on a page for Prometheus."""

    name: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = Field(None, description="null: sqlite:///<output_dir>/mlflow.db")
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = Field(
        None, description="port of the driver's page for Prometheus; 0: any free port; null: no page"
    )
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="address on which the page listens; 127.0.0.1: for this machine only"
    )
    registered_model: str | None = Field(
        "auto",
        pattern=r"^[^/:]+$",
        max_length=200,
        description="model of which the best adapter becomes a version, without / and :; auto: the sweep's name; null: none",
    )

    tensorboard: bool = Field(False, description="true: also TensorBoard event files, in tensorboard/ of the sweep folder")
    on_end: str | None = Field(
        None,
        min_length=1,
        description="command, or http(s) address to post to, when the sweep ends in any way; it gets JSON; null: none",
    )

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        """Refuse a password, because sweep_config.json in every sweep folder would hold it."""
        found = re.search(r"//([^/\s]*)@", uri or "")
        if found and ":" in found[1]:
            shown = re.sub(r"//[^/\s]*@", "//...@", uri)
            allowed = "must hold no password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            raise InputError("tracking.uri", shown, f"{allowed} (for a database, use its password file)")
        return uri

    @field_validator("on_end")
    @classmethod
    def _is_one_command(cls, on_end: str | None) -> str | None:
        """Refuse words that cannot be told apart. Whether the program is here, the driver checks."""
        if on_end is not None and not is_address(on_end):
            try:
                words = shlex.split(on_end)
            except ValueError as error:
                raise ValueError(f"must be a command or an http(s) address ({error})") from None
            if not words:
                raise ValueError("must be a command or an http(s) address")
        return on_end

    @property
    def public_on_end(self) -> str | None:
        """Return on_end for others to see: an address often holds a key."""
        if not is_address(self.on_end):
            return self.on_end
        parts = urlsplit(self.on_end)
        return f"{parts.scheme}://{parts.hostname}/..."

    @property
    def public_uri(self) -> str | None:
        """Return the URI without the user and password that it may contain."""
        return None if self.uri is None else without_password(self.uri)
