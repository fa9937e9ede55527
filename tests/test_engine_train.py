"""The trial as a whole: accumulation, packing, exact resume, PEFT round trip, replay from the command line."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.lora import attach, detach
from engine.config.parsing import parse
from engine.config.targets import resolve_targets
from engine.config.trial import TrainConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import CheckpointError, DivergedError, InputError, OutOfMemory
from engine.evaluation.reevaluate import evaluate_adapter
from engine.layers import attention
from engine.layers import decoder_layer as fused
from engine.layers.loss import linear_cross_entropy
from engine.model import load as model
from engine.model.load import load_base
from engine.training.loop import train

CPU = torch.device("cpu")


def build(values, **sections):
    merged = copy.deepcopy(values)
    for section, changes in sections.items():
        merged[section].update(changes)
    return parse(TrainConfig, {**merged, "train": {**merged["train"], "device": "cpu"}})


def run(config, folder, base=None):
    folder.mkdir(parents=True, exist_ok=True)
    return list(train(config, folder, base=base))


def same_numbers(one, two):
    drop = {"tokens_per_second", "step_time_ms", "elapsed_s", "peak_allocated_gib", "setup_s"}
    return [{k: v for k, v in r.to_dict().items() if k not in drop} for r in one] == [
        {k: v for k, v in r.to_dict().items() if k not in drop} for r in two
    ]


@pytest.fixture
def base(tiny_config):
    return load_base(build(tiny_config).model, CPU)


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


def token_losses(base, samples):
    """Loss of every position of a packed row, one at a time."""
    batch = collate(samples)
    hidden = base.hidden_states(batch)
    keep = batch.labels_T != -100
    return torch.stack([linear_cross_entropy(h[None], y[None], base.head()) for h, y in zip(hidden[keep], batch.labels_T[keep])])


def test_packed_samples_have_the_losses_they_have_alone(tiny_config, base):
    view, _ = load_data(build(tiny_config).data, base.tokenizer)
    samples = [view[i] for i in range(4)]
    with torch.no_grad():
        packed = token_losses(base, samples)
        alone = torch.cat([token_losses(base, [sample]) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_that_comparison_fails_when_attention_crosses_samples(tiny_config, base, monkeypatch):
    view, _ = load_data(build(tiny_config).data, base.tokenizer)
    samples = [view[i] for i in range(4)]
    honest = attention.attend

    def leaky(q, k, v, documents, options):
        return honest(q, k, v, attention.Documents((q.shape[0],), documents.offsets), options)

    with torch.no_grad():
        alone = torch.cat([token_losses(base, [sample]) for sample in samples])
        monkeypatch.setattr(fused, "attend", leaky)
        packed = token_losses(base, samples)
    assert not torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "mlp.up_proj"], "lora_alpha": 3.5},
        {"target_modules": r"model\.layers\.1\..*_proj"},
    ],
)
def test_peft_loads_the_exported_adapter_with_equal_logits(tiny_config, tmp_path, lora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = build(tiny_config, lora=lora)
    run(config, tmp_path)
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 99)
    from engine.adapter.peft_files import load_adapter

    load_adapter(tmp_path / "adapter", layers)
    view, _ = load_data(config.data, base.tokenizer)
    batch = collate([view[0]])
    quantised = model.nf4_load_config(True, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    # bitsandbytes' Linear4bit computes in bf16 on CPUs with avx512_bf16: its weights in fp32 give the same logits on any CPU
    theirs = theirs.dequantize()
    assert {type(module) for module in theirs.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    peft_model = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours_logits = torch.nn.functional.linear(base.hidden_states(batch), base.head().weight_VD)
        peft_logits = peft_model(input_ids=batch.input_ids_T[None]).logits[0]
        plain_logits = load_base(config.model, CPU).hidden_states(batch) @ base.head().weight_VD.T
    torch.testing.assert_close(ours_logits, peft_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours_logits, plain_logits, rtol=1e-4, atol=1e-4)  # the adapter does something


def test_a_fresh_load_of_the_exported_adapter_has_the_reported_loss(tiny_config, tmp_path):
    config = build(tiny_config)
    reports = run(config, tmp_path)
    measured = evaluate_adapter(config, tmp_path / "adapter")
    assert measured["eval_loss"] == pytest.approx(min(r.eval_loss for r in reports), rel=1e-6)
    assert measured["base_eval_loss"] > measured["eval_loss"]


def test_recomputed_activations_change_no_number(tiny_config, tmp_path):
    kept = run(build(tiny_config, lora={"lora_dropout": 0.1}), tmp_path / "kept")
    again = run(build(tiny_config, lora={"lora_dropout": 0.1}, train={"activation_checkpointing": True}), tmp_path / "again")
    assert [r.eval_loss for r in kept] == [r.eval_loss for r in again]


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


def test_targets_are_matched_by_name_end_or_pattern():
    names = ["layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj"]
    assert resolve_targets(names, "all-linear") == names
    assert resolve_targets(names, ("q_proj", "mlp.up_proj")) == [names[0], names[2], names[3]]
    assert resolve_targets(names, "q_proj") == [names[0], names[3]]
    assert resolve_targets(names, r"layers\.0\..*") == names[:3]
    with pytest.raises(InputError, match="q_porj.*did you mean 'q_proj'"):
        resolve_targets(names, ("k_proj", "q_porj"))
    with pytest.raises(InputError, match="valid regular expression"):
        resolve_targets(names, "layers.(")


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 4.0), (5, 4.0)])
def test_packed_attention_equals_masked_softmax_document_by_document(window, softcap):
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 1, 12)
    q = torch.randn(1, 4, 20, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 20, 8, generator=generator)
    out, _ = attention.packed_attention(
        None, q, k, v, None, document_lengths=lengths, document_offsets=torch.tensor([0, 7, 8, 20]),
        scaling=0.3, sliding_window=window, softcap=softcap,
    )  # fmt: skip
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    age = torch.arange(20)[:, None] - torch.arange(20)
    seen = (age >= 0) & (document[:, None] == document) & (age < (window or 99))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    expected = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_an_adapter_cannot_be_attached_twice(tiny_config, base):
    config = build(tiny_config)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    with pytest.raises(RuntimeError, match="still attached"):
        attach(base.model, base.linear_names, config.lora, 0)
    detach(base.model, layers)


def memory_ends_at(monkeypatch, num_tokens):
    """A stand-in for a small card: with gradients, rows of more tokens than that do not fit."""
    from engine.model.base import Base

    whole = Base.loss

    def loss(self, batch):
        if torch.is_grad_enabled() and batch.num_tokens > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    monkeypatch.setattr(Base, "loss", loss)


def test_a_step_without_room_is_computed_again_in_halves_and_the_trial_ends_as_without(tiny_config, tmp_path, monkeypatch):
    options = {"tokens_per_step": 512, "micro_batch_size": 4, "activation_checkpointing": False, "keep_layers": 0}
    config = build(tiny_config, train=options)
    expected = run(config, tmp_path / "room")
    base = load_base(config.model, torch.device("cpu"))
    memory_ends_at(monkeypatch, 160)
    (tmp_path / "tight").mkdir()
    generator = train(config, tmp_path / "tight", base=base)
    tight = [next(generator)]
    generator.close()
    tight += list(train(config, tmp_path / "tight", base=base))  # resumed, it does not run into the wall again
    assert [r.num_out_of_memory for r in tight] == [2, 2, 2] and {r.micro_batch_size for r in tight} == {1}
    assert [(r.tokens_seen, r.step) for r in tight] == [(r.tokens_seen, r.step) for r in expected]
    assert [r.eval_loss for r in tight] == pytest.approx([r.eval_loss for r in expected], rel=1e-5)


def test_a_trial_that_fits_no_way_says_so_and_gives_the_base_back(tiny_config, tmp_path, monkeypatch):
    config = build(tiny_config, train={"micro_batch_size": 2, "activation_checkpointing": False, "keep_layers": 1})
    base = load_base(config.model, torch.device("cpu"))
    memory_ends_at(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match=r"micro-batch 1, recomputed, offloaded: measured \d") as caught:
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
    from engine.training import loop as module

    gib = 2**30
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    base = SimpleNamespace(device=torch.device("cuda"), model=SimpleNamespace(config=SimpleNamespace(to_dict=lambda: shape)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * gib)
    values = json.loads(to_json(build(tiny_config, data={"max_seq_length": 2048}, train={"tokens_per_step": 16384})))
    del values["train"]["activation_checkpointing"]
    wanted = parse(TrainConfig, values)
    plans = {}
    for free_gib in (17.0, 6.0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free_gib=free_gib: (int(free_gib * gib), int(23.6 * gib)))
        plans[free_gib], known = module._make_plan(wanted, base)
        assert known.num_layers == 32 and plans[free_gib].memory.peak_gib < free_gib + 6.0
    assert plans[6.0].speed.tokens_per_second < plans[17.0].speed.tokens_per_second
