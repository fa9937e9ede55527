"""Rows of trained tokens have the losses and gradients of PEFT's, tied and untied, and are read by PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import export_adapter, load_adapter
from engine.adapter.token_rows import TokenHead, TokenRows, add_tokens, check_rows_of
from engine.data.packing import Sample, collate
from engine.errors import InputError
from engine.model.device import one_thread
from engine.model.load import load_base
from tests.support.export_models import save_model
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU, build

KNOWN, NEW = "Q", "<tool>"  # the tiny models have 260 rows, of which the tokenizer uses 259 at most


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def made(folder, **model):
    values = {"model": {"path": str(folder), "quantization": "none", "train_tokens": [KNOWN, NEW], **model}}
    values |= {"data": {"train": "unused"}, "lora": {"rank": 4}, "train": {"max_tokens": 8}}
    return build({"optim": {}, **values}, train={"num_reports": 1})


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def case(request, tmp_path_factory):
    """Return a config, a base and its adapter; llama ties its head to its embedding, qwen3 does not."""
    folder = save_model(tmp_path_factory.mktemp(request.param) / "model", request.param, torch.float32)
    config = made(folder)
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.parameters_of():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return config, base, layers


def row_of(base):
    ids = base.tokenizer.convert_tokens_to_ids([KNOWN, NEW])
    tokens = torch.randint(0, 250, (24,), generator=torch.Generator().manual_seed(0)).numpy()
    tokens[[3, 9, 15]], tokens[[5, 18]] = ids[0], ids[1]
    return collate([Sample(tokens, torch.arange(24).numpy() > 2)])


def peft_model(config, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def test_losses_and_gradients_are_pefts(case, tmp_path):
    config, base, layers = case
    rows = [name for name, layer in layers.items() if isinstance(layer, TokenRows)]
    assert rows == (["model.embed_tokens"] if base.model.config.tie_word_embeddings else ["model.embed_tokens", "lm_head"])
    export_adapter(tmp_path / "adapter", config, layers, base.model, base.tokenizer)
    theirs, batch = peft_model(config, tmp_path / "adapter"), row_of(base)
    labels = batch.labels_T  # shifted: labels_T[t] is what follows token t
    logits = theirs(batch.input_ids_T[None]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    wanted.backward()
    loss = base.loss(batch.to(CPU))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name in rows:
        gradient = next(g for n, g in found.items() if name in n and "trainable_tokens_delta" in n)
        assert torch.allclose(layers[name].rows.grad, gradient, atol=1e-4 * gradient.abs().max().item())
        assert gradient.abs().min(dim=0).values.max() > 0
    for layer in layers.values():
        for parameter in layer.parameters_of():
            parameter.grad = None
    for name in rows:  # twin: the rows count, in losses of the whole model and of the library's forward alike
        kept = layers[name].rows.detach().clone()
        with torch.no_grad():
            layers[name].rows.zero_()
            assert abs(base.loss(batch.to(CPU)).item() - wanted.item()) > 1e-2
            layers[name].rows.copy_(kept)


def test_the_export_is_pefts_format_and_comes_back(case, tmp_path):
    config, base, layers = case
    export_adapter(tmp_path / "adapter", config, layers, base.model, base.tokenizer)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ids, tied = base.tokenizer.convert_tokens_to_ids([KNOWN, NEW]), base.model.config.tie_word_embeddings
    assert values["trainable_token_indices"] == ({"embed_tokens": ids} if tied else {"embed_tokens": ids, "lm_head": ids})
    names = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "token_adapter" in name]
    assert len(names) == (1 if tied else 2)
    assert "<tool>" in (tmp_path / "adapter" / "tokenizer.json").read_text()
    before = {name: [p.detach().clone() for p in layer.parameters_of()] for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.parameters_of():
                parameter.zero_()
    load_adapter(tmp_path / "adapter", layers)
    for name, layer in layers.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], layer.parameters_of(), strict=True))


def test_a_flat_adapter_holds_the_rows_and_detaching_leaves_the_base_model(case):
    config, base, _ = case
    batch = row_of(base).to(CPU)
    again = load_base(config.model, CPU)
    untrained = again.loss(batch).item()
    layers = attach(again.model, again.linear_names, config.lora, 0)
    known = again.tokenizer.convert_tokens_to_ids(KNOWN)
    rows = [layer for layer in layers.values() if isinstance(layer, TokenRows)]
    for layer in rows:  # a known token starts as it is, a new one as the mean
        assert torch.equal(layer.rows[0], layer.weight[known].float())
        assert torch.allclose(layer.rows[1], layer.weight[: len(again.tokenizer) - 1].float().mean(0))
    flat = FlatAdapter(layers, again.dtype)
    assert flat.parameter.numel() == sum(p.numel() for layer in layers.values() for p in layer.parameters_of())
    again.loss(batch).backward()
    assert all(layer.rows.grad.abs().sum() > 0 and layer.rows.data_ptr() != layer.weight.data_ptr() for layer in rows)
    optimizer = torch.optim.SGD([flat.parameter], lr=0.1)
    optimizer.step()
    flat.refresh()
    assert all(torch.equal(layer.casts[0], layer.lora_a) for name, layer in layers.items() if not isinstance(layer, TokenRows))
    detach(again.model, layers)
    assert again.loss(batch).item() == untrained
    assert isinstance(again.model.get_output_embeddings(), TokenHead)


def test_a_token_without_a_row_is_refused_in_one_line(tmp_path):
    folder = save_model(tmp_path / "model", "llama", torch.float32)
    with pytest.raises(InputError, match="has no row: the embedding's 260 all belong to tokens") as error:
        load_base(made(folder, train_tokens=[f"<t{i}>" for i in range(9)]).model, CPU)
    assert "\n" not in str(error.value)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<spare>", "<reserved_0>"], special_tokens=True)
    num_rows = len(tokenizer)
    add_tokens(tokenizer, ["<tool>"])
    with pytest.raises(InputError, match="such as '<reserved_0>'$"):
        check_rows_of(tokenizer, ["<tool>"], num_rows)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("model", {"train_tokens": ["a", "a"]}, "different tokens"),
        ("model", {"train_tokens": [""]}, "none of them empty"),
        ("lora", {"start_from": "somewhere"}, "must be empty with lora.start_from"),
        ("train", {"matmul": "int8"}, "needs train.matmul=bf16"),
    ],
)
def test_settings_that_rule_it_out_are_refused(section, values, said):
    given = {"model": {"path": "m", "train_tokens": ["a"]}, "data": {"train": "d"}, "lora": {}, "train": {"max_tokens": 8}}
    given["train"]["num_reports"] = 1
    given[section] = {**given[section], **values}
    with pytest.raises(InputError, match=said):
        build({"optim": {}, **given})
