"""In a cluster with several kinds of cards, each trial runs only on cards that it fits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from engine.command_answers import Facts, VisibleCard
from engine.errors import InputError
from sweep.cluster.card_kinds import card_kinds, selector
from sweep.cluster.early_ray import OwnRay
from sweep.cluster.slots import Slots
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import parse_sweep_config
from sweep.plan.feasibility import make_feasibility
from sweep.plan.forecast import card_line
from sweep.plan.sweep_plan import SweepPlan
from sweep.space.parse import parse_space
from tests.support.fake_engine import SHAPE
from tests.support.fake_sweeps import BASE
from tests.support.fits import config_with

L4, A10G, A100 = ("ray.io/accelerator-type", "L4"), ("ray.io/accelerator-type", "A10G"), ("ray.io/accelerator-type", "A100")


def node(num_gpus: float, *labels: tuple[str, str], alive: bool = True) -> dict:
    """Describe a node as ray.nodes() does."""
    return {"Alive": alive, "Resources": {"CPU": 8.0, "GPU": num_gpus} if num_gpus else {"CPU": 8.0}, "Labels": dict(labels)}


def test_the_kinds_of_a_cluster_are_read_off_its_nodes_labels():
    geforce = ("ray.io/accelerator-type", "GeForce-RTX-3090")
    nodes = [node(1, L4), node(2, L4), node(1, L4, alive=False), node(0), node(4, geforce), node(1, ("card", "a100-40"), A100)]
    assert [kind.describe() for kind in card_kinds(nodes)] == [
        "1 x a100-40 (39.4 GiB)", "4 x rtx3090 (23.6 GiB)", "3 x l4 (22.0 GiB)"]  # fmt: skip
    assert card_kinds([node(8, A100)])[0].card is None  # 40 or 80 GB: the label does not say
    assert [kind.describe() for kind in card_kinds([node(1), node(1, A100)])] == [
        "1 x a card without a label (not known)", "1 x A100 (not known)"]  # fmt: skip
    assert card_kinds([node(0)]) == ()


def test_a_label_of_the_user_that_names_no_card_is_refused():
    with pytest.raises(InputError, match=r"a node's label card = 'rtx3080': must be one of rtx3090, "):
        card_kinds([node(1, ("card", "rtx3080"))])


def test_a_selector_excludes_labels_and_lets_nodes_without_any_pass():
    assert selector([]) == {}
    assert selector([L4, ("card", "a10"), A10G]) == {"card": "!in(a10)", "ray.io/accelerator-type": "!in(A10G,L4)"}
    assert Slots(2, "cuda", 3).bundle([L4]) == ({"CPU": 3.0, "GPU": 1.0}, {"ray.io/accelerator-type": "!in(L4)"})
    assert Slots(2, "cpu", 3).bundle() == ({"CPU": 3.0}, {})


def test_a_trial_fits_if_it_fits_one_kind_and_avoids_the_others(planned):
    kinds = card_kinds([node(1, L4), node(1, ("card", "rtx3090"))])
    cards = make_feasibility("auto", Facts(shape=SHAPE), kinds)
    small, large, none = (config_with(lora={"rank": rank}) for rank in (8, 23, 64))
    assert (cards.check_fit(small).fits, cards.check_fit(large).fits, cards.check_fit(none).fits) == (True, True, False)
    # what it lacks on the largest card
    assert cards.check_fit(none).excess_gib == pytest.approx(64.0 - 23.6)
    assert (cards.avoid(small), cards.avoid(large), cards.avoid(none)) == ((), (L4,), ())
    assert card_line(cards) == (
        "card       l4 (22.0 GiB), rtx3090 (23.6 GiB); for each trial the smallest that it fits; "
        "speeds extrapolated from the data sheet"
    )
    # the twin: a user who names a card means that one
    named = make_feasibility("l4", Facts(shape=SHAPE), kinds)
    assert not named.check_fit(large).fits and named.avoid(large) == ()


def test_what_fits_no_card_that_is_known_may_fit_one_that_is_not(planned):
    cards = make_feasibility("auto", Facts(shape=SHAPE), card_kinds([node(1, L4), node(1, A100)]))
    large = config_with(lora={"rank": 64})
    assert cards.check_fit(large).fits and cards.avoid(large) == (L4,)


def test_the_drivers_own_card_counts_with_the_memory_it_says_it_has(planned):
    found = VisibleCard("NVIDIA L4", 22.5)
    cards = make_feasibility("auto", Facts(shape=SHAPE, card=found), card_kinds([node(2, L4)]))
    assert cards.card.memory_gib == 22.5
    unknown = make_feasibility("auto", Facts(shape=SHAPE, card=found), card_kinds([node(2, A100)]))
    assert unknown.card.memory_gib == 22.5  # nothing else is known


def test_times_over_several_kinds_of_cards_are_warned_of():
    def plan(objectives: list[str], *labels: tuple[str, str]) -> SweepPlan:
        config = parse_sweep_config({**BASE, "sweep": {"objectives": objectives}})
        return SweepPlan(config, parse_space({}), Slots(2, "cuda", 1), card_kinds([node(1, label) for label in labels]))

    assert "compared over different cards" in plan(["eval_loss", "elapsed_s"], L4, A10G).warnings()[0]
    assert plan(["eval_loss", "elapsed_s"], L4).warnings() == plan(["eval_loss"], L4, A10G).warnings() == []
    assert "cards      1 x a10g (22.0 GiB), 1 x l4 (22.0 GiB)" in plan(["eval_loss"], L4, A10G).describe()


def test_a_resume_may_go_to_another_cluster_and_not_to_another_model():
    config = parse_sweep_config({**BASE, "cluster": {"address": "10.0.0.1:6379", "num_gpus": 4}})
    overrides = {"cluster.address": "10.0.0.2:6379", "cluster.num_gpus": 2, "cluster.wait_s": 60}
    moved = apply_resume_changes(config, overrides).cluster
    assert (moved.address, moved.num_gpus, moved.wait_s) == ("10.0.0.2:6379", 2, 60.0)
    with pytest.raises(InputError, match="cannot be changed on resume"):
        apply_resume_changes(config, {"model.path": "n"})
    with pytest.raises(InputError, match=r"cluster.wait_s = -1: "):
        apply_resume_changes(config, {"cluster.wait_s": -1})


def test_an_address_where_nothing_listens_is_refused_at_once():
    """Ray itself would try for two minutes and print a line for each try."""
    from sweep.cluster.connect import _refuse_unreachable

    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{ours.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"cluster.address = '{address}': must be a running Ray cluster \(.*refused\)"):
            _refuse_unreachable(address)
        ours.listen()
        _refuse_unreachable(address)  # the twin
    for left_to_ray in ("auto", "local", "ray://127.0.0.1:1"):
        _refuse_unreachable(left_to_ray)


def test_workers_are_told_the_folder_that_holds_both_packages(monkeypatch):
    from sweep.cluster import own_ray

    monkeypatch.setenv("PYTHONPATH", "theirs")
    monkeypatch.setattr(own_ray.ray, "init", lambda **options: None)
    monkeypatch.setattr(own_ray.ray, "nodes", lambda: [{"NodeManagerAddress": own_ray.LOOPBACK}])
    own_ray.start_ray(OwnRay(Slots(1, "cpu", 1)))
    ours, theirs = os.environ["PYTHONPATH"].split(os.pathsep)
    assert Path(ours, "sweep", "driver.py").is_file() and Path(ours, "engine").is_dir() and theirs == "theirs"
