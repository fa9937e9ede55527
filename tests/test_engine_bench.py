"""The step benchmark on a tiny shape: all systems compute the same loss, and the table shows failures as rows."""

import argparse

import pytest

from engine.bench.__main__ import SYSTEMS, _table, measure

OPTIONS = {"model": "tiny", "batch": 2, "length": 32, "rank": 4, "dropout": 0.0, "keep": False, "cap_gib": None, "steps": 2}


def test_all_systems_compute_the_same_first_loss():
    rows = [measure(argparse.Namespace(**OPTIONS, child=system)) for system in SYSTEMS]
    assert {row["system"] for row in rows} == set(SYSTEMS)
    for row in rows[1:]:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=1e-2)


def test_a_failed_system_is_a_row_with_its_reason():
    text = _table([{"system": "peft", "error": "out of memory"}], argparse.Namespace(**OPTIONS))
    assert text.splitlines()[-1].split(maxsplit=1) == ["peft", "out of memory"]
