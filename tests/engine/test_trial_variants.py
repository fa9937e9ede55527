"""Variants of LoRA beside trained tokens, pairs, experts and answers: right, or refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.adapter.expert_lora import check_experts
from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import load_adapter
from engine.adapter.start import attach_started
from engine.config.trial import LoraConfig
from engine.data.packing import Sample, collate
from engine.data.views import load_data
from engine.errors import InputError
from engine.evaluation.decode_steps import FusedSteps
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model.device import one_thread
from engine.model.load import load_base, nf4_load_config
from engine.preference import trial_pairs
from engine.preference.reference_logps import reference_logps
from engine.prepare import prepare
from engine.quant.bnb import keep_as_stored
from engine.vocabulary import embedding_noise
from tests.support.export_models import save_model
from tests.support.preferences import pair_rows, preference_values, write_rows
from tests.support.trials import CPU, build, run, run_stopped, same_numbers

TOKENS = ["<tool>", "</tool>"]
VARIANTS = [
    {"use_dora": True, "lora_dropout": 0.1}, {"start": "pissa"}, {"start": "loftq"},
    {"use_dora": True, "start": "pissa", "rank_pattern": {"down_proj": 2}},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return model folders: llama ties its head to its embedding, qwen3 does not. And data with new tokens."""
    place = tmp_path_factory.mktemp("models")
    words = [f"{'the' * (i % 3 + 1)} <tool> {i % 7} </tool> {'th' * (i * 5 % 8 + 1)}" for i in range(40)]
    (place / "data.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return {name: save_model(place / name, name, torch.float32) for name in ("llama", "qwen3")} | {"data": place / "data.jsonl"}


def config_of(models, family="llama", tokens=(), lora=(), **sections):
    values = {
        "model": {"path": str(models[family]), "train_tokens": list(tokens)},
        "data": {"train": str(models["data"]), "max_seq_length": 64, "eval_max_seq_length": 64, "eval_fraction": 0.2},
        "lora": {"rank": 4, **dict(lora)}, "optim": {"learning_rate": 1e-2},
        "train": {"max_tokens": 384, "num_reports": 2, "tokens_per_step": 128, "activation_checkpointing": False},
    }  # fmt: skip
    return build(values, **sections)


def peft_model(config, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    nf4 = nf4_load_config(True, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=nf4, device_map={"": "cpu"}, dtype=torch.float32
    )
    keep_as_stored(model)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.mark.parametrize(("family", "lora"), [("llama", VARIANTS[0]), ("qwen3", VARIANTS[3])])
def test_trained_tokens_beside_variants_and_noise_resume_and_have_peft_s_losses(models, tmp_path, family, lora):
    config = config_of(models, family, TOKENS, lora, train={"neftune_noise_alpha": 5.0}, optim={"weight_decay": 0.1})
    base = load_base(config.model, CPU)
    whole = run(config, tmp_path / "whole", base)
    parts = run_stopped(config, tmp_path / "parts", base)
    assert same_numbers(whole, parts) and whole[0].num_trainable == prepare([config]).num_trainable[0]
    best = min(report.eval_loss for report in whole)
    assert evaluate_adapter(config, tmp_path / "whole/adapter").eval_loss == pytest.approx(best, rel=1e-5)
    _, view = load_data(config.data, base.tokenizer)
    model, total, count = peft_model(config, tmp_path / "whole/adapter"), 0.0, 0
    for row in (collate([view[i]]) for i in range(len(view))):
        logits = model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100).item()
        count += row.num_targets
    assert total / count == pytest.approx(best, abs=2e-4)


def test_noise_leaves_the_rows_their_gradient(models):
    config = config_of(models, "qwen3", TOKENS)
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter, ids = FlatAdapter(layers, base.dtype), base.tokenizer.convert_tokens_to_ids(TOKENS)
    tokens = np.array([ids[0], 5, 9, ids[1], 7, ids[0], 3], dtype=np.int32)
    row, embedding = collate([Sample(tokens, np.arange(7) > 2)]), base.model.get_input_embeddings()
    base.model.train()

    def gradient():
        adapter.zero_grad()
        base.loss(row).backward()
        return layers["model.embed_tokens"].rows.grad.clone()

    plain, before = gradient(), embedding(row.input_ids_T).detach()
    base.add_noise(torch.tensor(20.0), torch.tensor([3, 0]))
    noised, after = gradient(), embedding(row.input_ids_T).detach()
    base.add_noise(None)
    hook = embedding.register_forward_hook(lambda module, given, found: found + (after - before))
    expected = gradient()
    hook.remove()
    detach(base.model, layers)
    assert noised.abs().amax(1).min() > 0 and (noised - plain).abs().max() > 1e-2
    torch.testing.assert_close(noised, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", VARIANTS)
def test_a_silent_adapter_is_the_base_and_comes_back_bit_for_bit(models, lora):
    config = config_of(models, "qwen3", TOKENS, lora)
    base = load_base(config.model, CPU)
    tokens = np.array([7, 5, *base.tokenizer.convert_tokens_to_ids(TOKENS), 9, 3], dtype=np.int32)
    row = collate([Sample(tokens, np.arange(6) > 2)])
    fresh = attach(base.model, base.linear_names, LoraConfig(rank=4), 0)  # B is zero, and new tokens have the mean of all rows
    plain = base.loss(row).item()
    detach(base.model, fresh)
    layers = attach_started(base.model, base.linear_names, config)
    adapter = FlatAdapter(layers, base.dtype)
    with torch.no_grad():
        adapter.parameter.mul_(1.1)
    adapter.refresh()
    kept, moved = adapter.parameter.detach().clone(), base.loss(row).item()
    with adapter.silent():
        assert base.loss(row).item() == pytest.approx(plain, abs=1e-5)
    assert torch.equal(kept, adapter.parameter) and base.loss(row).item() == moved != pytest.approx(plain, abs=1e-5)
    detach(base.model, layers)


@pytest.mark.parametrize("lora", VARIANTS[2:])
def test_the_reference_of_pairs_sees_neither_start_nor_noise_and_a_stopped_trial_goes_on(
    tiny_config, tmp_path, base, monkeypatch, lora
):
    values = preference_values(tiny_config, write_rows(tmp_path / "pairs.jsonl", pair_rows(16)), loss="dpo", beta=0.5)
    short = {"max_tokens": 768, "num_reports": 2, "tokens_per_step": 256, "neftune_noise_alpha": 10.0}
    config = build(values, lora={"rank": 4, **lora}, train=short)
    found, lengths, bounds = [], [], embedding_noise.bounds

    def spy(*given):
        pairs = of(*given)
        found.append(pairs)
        return pairs

    def seen(offsets, *others):
        lengths.append(offsets.diff().tolist())
        return bounds(offsets, *others)

    of = trial_pairs.TrialPairs.of
    monkeypatch.setattr(trial_pairs.TrialPairs, "of", spy)
    monkeypatch.setattr(embedding_noise, "bounds", seen)
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "with"))
    whole = run(config, tmp_path / "whole", base)
    parts = run_stopped(config, tmp_path / "parts", base)
    assert same_numbers(whole, parts) and whole[-1].eval_loss < np.log(2.0)
    view, _ = load_data(config.data, base.tokenizer)
    pairs = {tuple(view.lengths[2 * i : 2 * i + 2].tolist()) for i in range(len(view) // 2)}
    assert lengths and all(tuple(row[i : i + 2]) in pairs for row in lengths for i in range(0, len(row), 2) if row[i])
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "without"))
    known = ~np.isnan(found[0].reference_N)
    np.testing.assert_allclose(found[0].reference_N[known], reference_logps(config, base, view)[known], atol=1e-4)
    again = evaluate_adapter(config, tmp_path / "whole/adapter")
    assert again.eval_loss == pytest.approx(min(report.eval_loss for report in whole), abs=1e-4)


@pytest.mark.parametrize("lora", VARIANTS[:2])
def test_answers_are_made_with_what_was_trained(models, tmp_path, lora):
    config = config_of(models, "qwen3", lora=lora, optim={"learning_rate": 3e-2})
    base = load_base(config.model, CPU)
    run(config, tmp_path / "trial", base)
    prompts = [np.array([5, 9, 33, 40], dtype=np.int32), np.arange(40, 49, dtype=np.int32)]
    theirs = peft_model(config, tmp_path / "trial/adapter")
    layers = attach(base.model, base.linear_names, config.lora, 0)
    load_adapter(tmp_path / "trial/adapter", layers)
    base.model.eval()
    replayed = []

    def record(compute):  # as a recording does: one result at one place
        result = compute()
        return result, lambda: replayed.append(result.copy_(compute()))

    with torch.no_grad():
        for flat in (False, True):
            if flat:
                FlatAdapter(layers, base.dtype)
            steps, texts = FusedSteps(base, prompts, 6, record), [list(prompt) for prompt in prompts]
            logits = steps.prompt_logits()
            for _ in range(6):
                for text, ours in zip(texts, logits, strict=True):
                    wanted = theirs(input_ids=torch.tensor([text])).logits[0, -1].float().log_softmax(-1)
                    torch.testing.assert_close(ours.log_softmax(-1), wanted, rtol=1e-4, atol=1e-4)
                tokens = logits.argmax(-1)
                texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
                logits = steps.next_logits(tokens)
    detach(base.model, layers)
    assert len(replayed) == 2 * 4


@pytest.mark.parametrize(("setting", "line"), [
    ({"lora_dropout": 0.1}, "lora.lora_dropout = 0.1: must be 0 with adapters on experts"),
    ({"use_dora": True}, "lora.use_dora = True: must be false with adapters on experts"),
    ({"start": "pissa"}, "lora.start = 'pissa': must be default with adapters on experts"),
    ({"start": "loftq"}, "lora.start = 'loftq': must be default with adapters on experts"),
    ({}, "optim.name = 'muon': must be another optimizer with adapters on experts"),
])  # fmt: skip
def test_what_experts_do_not_have_is_one_line(setting, line):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(InputError) as error:
        check_experts(LoraConfig(**setting), names, "muon")
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    check_experts(LoraConfig(**setting), names[:1], "muon")


def test_orthogonal_steps_are_refused_beside_trained_tokens(models):
    with pytest.raises(InputError, match=r"model.train_tokens = .*must be empty with optim.name = muon"):
        config_of(models, tokens=TOKENS, optim={"name": "muon"})
