"""Share fixtures between the rooms of sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.planning.compute_plan import ComputePlan
from engine.shape.policies import Policy
from sweep.cluster import early_ray
from sweep.plan import feasibility
from tests.support.conf_parsed_once import conf_parsed_once
from tests.support.watched_sweep import WatchedSweep, watched_sweep


@pytest.fixture(scope="session", autouse=True)
def _conf() -> Iterator[None]:
    with conf_parsed_once():
        yield


@pytest.fixture(autouse=True)
def _no_early_ray(monkeypatch) -> None:
    """Start no Ray in the tests' own process, however long a preparation takes: a process reads Ray's token once."""
    monkeypatch.setattr(early_ray, "PREPARED_SOON_S", 3600.0)


@pytest.fixture(scope="session")
def watched(tmp_path_factory) -> WatchedSweep:
    """Return the one sweep under Ray in which every fault happens; the processes of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    return watched_sweep((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "watched")


@pytest.fixture
def planned(monkeypatch) -> list[TrainConfig]:
    """Install a planner that needs 1 GiB per rank; return the list of its calls."""
    asked = []

    def plan(config, shape, card, host_gib):
        asked.append(config)
        if config.lora.lora_dropout > host_gib:
            raise OutOfMemory("needs more on the host")
        if config.lora.rank > card.memory_gib:
            raise OutOfMemory("needs more", float(config.lora.rank))
        memory = type("Memory", (), {"peak_gib": float(config.lora.rank), "reserve_gib": 0.5, "phases": {}})
        return ComputePlan(2, Policy.RECOMPUTE, 0, 0, 0.0, memory=memory)

    monkeypatch.setattr(feasibility, "make_compute_plan", plan)
    return asked
