"""Let the tests of the documents compose quickly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.conf_parsed_once import conf_parsed_once


@pytest.fixture(scope="session", autouse=True)
def _conf() -> Iterator[None]:
    with conf_parsed_once():
        yield
