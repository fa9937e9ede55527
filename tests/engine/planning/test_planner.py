"""Plans suit the card and compute the same result."""

import json

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.memory.prediction import fits
from engine.planning.cards import find_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.known_cards import with_known_rates
from engine.planning.planner import changed, make_compute_plan
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER, Policy

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
SHAPE = ModelShape.of(LLAMA_8B, "llama-3.1-8b")


def config(length=2048, rank=16, **train):
    values = {"max_tokens": 10**6, "tokens_per_step": 16384, **train}
    return parse(TrainConfig, {
        "model": {"path": "m"}, "data": {"train": "d", "max_seq_length": length}, "lora": {"rank": rank}, "train": values
    })  # fmt: skip


# every length on a card of 24 GB, and on one of 80 where more than one policy fits
LENGTHS = {"rtx3090": (512, 8192, 131072), "l4": (2048, 32768), "h100": (512, 8192, 131072)}


@pytest.mark.parametrize(("name", "length"), [(name, length) for name, lengths in LENGTHS.items() for length in lengths])
def test_a_plan_fits_its_card_and_leaves_the_step_as_it_was(name, length):
    wanted = config(length)
    chosen = make_compute_plan(wanted, SHAPE, find_card(name))
    applied = chosen.apply(wanted)
    assert fits(chosen.memory, find_card(name).memory_gib)
    assert applied.bins_per_step == wanted.bins_per_step and applied.fingerprint() == wanted.fingerprint()
    assert "auto" not in chosen.settings().values()
    assert wanted.bins_per_step % chosen.micro_batch_size == 0


def test_more_memory_is_never_slower_and_what_is_given_stays():
    plans = [make_compute_plan(config(8192, memory_budget_gib=gib), SHAPE, find_card("h100")) for gib in (12.0, 24.0, 48.0, 79.0)]
    speeds = [chosen.speed.tokens_per_second for chosen in plans]
    assert speeds == sorted(speeds) and speeds[-1] > 1.05 * speeds[0]
    fixed = {"micro_batch_size": 4, "activation_checkpointing": "offload", "keep_layers": 2, "host_layers": 3}
    fixed |= {"weight_cache_gib": 1.0, "cuda_graphs": False, "offload_optimizer": True}
    assert make_compute_plan(config(512, **fixed), SHAPE, find_card("rtx4090")).settings() == fixed


def test_launches_are_recorded_where_the_host_is_too_slow_and_nothing_forbids_it():
    small = ModelShape.of({**LLAMA_8B, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                           "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}, "small")  # fmt: skip
    short = {"micro_batch_size": 1, "gradient_accumulation_steps": 8, "tokens_per_step": None}
    chosen = make_compute_plan(config(512, **short), small, find_card("rtx4090"))
    without = make_compute_plan(config(512, **short, cuda_graphs=False), small, find_card("rtx4090"))
    assert chosen.cuda_graphs and chosen.speed.tokens_per_second > 3 * without.speed.tokens_per_second
    # 8B: the device is slower than the host
    assert not make_compute_plan(config(2048), SHAPE, find_card("rtx4090")).cuda_graphs
    dropout = parse(TrainConfig, {**config(512, **short).model_dump(mode="json"), "lora": {"lora_dropout": 0.1}})
    assert make_compute_plan(dropout, small, find_card("rtx4090")).cuda_graphs


def test_of_equally_fast_plans_one_with_recorded_launches_and_less_memory_is_taken_unless_its_rows_are_short():
    gemma = {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000}  # fmt: skip
    shape, card = ModelShape.of(gemma, "gemma-2-2b"), with_known_rates(find_card("h100"))
    chosen = make_compute_plan(config(4096, memory_budget_gib=23.5), shape, card)
    longer = make_compute_plan(config(4096, memory_budget_gib=23.5, micro_batch_size=2), shape, card)
    assert (chosen.micro_batch_size, chosen.cuda_graphs, longer.cuda_graphs) == (1, True, False)
    assert 0.99 < chosen.speed.tokens_per_second / longer.speed.tokens_per_second < 1.0 and chosen.need_gib < longer.need_gib - 5
    short = make_compute_plan(config(512, memory_budget_gib=23.5), shape, find_card("rtx4090"))  # recorded up to 1,024 tokens
    assert not short.cuda_graphs and short.micro_batch_size * 512 == 8192


def test_long_rows_go_through_the_host_on_a_small_card():
    assert make_compute_plan(config(65536), SHAPE, find_card("rtx4090")).memory.host_gib > 10
    assert make_compute_plan(config(2048), SHAPE, find_card("rtx4090")).policy is Policy.KEEP


def test_layer_inputs_go_to_the_host_only_as_far_as_it_has_memory():
    wanted = config(65536)
    free = make_compute_plan(wanted, SHAPE, find_card("rtx4090"))
    assert free.memory.host_gib > 10
    less = make_compute_plan(wanted, SHAPE, find_card("rtx4090"), host_gib=25.0)
    assert less.memory.host_gib <= 25.0 and less.host_layers < free.host_layers
    with pytest.raises(OutOfMemory, match="needs"):
        make_compute_plan(wanted, SHAPE, find_card("rtx4090"), host_gib=8.0)
    with pytest.raises(OutOfMemory, match=r"host memory \(offload, host_layers\) need more than the 8\.0 GiB allowed"):
        make_compute_plan(config(65536, activation_checkpointing="offload"), SHAPE, find_card("rtx4090"), host_gib=8.0)


def test_embeddings_on_the_host_need_its_memory_but_are_no_reason_to_prefer_another_plan():
    hosted = make_compute_plan(config(2048), SHAPE, find_card("a100-80"), host_gib=2.0)
    assert hosted.memory.host_gib == pytest.approx(2 * 128256 * 4096 / 2**30) and not hosted.memory.host_bytes
    with pytest.raises(OutOfMemory, match="input embeddings and activations in host memory"):
        make_compute_plan(config(2048), SHAPE, find_card("a100-80"), host_gib=0.5)


def test_a_desktop_of_64_gb_keeps_attention_of_all_layers_at_65536_tokens_and_of_some_at_131072():
    """It has 40 GiB to lend. Inputs alone take 32 of them at 131,072 tokens."""
    plans = [make_compute_plan(config(length), SHAPE, find_card("rtx4090"), host_gib=40.0) for length in (65536, 131072)]
    assert (plans[0].keep_layers, plans[0].host_layers) == (1, 32) and plans[0].memory.host_bytes < 32 * 2**30
    assert (plans[1].keep_layers, plans[1].policy) == (0, Policy.OFFLOAD) and 4 <= plans[1].host_layers <= 8
    assert 32 < plans[1].memory.host_gib <= 40


def test_what_does_not_fit_says_what_it_needs_and_what_there_is():
    with pytest.raises(OutOfMemory, match=r"needs at least \d+\.\d GiB \(predicted\), 5\.0 GiB are allowed") as caught:
        make_compute_plan(config(memory_budget_gib=5.0), SHAPE, find_card("rtx4090"))
    assert caught.value.predicted_gib > 4 and caught.value.measured_gib is None


def test_without_a_card_nothing_is_predicted():
    chosen = make_compute_plan(config(), SHAPE, None)
    assert (chosen.micro_batch_size, chosen.policy, chosen.memory) == (1, Policy.KEEP, None)
    # no more than the step has
    assert make_compute_plan(config(micro_batch_size=64), SHAPE, None).micro_batch_size == 8


def test_policies_are_named_in_files_as_they_always_were():
    assert [policy.setting for policy in LADDER] == [False, "selective", True, "offload"]
    assert [Policy.of(policy.setting) for policy in LADDER] == list(LADDER)
    for policy in LADDER:
        plan = ComputePlan(1, policy, 0, 0, 0.0)
        assert plan.settings()["activation_checkpointing"] is policy.setting
        assert plan.apply(config()).train.activation_checkpointing is policy.setting
        assert changed(ComputePlan(2, Policy.KEEP, 3, 4, 5.0), json.loads(json.dumps(plan.settings())), config(), None) == plan
