"""The plan says what disk a sweep needs, and a sweep that no disk here could hold is refused."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import get_args

import pytest

from engine.config.optim_section import OptimConfig
from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.plan.disk_need import check_disk, disk_need
from sweep.plan.sweep_plan import make_sweep_plan
from tests.support.prepared import prepared

SPACE = {"lora.rank": {"choices": [4, 8]}, "lora.target_modules": {"choices": ["attention", "mlp"]}}
# a parameter count of rank x features: 100 features of attention, 300 of mlp
FEATURES = {"attention": 100, "mlp": 300}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)


def plan_for(tmp_path, **sections):
    values = {
        "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}, "space": SPACE,
        "lora": {"target_modules": "attention", "rank": 4}, "cluster": {"num_cpu_slots": 2},
        "sweep": {"num_trials": 3, "output_dir": str(tmp_path / "sweeps"), **sections.pop("sweep", {})}, **sections,
    }  # fmt: skip
    plan = make_sweep_plan(parse_sweep_config(values))
    counts = [probe.lora.rank * FEATURES[probe.lora.target_modules] for probe in plan.probes()]
    return plan, prepared(num_trainable=counts)


def test_most_is_the_largest_adapter_everywhere_and_three_checkpoints_a_slot(tmp_path):
    need = disk_need(*plan_for(tmp_path))
    largest, smallest = 8 * 300, 4 * 100
    assert need.adapters == (3 + 1) * largest * 4
    assert need.checkpoints == 2 * 3 * largest * (4 + 8)  # adamw on the CPU
    assert need.least == 3 * smallest * 4 + 2 * smallest * 12


def test_a_running_average_an_8_bit_optimizer_and_final_seeds_count(tmp_path):
    plain = disk_need(*plan_for(tmp_path))
    averaged = disk_need(*plan_for(tmp_path, optim={"ema_horizon": 0.1, "name": "adamw_8bit"}))
    assert averaged.checkpoints * 12 == plain.checkpoints * (4 + 2 + 4)
    seeds = disk_need(*plan_for(tmp_path, sweep={"final_seeds": 3}))
    assert seeds.adapters - plain.adapters == 2 * 2 * 8 * 300 * 4


@pytest.mark.parametrize("name", get_args(OptimConfig.model_fields["name"].annotation))
def test_each_optimizer_has_its_states_in_a_checkpoint(tmp_path, name):
    one, plain = disk_need(*plan_for(tmp_path, optim={"name": name})), disk_need(*plan_for(tmp_path))
    states = {"auto": 8, "adamw": 8, "adamw_8bit": 2, "lion": 4, "lion_8bit": 1, "muon": 4}
    assert one.checkpoints * (4 + 8) == plain.checkpoints * (4 + states[name]) and one.adapters == plain.adapters


def test_the_frozen_half_of_pissa_is_in_the_files_too(tmp_path):
    pissa, plain = (disk_need(*plan_for(tmp_path, lora={"start": start, "rank": 4})) for start in ("pissa", "default"))
    assert pissa.adapters == 2 * plain.adapters and pissa.checkpoints == 2 * plain.checkpoints


def test_paused_trials_keep_their_checkpoints(tmp_path):
    need = disk_need(*plan_for(tmp_path, sampler={"name": "freeze_thaw"}, sweep={"num_trials": 4}))
    assert need.num_resting == 4


def test_a_budget_that_may_end_the_sweep_early_lowers_what_it_surely_needs(tmp_path):
    whole, early = disk_need(*plan_for(tmp_path)), disk_need(*plan_for(tmp_path, sweep={"budget": {"gpu_hours": 1}}))
    assert early.least < whole.least and early.most == whole.most


def free(monkeypatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))


def test_a_disk_that_cannot_hold_the_least_is_refused_and_one_that_may_fill_up_is_a_warning(tmp_path, monkeypatch):
    plan, facts = plan_for(tmp_path)
    need, said = disk_need(plan, facts), []
    free(monkeypatch, int(need.least) - 1)
    with pytest.raises(InputError, match="sweep.output_dir = .*free at least.*lower sweep.num_trials"):
        check_disk(plan, facts, None, said.append)
    free(monkeypatch, int(need.least))
    assert check_disk(plan, facts, None, said.append)[0].startswith("the disk may fill up")
    free(monkeypatch, int(need.most))
    assert check_disk(plan, facts, None, said.append) == []
    assert all(line.startswith("disk       at most ") for line in said) and len(said) == 3
    assert not (tmp_path / "sweeps").exists()


def test_what_a_resumed_sweep_holds_already_is_not_needed_again(tmp_path, monkeypatch):
    plan, facts = plan_for(tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "adapter").write_bytes(bytes(int(disk_need(plan, facts).most)))
    free(monkeypatch, 0)
    assert check_disk(plan, facts, tmp_path / "sweep", lambda line: None) == []


def test_the_starts_of_warm_clones_count_and_those_that_are_there_free_no_other_need(tmp_path, monkeypatch):
    plan, facts = plan_for(tmp_path, sweep={"num_trials": 9})
    plain, warm = disk_need(plan, facts), disk_need(plan, facts, 2)
    assert (warm.starts, plain.starts) == (2 * 8 * 300 * 4, 0)
    assert (plain.num_trials, warm.num_trials) == (4, 6)  # the space has four points, and clones may repeat them
    for number in (5, 6):
        (tmp_path / "sweep" / "trials" / f"{number:04d}" / "start").mkdir(parents=True)
    (tmp_path / "sweep" / "trials" / "0005" / "start" / "adapter").write_bytes(bytes(int(plain.most)))
    free(monkeypatch, int(warm.most - plain.most) - 1)
    said: list[str] = []
    assert check_disk(plan, facts, tmp_path / "sweep", said.append) != []
    assert "starts of 2 warm clones" in said[0]
    free(monkeypatch, int(warm.most - plain.most))
    assert check_disk(plan, facts, tmp_path / "sweep", said.append) == []


def test_the_tokenizer_beside_each_adapter_counts(tmp_path):
    plan, facts = plan_for(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(bytes(10_000))
    (tmp_path / "model.safetensors").write_bytes(bytes(1_000_000))
    here = prepared(num_trainable=facts.num_trainable, model_path=str(tmp_path))
    assert disk_need(plan, here).adapters - disk_need(plan, facts).adapters == 4 * 10_000
