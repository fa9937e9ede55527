"""Test whole trials: accumulation, packing, exact resume, PEFT round trip and replay."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import CheckpointError, DivergedError, OutOfMemory
from engine.model.load import load_base
from engine.training.loop import train
from tests.support.trials import build, memory_ends_at, run, same_numbers


def test_a_trial_learns_and_reports_on_the_grid(tiny_config, tmp_path):
    config = build(tiny_config)
    reports = run(config, tmp_path)
    assert [r.rung for r in reports] == [1, 2, 3]
    assert all(r.tokens_seen >= grid for r, grid in zip(reports, config.train.report_grid()))
    assert reports[-1].eval_loss < reports[0].eval_loss < math.log(260)
    assert json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1]) == reports[-1].to_dict()


def test_a_trial_stopped_and_continued_is_bitwise_the_undisturbed_one(tiny_config, tmp_path):
    config = build(tiny_config, lora={"lora_dropout": 0.1})
    whole = run(config, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    parts = []
    for _ in range(3):  # a new generator each time, as after a crash
        generator = train(config, tmp_path / "parts")
        parts.append(next(generator))
        generator.close()
    assert same_numbers(whole, parts)
    assert list(train(config, tmp_path / "parts")) == []
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resident_base_gives_the_same_trial_as_a_fresh_one(tiny_config, tmp_path, base):
    config = build(tiny_config)
    run(build(tiny_config, lora={"rank": 8, "target_modules": ["q_proj"]}), tmp_path / "other", base)
    assert same_numbers(run(config, tmp_path / "warm", base), run(config, tmp_path / "cold"))


def test_accumulated_micro_batches_equal_one_large_batch(tiny_config, tmp_path):
    sizes = [(4, 1), (2, 2), (1, 4)]
    curves = [
        run(
            build(
                tiny_config,
                data={"packing": False},
                train={"tokens_per_step": None, "micro_batch_size": b, "gradient_accumulation_steps": a},
            ),
            tmp_path / f"{b}x{a}",
        )
        for b, a in sizes
    ]
    for curve in curves[1:]:
        for one, two in zip(curves[0], curve):
            assert (one.tokens_seen, one.target_tokens_seen, one.step) == (two.tokens_seen, two.target_tokens_seen, two.step)
            assert one.eval_loss == pytest.approx(two.eval_loss, rel=1e-5)
            assert one.train_loss == pytest.approx(two.train_loss, rel=1e-5)


def test_recomputed_activations_change_no_number(tiny_config, tmp_path):
    kept = run(build(tiny_config, lora={"lora_dropout": 0.1}), tmp_path / "kept")
    again = run(build(tiny_config, lora={"lora_dropout": 0.1}, train={"activation_checkpointing": True}), tmp_path / "again")
    assert [r.eval_loss for r in kept] == [r.eval_loss for r in again]


def test_every_rung_has_a_step_and_no_step_has_rate_0_where_steps_pass_rungs(tiny_config, tmp_path):
    config = build(tiny_config, train={"max_tokens": 300, "report_at_tokens": None, "num_reports": 4, "tokens_per_step": 256})
    assert config.longest_step > 300 // 4
    reports = run(config, tmp_path)
    assert [report.rung for report in reports] == [1, 2, 3, 4]
    assert [report.step for report in reports] == sorted({report.step for report in reports})
    assert min(report.learning_rate for report in reports) > 0.0
    assert len({report.eval_loss for report in reports}) == 4


def test_a_diverging_trial_ends_with_its_own_error(tiny_config, tmp_path):
    config = build(tiny_config, optim={"learning_rate": 1e30, "max_grad_norm": None})
    with pytest.raises(DivergedError, match="is (nan|inf)"):
        run(config, tmp_path)


def test_a_torn_checkpoint_is_refused(tiny_config, tmp_path):
    config = build(tiny_config)
    generator = train(config, tmp_path)
    next(generator)
    generator.close()
    weights = tmp_path / "checkpoint" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="checksums differ"):
        next(train(config, tmp_path))


def test_a_checkpoint_of_another_config_is_refused(tiny_config, tmp_path):
    generator = train(build(tiny_config), tmp_path)
    next(generator)
    generator.close()
    with pytest.raises(CheckpointError, match="belongs to config"):
        next(train(build(tiny_config, train={"seed": 1}), tmp_path))


def test_the_base_is_as_before_after_a_trial_whatever_happens(tiny_config, tmp_path, base):
    names = [name for name, _ in base.model.named_modules()]
    generator = train(build(tiny_config), tmp_path / "a", base=base)
    next(generator)
    generator.close()
    with pytest.raises(DivergedError):
        run(build(tiny_config, optim={"learning_rate": 1e30, "max_grad_norm": None}), tmp_path / "b", base)
    assert [name for name, _ in base.model.named_modules()] == names
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_step_without_room_is_computed_again_leaner_and_the_trial_ends_as_without(tiny_config, tmp_path, monkeypatch):
    options = {"tokens_per_step": 512, "micro_batch_size": 4, "activation_checkpointing": False, "keep_layers": 0}
    config = build(tiny_config, train=options)
    expected = run(config, tmp_path / "room")
    base = load_base(config.model, torch.device("cpu"))
    memory_ends_at(monkeypatch, 160)
    (tmp_path / "tight").mkdir()
    generator = train(config, tmp_path / "tight", base=base)
    tight = [next(generator)]
    generator.close()
    tight += list(train(config, tmp_path / "tight", base=base))  # resumed, it keeps the leaner plan
    # twice to keep less, twice to halve
    assert [r.num_out_of_memory for r in tight] == [4, 4, 4] and {r.micro_batch_size for r in tight} == {1}
    assert [(r.tokens_seen, r.step) for r in tight] == [(r.tokens_seen, r.step) for r in expected]
    assert [r.eval_loss for r in tight] == pytest.approx([r.eval_loss for r in expected], rel=1e-5)


def test_a_trial_that_fits_no_way_says_so_and_gives_the_base_back(tiny_config, tmp_path, monkeypatch):
    config = build(tiny_config, train={"micro_batch_size": 2, "activation_checkpointing": False, "keep_layers": 1})
    base = load_base(config.model, torch.device("cpu"))
    memory_ends_at(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match=r"recomputed, offloaded, optimizer states on the host: measured \d") as caught:
        list(train(config, tmp_path, base=base))
    assert caught.value.measured_gib > 0 and not any("lora" in name for name, _ in base.model.named_parameters())


def test_policies_give_bitwise_the_same_trial(tiny_config, tmp_path):
    curves = [
        run(build(tiny_config, train={"activation_checkpointing": policy, **counts}), tmp_path / f"{policy}{counts}")
        for policy, counts in (
            (False, {}),
            ("selective", {}),
            (True, {"keep_layers": 0}),
            ("offload", {"keep_layers": 0}),
            ("offload", {"keep_layers": 1, "host_layers": 1}),
        )
    ]
    losses = [[(r.eval_loss, r.train_loss, r.grad_norm) for r in curve] for curve in curves]
    assert all(other == losses[0] for other in losses[1:])


def test_a_plan_is_made_for_the_card_that_is_here_and_for_what_others_leave_of_it(tiny_config, monkeypatch):
    from types import SimpleNamespace

    from engine.config.parsing import to_json
    from engine.model.route import FASTEST, Route
    from engine.training.card_plan import CardPlanner

    gib = 2**30
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: shape), modules=lambda: [])
    stash = SimpleNamespace(memory=SimpleNamespace(num_bytes=0))
    base = SimpleNamespace(device=torch.device("cuda"), model=model, route=FASTEST, lasting={}, stash=stash)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * gib)
    values = json.loads(to_json(build(tiny_config, data={"max_seq_length": 2048}, train={"tokens_per_step": 16384})))
    del values["train"]["activation_checkpointing"]
    wanted = parse(TrainConfig, values)
    plans = {}
    for free_gib in (17.0, 6.0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free_gib=free_gib: (int(free_gib * gib), int(23.6 * gib)))
        planner = CardPlanner.here(wanted, base)
        plans[free_gib], known = planner.fastest(), planner.shape
        assert known.num_layers == 32 and plans[free_gib].memory.peak_gib < free_gib + 6.0
    assert plans[6.0].speed.tokens_per_second < plans[17.0].speed.tokens_per_second
    for slower in (Route(False, head_loss=False), Route(False, "eager", shares_rows=False)):  # whole logits, whole scores
        base.route = slower
        planner = CardPlanner.here(wanted, base)
        plan, known = planner.fastest(), planner.shape
        assert known is None and plan.memory is None and plan.micro_batch_size == 1


def test_trials_that_differ_in_rates_and_seed_share_their_plan_and_others_do_not(tiny_config, monkeypatch):
    from engine.planning.cards import find_card
    from engine.planning.memory_limit import Lessons
    from engine.shape.model_shape import ModelShape
    from engine.training import card_plan

    shape = ModelShape.of({"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}, "llama")  # fmt: skip
    made, make = [], card_plan.make_compute_plan
    monkeypatch.setattr(card_plan, "make_compute_plan", lambda *given, **named: made.append(1) or make(*given, **named))
    card_plan._plans.cache_clear()

    def plan(gib=23.6, host_gib=90.0, **sections):
        card = dataclasses.replace(find_card("rtx4090"), memory_gib=gib)
        return card_plan.CardPlanner(build(tiny_config, **sections), shape, card, host_gib, lessons).fastest()

    lessons = Lessons()
    one = plan()
    assert plan(optim={"learning_rate": 3e-4}) is one and plan(train={"seed": 5}, lora={"lora_alpha": 3}, gib=23.59) is one
    assert len(made) == 1
    averaged = {"optim": {"ema_horizon": 0.1}}
    assert plan(gib=12.0, host_gib=80.0) is one and len(made) == 1  # less memory, which would decide nothing
    others = [averaged, {"lora": {"rank": 8}}, {"data": {"max_seq_length": 64}}]
    for number, other in enumerate(others, 2):
        plan(**other)
        assert len(made) == number
    plan(optim={"ema_horizon": 0.2})  # the average takes the same memory
    assert len(made) == number
    lessons.factors[False, False] = 1.1  # what a failure showed changes plans
    assert plan() is not one and len(made) == number + 1
    with pytest.raises(OutOfMemory):  # memory that decides otherwise makes another
        plan(gib=1.0)
    card_plan._plans.cache_clear()
