"""After a step has run out of memory, the fastest plan that is leaner by a real margin is tried."""

import itertools

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.planning.cards import find_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.ladder import leaner
from engine.planning.memory_limit import MARGIN, Lessons
from engine.planning.planner import make_compute_plan
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER, Policy

QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
SHAPE = ModelShape.of(QWEN_7B, "qwen2.5-7b")
SMALL = ModelShape.of({**QWEN_7B, "num_hidden_layers": 4}, "four of its layers")
H100 = find_card("h100")


def config(length=1024, rank=16, **train):
    values = {"max_tokens": 10**6, "tokens_per_step": 16384, "memory_budget_gib": 23.5, **train}
    return parse(TrainConfig, {
        "model": {"path": "m"}, "data": {"train": "d", "max_seq_length": length}, "lora": {"rank": rank}, "train": values
    })  # fmt: skip


def ladder(first, wanted, **known):
    """Return all plans of the small model until none is leaner."""
    plans, lessons = [first], Lessons()
    while (following := leaner(plans[-1], wanted, SMALL, H100, lessons=lessons, **known)) is not None:
        plans.append(following)
    return plans


def test_the_next_plan_gives_up_weights_and_not_half_of_the_speed():
    wanted = config()
    first = make_compute_plan(wanted, SHAPE, H100)
    second = leaner(first, wanted, SHAPE, H100, lessons=Lessons())
    assert second.speed.tokens_per_second > 0.9 * first.speed.tokens_per_second
    assert second.speed.parts["waiting for the host"] < 0.1 * second.speed.step_time_ms
    assert second.need_gib <= (1.0 - MARGIN) * first.need_gib
    # no other plan that is so lean is faster
    for cuda_graphs, gib, size in itertools.product((True, False), (0.0, 8.0, 13.0), (1, 2, 8)):
        fixed = config(cuda_graphs=cuda_graphs, weight_cache_gib=gib, micro_batch_size=size, activation_checkpointing=False)
        other = make_compute_plan(config(**{**fixed.train.model_dump(), "memory_budget_gib": 79.0}), SHAPE, H100)
        if other.need_gib <= (1.0 - MARGIN) * first.need_gib:
            assert other.speed.tokens_per_second <= 1.011 * second.speed.tokens_per_second


def test_each_plan_needs_less_than_the_one_before_until_there_is_none():
    wanted = config(memory_budget_gib=6.5)
    plans = ladder(make_compute_plan(wanted, SMALL, H100), wanted)
    needs = [plan.need_gib for plan in plans]
    assert all(b < a for a, b in itertools.pairwise(needs[:-1])) and needs[1] <= (1.0 - MARGIN) * needs[0]
    last = plans[-1]  # loading is its peak, as that of the plan before
    assert needs[-1] <= needs[-2] and last.memory.phase == "load"
    assert (last.micro_batch_size, last.weight_cache_gib, last.policy) == (1, 0.0, Policy.OFFLOAD)


def test_what_a_failure_showed_holds_for_later_trials_of_its_kind():
    wanted, lessons = config(4096, memory_budget_gib=6.5), Lessons()
    first = make_compute_plan(wanted, SMALL, H100)
    second = leaner(first, wanted, SMALL, H100, lessons=lessons)
    assert second.need_gib < first.need_gib and make_compute_plan(wanted, SMALL, H100, lessons=lessons) == second
    longer = config(8192, memory_budget_gib=6.5)
    assert make_compute_plan(longer, SMALL, H100, lessons=lessons).need_gib < make_compute_plan(longer, SMALL, H100).need_gib
    recorded = config(4096, memory_budget_gib=6.5, cuda_graphs=True)
    assert make_compute_plan(recorded, SMALL, H100, lessons=lessons) == make_compute_plan(recorded, SMALL, H100)


def test_memory_that_others_took_teaches_nothing_but_makes_the_next_plan_fit():
    wanted, lessons = config(4096, memory_budget_gib=6.5), Lessons()
    first = make_compute_plan(wanted, SMALL, H100)
    second = leaner(first, wanted, SMALL, H100, lessons=lessons, had_gib=5.0)
    assert first.need_gib > 5.5 and second.need_gib <= 5.0 and not lessons.factors


def test_fixed_values_stay_while_a_plan_keeps_them():
    wanted = config(4096, memory_budget_gib=6.5, micro_batch_size=2, activation_checkpointing="selective")
    plans = ladder(make_compute_plan(wanted, SMALL, H100), wanted)
    assert {(plan.micro_batch_size, plan.policy) for plan in plans[:2]} == {(2, Policy.SELECTIVE)}
    assert plans[-1].micro_batch_size == 1


@pytest.mark.parametrize("length, sizes", [(2048, [8, 8, 4, 2, 2, 2, 1, 1, 1]), (512, [8, 8, 8, 8, 4, 2, 1, 1, 1])])
def test_without_predictions_short_rows_are_halved_last(length, sizes):
    wanted, plans = config(length), [ComputePlan(8, Policy.KEEP, 0, 0, 2.0)]
    while (following := leaner(plans[-1], wanted, None, None, lessons=Lessons())) is not None:
        plans.append(following)
    assert [plan.micro_batch_size for plan in plans] == sizes and plans[1].weight_cache_gib == 0.0
    assert [LADDER.index(plan.policy) for plan in plans] == sorted(LADDER.index(plan.policy) for plan in plans)
    assert plans[-2].policy is Policy.OFFLOAD and not plans[-2].offload_optimizer and plans[-1].offload_optimizer
    rest = leaner(ComputePlan(1, Policy.OFFLOAD, 3, 4, 0.0), wanted, None, None, lessons=Lessons())
    assert (rest.keep_layers, rest.host_layers) == (0, 4)
    assert leaner(rest, wanted, None, None, lessons=Lessons()).host_layers == 0


def test_only_states_of_8_bits_go_to_the_host():
    plan, wanted = ComputePlan(1, Policy.OFFLOAD, 0, 0, 0.0), config()
    others = wanted.model_copy(update={"optim": wanted.optim.model_copy(update={"name": "adamw"})})
    assert leaner(plan, wanted, None, None, lessons=Lessons()).offload_optimizer
    assert leaner(plan, others, None, None, lessons=Lessons()) is None


def test_without_predictions_recordings_go_before_short_rows_and_host_copies():
    wanted = config(512)
    kept = leaner(ComputePlan(4, Policy.KEEP, 0, 0, 0.0, True), wanted, None, None, lessons=Lessons())
    assert (kept.policy, kept.cuda_graphs) == (Policy.SELECTIVE, True)
    plain = leaner(ComputePlan(4, Policy.RECOMPUTE, 0, 0, 0.0, True), wanted, None, None, lessons=Lessons())
    assert (plain.micro_batch_size, plain.policy, plain.cuda_graphs) == (4, Policy.RECOMPUTE, False)
