"""Sweeps run on a Ray cluster of several real nodes on one machine, with the fake engine.

`make faults` runs these tests.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.fake_engine import EVALUATED_IN

from . import nodes as cluster_nodes
from .nodes import Nodes
from .sweeps import Driver, Sweep, config, only_folder

# longer than a worker takes to start: a waiting trial takes any worker that becomes free
RUNG_S = 4.0
pytestmark = [pytest.mark.faults, pytest.mark.timeout(0)]


def places(folder: Path, nodes: Nodes, num_nodes: int) -> dict[int, set[int]]:
    """Return trial -> the added nodes, counted from 0, whose processes trained it.

    The head trained the others. Call it while the nodes live.
    """
    found = {}
    for file in folder.glob("trials/*/starts.txt"):
        pids = {int(line.split()[0]) for line in file.read_text().splitlines()}
        found[int(file.parent.name)] = {node for node in range(num_nodes) for pid in pids if nodes.has(node, pid)}
    return found


class Watched:
    """Records where each trial trains while the sweep runs, because its workers end with it."""

    def __init__(self, driver: Driver, output: Path, nodes: Nodes, num_nodes: int) -> None:
        self.places: dict[int, set[int]] = {}
        while driver.process.poll() is None:
            folder = only_folder(output)
            for trial, seen in places(folder, nodes, num_nodes).items() if folder else ():
                self.places.setdefault(trial, set()).update(seen)
            time.sleep(0.5)


def test_a_sweep_finds_the_cluster_by_auto_and_trains_on_all_its_nodes(tmp_path, monkeypatch):
    with Nodes(num_cpus=1) as nodes:
        nodes.add(1)
        # what `ray start` would leave in a file of /tmp
        monkeypatch.setitem(cluster_nodes.ENV, "RAY_ADDRESS", nodes.address)
        whole = config(
            tmp_path / "sweeps", optim={"eps": RUNG_S}, cluster={"address": "auto"}, pruner={"name": "none"},
            sweep={"num_trials": 4},
        )  # fmt: skip
        driver = Driver.start(whole, tmp_path)
        watched = Watched(driver, tmp_path / "sweeps", nodes, 1)
        assert driver.wait() == 0, driver.text()
    assert "slots      2 slots of 1 CPU core" in driver.text()
    assert Sweep.read(only_folder(tmp_path / "sweeps")).faults == []
    on_added = {trial for trial, seen in watched.places.items() if seen}
    assert on_added and set(watched.places) - on_added  # some on each
    (place,) = tmp_path.glob(f"sweeps/*/trials/*/{EVALUATED_IN}")
    # a slot evaluated the winner again: the driver's machine may have no card
    assert place.read_text() == "cluster"


def test_a_trial_that_fits_one_kind_of_card_goes_there_and_the_others_go_anywhere(tmp_path):
    with Nodes(num_cpus=1) as nodes:
        for card in ("rtx3090", "l4"):
            nodes.add(1, card)
        space = {"lora.rank": {"choices": [4, 23, 64]}, "optim.learning_rate": {"choices": [1e-4, 1e-3]}}
        whole = config(
            tmp_path / "sweeps", optim={"eps": RUNG_S}, cluster={"address": nodes.address}, 
            data={"train": "t", "max_seq_length": 8}, space=space,
            sampler={"name": "grid"}, pruner={"name": "none"}, sweep={"num_trials": 4, "objectives": ["eval_loss", "elapsed_s"]},
        )  # fmt: skip
        driver = Driver.start(whole, tmp_path)
        watched = Watched(driver, tmp_path / "sweeps", nodes, 2)
        assert driver.wait() == 0, driver.text()
    text, folder = driver.text(), only_folder(tmp_path / "sweeps")
    assert "cards      1 x rtx3090 (23.6 GiB), 1 x l4 (22.0 GiB)" in text
    assert "card       l4 (22.0 GiB), rtx3090 (23.6 GiB); for each trial the smallest that it fits" in text
    assert "WARNING: elapsed_s is compared over different cards" in text
    results = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("trials/*/result.json")}
    by_rank = {rank: [n for n, r in results.items() if r["params"]["lora.rank"] == rank] for rank in (4, 23, 64)}
    assert {results[n]["outcome"] for n in by_rank[4] + by_rank[23]} == {"COMPLETE"}
    assert {results[n]["outcome"] for n in by_rank[64]} <= {"INFEASIBLE"}
    assert len(by_rank[4]) == len(by_rank[23]) == 2
    assert {node for n in by_rank[23] for node in watched.places[n]} == {0}
    assert {node for n in by_rank[4] for node in watched.places[n]} >= {1}


def test_a_cluster_whose_token_we_do_not_have_is_refused_in_one_line(tmp_path, monkeypatch):
    with Nodes(num_cpus=1) as nodes:
        monkeypatch.setitem(cluster_nodes.ENV, "RAY_AUTH_TOKEN", "0" * 64)
        driver = Driver.start(config(tmp_path / "sweeps", cluster={"address": nodes.address}), tmp_path)
        assert driver.wait() == 2
    assert driver.text().count("\n") == 1 and "needs the cluster's RAY_AUTH_TOKEN" in driver.text()
    assert not (tmp_path / "sweeps").exists()
