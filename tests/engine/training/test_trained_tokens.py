"""A trial that trains the rows of tokens resumes exactly, is measured again alike, answers with them, and is planned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import load_adapter
from engine.chat import load_chat
from engine.config.parsing import to_json
from engine.errors import InputError, Interrupted
from engine.evaluation import decoding
from engine.evaluation.decoding import Decoding, generate
from engine.evaluation.reevaluate import evaluate_adapter
from engine.export.__main__ import main
from engine.model.device import one_thread
from engine.model.inspect import known_shape
from engine.model.load import load_base
from engine.prepare import prepare
from engine.shape.layer_plan import num_trained, plan_layers
from engine.training.loop import train
from tests.support.export_models import save_model
from tests.support.trials import CPU, build, run, same_numbers

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def trial(request, tmp_path_factory):
    """Return a config in NF4 whose data has a new token, and the folder and reports of its trial."""
    place = tmp_path_factory.mktemp(request.param)
    random = np.random.default_rng(0)
    words = [f"{'the' * (i % 3 + 1)} <tool> {i % 7} </tool> {'th' * int(random.integers(1, 9))}" for i in range(60)]
    (place / "data.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    model = save_model(place / "model", request.param, torch.float32)
    values = {
        "model": {"path": str(model), "train_tokens": ["<tool>", "</tool>"]},
        "data": {"train": str(place / "data.jsonl"), "max_seq_length": 64, "eval_max_seq_length": 64, "eval_fraction": 0.2},
        "lora": {"rank": 4, "lora_dropout": 0.1}, "optim": {"learning_rate": 1e-2, "loraplus_lr_ratio": 2.0},
        "train": {"max_tokens": 768, "num_reports": 2, "tokens_per_step": 128, "activation_checkpointing": False},
    }  # fmt: skip
    config = build(values)
    return config, place / "trial", run(config, place / "trial")


def test_rows_learn_and_a_stopped_trial_ends_as_an_undisturbed_one(trial, tmp_path):
    config, folder, reports = trial
    rows = load_file(folder / "adapter" / "adapter_model.safetensors")[ROWS]
    start = load_base(config.model, CPU)
    layers = attach(start.model, start.linear_names, config.lora, 0)
    assert rows.shape == (2, 64) and not torch.equal(rows, layers["model.embed_tokens"].rows)
    assert reports[-1].eval_loss < reports[0].eval_loss or reports[0].eval_loss < 7
    calls, again = iter(range(10**6)), []
    with pytest.raises(Interrupted):
        again += list(train(config, tmp_path / "stopped", interrupted=lambda: next(calls) == 4))
    again += list(train(config, tmp_path / "stopped"))
    assert same_numbers(reports, again)
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_the_files_give_the_losses_of_the_trial_and_forms_without_a_place_refuse_them(trial, tmp_path, capsys):
    config, folder, reports = trial
    best = min(report.eval_loss for report in reports)
    assert evaluate_adapter(config, folder / "adapter").eval_loss == pytest.approx(best, rel=1e-5)
    for form in ("peft", "gguf-adapter"):
        assert main([str(folder / "adapter"), "--to", form, "--out", str(tmp_path / form)]) == 2
        error = capsys.readouterr().err.strip()
        assert "trainable_token_indices" in error and "\n" not in error and not (tmp_path / form).exists()


def test_a_merged_model_holds_the_rows_and_their_tokens_as_peft_s_merge_does_and_chat_answers_with_them(trial, tmp_path, capsys):
    config, folder, _ = trial
    (folder / "train_config.json").write_text(to_json(config))
    for form in ("merged", "gguf-merged"):
        arguments = [str(folder / "adapter"), "--to", form, "--out", str(tmp_path / form), "--no-losses"]
        assert main(arguments) == 0, capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload().to(torch.bfloat16).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    tool = AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<tool>")
    plain = load_file(f"{config.model.path}/model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(ours["model.embed_tokens.weight"][tool], plain[tool].bfloat16())
    chat = load_chat(folder / "adapter", 4, 0.0, "cpu")
    with torch.no_grad():
        rows = chat._base.model.get_input_embeddings()(torch.tensor([tool]))
    torch.testing.assert_close(rows[0], load_file(folder / "adapter" / "adapter_model.safetensors")[ROWS][0])
    chat.answer("the <tool>")
    (folder / "train_config.json").unlink()
    with pytest.raises(InputError, match="has rows of tokens"):
        load_chat(folder / "adapter", 4, 0.0, "cpu")


def test_answers_are_made_with_the_rows_by_fused_and_by_the_librarys_layers(trial, monkeypatch):
    config, folder, _ = trial
    base = load_base(config.model, CPU)
    tool = base.tokenizer.convert_tokens_to_ids("<tool>")
    prompts = [np.array([5, 9, tool], dtype=np.int32), np.arange(40, 49, dtype=np.int32)]
    layers = attach(base.model, base.linear_names, config.lora, 0)
    load_adapter(folder / "adapter", layers)
    by_fused = generate(base, prompts, [], Decoding(12))
    monkeypatch.setattr(decoding, "can_decode", lambda *_: False)
    assert generate(base, prompts, [], Decoding(12)) == by_fused
    with torch.no_grad():  # twin
        for name in ("model.embed_tokens", "lm_head"):
            if name in layers:
                layers[name].rows.mul_(-3.0)
    assert generate(base, prompts, [], Decoding(12)) != by_fused
    detach(base.model, layers)


def test_a_plan_counts_the_rows_and_a_token_without_one_is_refused_before(trial):
    config, _, reports = trial
    assert prepare([config]).num_trainable == [reports[-1].num_trainable]
    settled = {"micro_batch_size": 1, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0}
    fixed = config.model_copy(update={"train": config.train.model_copy(update=settled)})
    shape = known_shape(config.model)
    assert num_trained(fixed, shape, plan_layers(fixed, shape)) == reports[-1].num_trainable
    many = config.model.model_copy(update={"train_tokens": tuple(f"<t{i}>" for i in range(9))})
    with pytest.raises(InputError, match="has no row"):
        prepare([config.model_copy(update={"model": many})])
    typed = config.model.model_copy(update={"train_tokens": ("<tool>", "<toll>")})
    (note,) = (note for note in prepare([config.model_copy(update={"model": typed})]).model_notes if "train_tokens" in note)
    assert "no training sample has '<toll>'," in note and not any("train_tokens" in n for n in prepare([config]).model_notes)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"train_tokens": ()})})
    assert plain.fingerprint() != config.fingerprint()
