"""A chat's cached answers equal those of the engine's uncached forward pass."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.adapter.lora import attach
from engine.adapter.peft_files import load_adapter
from engine.chat import Chat, load_chat, main
from engine.config.trial import load_train_config
from engine.data.packing import Sample, collate
from engine.evaluation.examples import MAX_NEW_TOKENS, _question
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model.device import one_thread
from engine.model.load import load_base
from tests.support.trials import CPU, build, run

PROMPT = "What is 7 plus 7?"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_model_dir, tiny_data) -> dict[str, Path]:
    """Return two folders of one trial, whose configs hold the base model in 16 bits and in NF4."""
    folder = tmp_path_factory.mktemp("trial")
    values = {
        "model": {"path": str(tiny_model_dir), "quantization": "none"},
        "data": {"train": str(tiny_data), "max_seq_length": 128, "eval_max_seq_length": 128, "eval_fraction": 0.2},
        "lora": {"rank": 4},
        "optim": {"learning_rate": 1e-2},
        "train": {"max_tokens": 1024, "num_reports": 1, "tokens_per_step": 128, "activation_checkpointing": False},
    }
    run(build(values), folder / "none")
    shutil.copytree(folder / "none", folder / "nf4")
    for held in ("nf4", "none"):
        config = build(values, model={"quantization": held})
        (folder / held / "train_config.json").write_text(config.model_dump_json())
    return {held: folder / held for held in ("nf4", "none")}


@torch.no_grad()
def likeliest(folder: Path, num_tokens: int) -> str:
    """Generate token by token through the fused layers on one packed row, without a cache."""
    config = load_train_config(folder / "train_config.json")
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    load_adapter(folder / "adapter", layers)
    base.model.eval()
    text = base.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False)
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + num_tokens:
        row = collate([Sample(np.array(ids), np.ones(len(ids), dtype=bool))])
        logits = base.hidden_states(row)[-1] @ base.model.get_output_embeddings().weight.T
        ids.append(int(logits.argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("held", ["nf4", "none"])
def test_an_answer_is_what_the_uncached_engine_finds_likeliest(adapters, held, capsys):
    folder = adapters[held]
    arguments = [str(folder / "adapter"), "--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "12", "--device", "cpu"]
    assert main(arguments) == 0
    answer = capsys.readouterr().out.removesuffix("\n")
    assert answer == likeliest(folder, 12) and len(answer) > 3
    # twin: the base model alone says something else
    base = load_base(load_chat_model(folder), CPU, attention_name="sdpa")
    template = base.tokenizer.chat_template
    assert Chat(base, template, 12, 0.0).answer(PROMPT) != answer


@pytest.mark.parametrize("held", ["nf4", "none"])
def test_examples_are_evaluation_samples_answered_as_in_a_chat_by_base_model_and_adapter(adapters, held):
    config = load_train_config(adapters[held] / "train_config.json")
    measured = evaluate_adapter(config, adapters[held] / "adapter", num_examples=3)
    assert len(measured.examples) == 3 == len({example["prompt"] for example in measured.examples})
    assert any(example["base"] != example["adapter"] for example in measured.examples)
    chats = {"adapter": load_chat(adapters[held] / "adapter", MAX_NEW_TOKENS, 0.0, "cpu")}
    base = load_base(load_chat_model(adapters[held]), CPU, attention_name="sdpa")
    chats["base"] = Chat(base, base.tokenizer.chat_template, MAX_NEW_TOKENS, 0.0)
    for example in measured.examples:
        number = int(example["prompt"].removeprefix("What is ").split()[0])
        assert (example["prompt"], example["expected"]) == (f"What is {number} plus {number}?", f"It is {2 * number}.")
        for name, chat in chats.items():
            chat._messages.clear()
            assert chat.answer(example["prompt"]) == example[name]
    alone = evaluate_adapter(config, adapters[held] / "adapter")
    assert replace(measured, examples=None, examples_s=None) == alone


def test_a_model_that_cannot_generate_is_evaluated_all_the_same(adapters, monkeypatch):
    monkeypatch.setattr("engine.evaluation.examples.restore_layers", lambda model: 1 / 0)
    config = load_train_config(adapters["none"] / "train_config.json")
    measured = evaluate_adapter(config, adapters["none"] / "adapter", num_examples=1)
    assert measured.examples_error == "ZeroDivisionError: division by zero"
    assert measured.eval_loss < measured.base_eval_loss and measured.examples is None


def test_a_question_is_a_sample_up_to_its_first_answer_and_plain_text_up_to_its_half():
    ids = np.arange(10)
    chat = _question(Sample(ids, np.isin(ids, (4, 5, 8))))
    assert (chat.prompt.tolist(), chat.expected.tolist()) == ([0, 1, 2, 3], [4, 5])
    text = _question(Sample(ids, np.ones(10, dtype=bool)))
    assert (text.prompt.tolist(), text.expected.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


def load_chat_model(folder: Path):
    return load_train_config(folder / "train_config.json").model.model_copy(update={"layers": "original"})


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(adapters, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        options = ["--prompt", PROMPT, "--temperature", "3", "--seed", seed, "--max-new-tokens", "16", "--device", "cpu"]
        assert main([str(adapters["none"] / "adapter"), *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(adapters, capsys, monkeypatch):
    chat = load_chat(adapters["none"] / "adapter", 12, 0.0, "cpu")
    whole = chat.answer(PROMPT)
    chat = load_chat(adapters["none"] / "adapter", 12, 0.0, "cpu")
    steps, model = itertools.count(), chat._base.model
    hook = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if next(steps) == 6 else None)
    capsys.readouterr()
    part = chat.answer(PROMPT)
    assert "[stopped]" in capsys.readouterr().out
    assert whole.startswith(part) and part != whole
    hook.remove()
    assert chat.answer("And 8 plus 8?")
    assert [message["role"] for message in chat._messages] == ["user", "assistant"] * 2
    assert chat._messages[1]["content"] == part


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--max-new-tokens", "0"], "must be at least 1"), (["--temperature", "-1"], "must be 0 or more"), ([], "is not in it")],
)
def test_bad_input_is_one_line(options, message, tmp_path, capsys):
    assert main([str(tmp_path), "--prompt", "x", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_typed_conversation_ends_with_ctrl_d(adapters, capsys, monkeypatch):
    typed = iter([KeyboardInterrupt, "", PROMPT, EOFError])

    def read(_: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert main([str(adapters["none"] / "adapter"), "--temperature", "0", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.strip()) > 1
    assert json.loads((adapters["none"] / "train_config.json").read_text())["model"]["quantization"] == "none"
