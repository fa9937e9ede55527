"""The page of models has a row for every family that the installed transformers can load to write text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.support.model_families import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = "python -m tests.faults.test_model_families --table docs/models.md"


def test_the_page_s_families_are_those_of_the_installed_transformers():
    text = PAGE.read_text()
    written = re.search(r"family of transformers (\S+) ", text)[1]
    if written != transformers.__version__:
        pytest.skip(f"the page is of transformers {written}; {COMMAND} writes it again")
    rows = re.findall(r"^\| ([\w.-]+) \|", text, re.M)[1:]  # without the head
    assert rows == families(), f"{COMMAND} writes it again"
    assert COMMAND in text
