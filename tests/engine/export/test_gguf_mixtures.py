"""A mixture in GGUF has every tensor of the model in llama.cpp's layout, and llama.cpp computes the same."""

from __future__ import annotations

import json

import gguf
import pytest
import torch

from engine.adapter.portable import read_adapter
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.export.forms import export
from engine.export.gguf_model import Naming, write_adapter, write_model
from engine.model.inspect import model_config
from tests.support.fp8_folders import BLOCKS, save_pair
from tests.support.gguf_mixtures import MIXTURES, llama_cpp_logprobs, save_mixture

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LAYOUTS = [{}, {"save_original_format": False}]  # each expert on its own, where checkpoints have that; or stacked
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(2))


def halves(name, values):
    """Return gate and up of [E, 2 F, ...]."""
    return (values[:, ::2], values[:, 1::2]) if name == "gpt-oss" else values.chunk(2, dim=1)


def wanted_tensors(name, model):
    """Return what llama.cpp must read, from the values that transformers computes with."""
    naming, found = Naming(model.config.to_dict()), {}
    for key, value in model.state_dict().items():
        path, _, last = key.rpartition(".")
        if not path.endswith(".experts"):
            if not (key == "lm_head.weight" and model.config.tie_word_embeddings):
                found[naming.name(key)] = naming.rows(key, value)
            continue
        is_bias, stem = last.endswith("bias"), f"blk.{path.split('.')[2]}.ffn_"
        if name == "gpt-oss" and not is_bias:
            value = value.transpose(1, 2)
        kinds = zip(("gate", "up"), halves(name, value)) if "gate_up" in last else [("down", value)]
        found |= {f"{stem}{kind}_exps.{'bias' if is_bias else 'weight'}": part for kind, part in kinds}
    return found


@pytest.mark.parametrize("saved", LAYOUTS)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_file_holds_every_tensor_of_the_model_and_its_numbers(name, saved, tmp_path):
    model = save_mixture(name, tmp_path / "model", **saved)
    config = model_config(ModelConfig(path=str(tmp_path / "model")))
    write_model(tmp_path / "model", config | {"dtype": "bfloat16"}, tmp_path / "model.gguf", name)
    reader, wanted = gguf.GGUFReader(tmp_path / "model.gguf"), wanted_tensors(name, model)
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        is_fp32 = values.dim() == 1 or tensor.name.endswith(".bias") or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if is_fp32 else "BF16")
        kept = wanted[tensor.name] if is_fp32 else wanted[tensor.name].bfloat16().float()
        assert torch.equal(values, kept), tensor.name
    fields = {key.removeprefix(f"{name}."): field.contents() for key, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["expert_count"], fields["expert_used_count"]) == (name, 6, 2)
    width = {"qwen3moe": 48, "gpt-oss": 96}.get(name)
    assert fields.get("expert_feed_forward_length") == width
    if name == "gpt-oss":
        keys = ("attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
        assert [fields[key] for key in keys] == [8, "yarn", 32.0, 16]


def peft_adapter(model, folder, base):
    """Save an adapter on attention and experts, and return the logits that PEFT computes with it."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "target_parameters": BOTH}
    adapted = get_peft_model(model, LoraConfig(**given, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.2)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(folder)
        return adapted(IDS).logits[0, -1]


def test_a_card_says_that_llama_cpp_rounds_yarn(tmp_path):
    model = save_mixture("gpt-oss", tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", tmp_path / "base")
    said = []
    for truncate in (True, False):
        content = json.loads((tmp_path / "base" / "config.json").read_text())
        content["rope_parameters"]["truncate"] = truncate
        (tmp_path / "base" / "config.json").write_text(json.dumps(content))
        export(tmp_path / "adapter", "gguf-adapter", tmp_path / str(truncate), measure=False)
        said.append("llama.cpp rounds the ends of YaRN" in (tmp_path / str(truncate) / "README.md").read_text())
    assert said == [False, True]


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_an_adapter_on_experts_has_a_pair_for_each_kind_of_matrix(name, tmp_path):
    model = save_mixture(name, tmp_path / "base")
    before = {key: value.clone() for key, value in wanted_tensors(name, model).items()}
    peft_adapter(model, tmp_path / "adapter", tmp_path / "base")
    export(tmp_path / "adapter", "gguf-adapter", tmp_path / "out", measure=False)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    after = wanted_tensors(name, PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload())
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    stems = {key.removesuffix(".lora_a") for key in held if key.endswith(".lora_a")}
    assert stems == {key for key in before if not torch.equal(before[key], after[key])} and len(stems) == 2 * 5
    for stem in stems:
        added = 6 / 3 * held[f"{stem}.lora_b"] @ held[f"{stem}.lora_a"]
        assert torch.allclose(before[stem] + added, after[stem], atol=1e-5), stem


def test_an_fp8_mixture_is_exported_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    model = save_mixture("qwen3moe", tmp_path / "first")
    packed, plain = save_pair(model, tmp_path, BLOCKS, "block")
    peft_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "adapter", packed)
    export(tmp_path / "adapter", "gguf-merged", tmp_path / "out", measure=False)
    export(tmp_path / "adapter", "merged", tmp_path / "merged", measure=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    wanted = wanted_tensors("qwen3moe", merged)
    for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(values, wanted.pop(tensor.name).float())
    assert not wanted


@pytest.mark.parametrize(
    ("name", "changed", "line"),
    [
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob = False: must be true in a GGUF of Qwen3MoeForCausalLM"),
        ("qwen3moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]: must be empty"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: must be null"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads = 2: must be num_attention_heads"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 2}, "must be sliding and full attention by turns"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0: must be 7.0"),
        ("gpt-oss", {"rope_parameters": {"rope_type": "yarn", "mscale": 2.0}}, "'yarn with mscale': no GGUF export for it"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be silu"),
        ("qwen3moe", {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}, "no GGUF export for it; allowed: LlamaFor"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_one_line(name, changed, line, tmp_path):
    model = save_mixture(name, tmp_path)
    with pytest.raises(InputError, match=line):
        write_model(tmp_path, json.loads(model.config.to_json_string()) | {"dtype": "float32"} | changed, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize("saved", LAYOUTS)
@pytest.mark.parametrize("name", MIXTURES)
def test_llama_cpp_itself_computes_the_same_with_and_without_adapter(name, saved, tmp_path):
    """Needs xllamacpp (not a dependency; skipped without it)."""
    pytest.importorskip("xllamacpp")
    model = save_mixture(name, tmp_path / "model", **saved)
    config = model_config(ModelConfig(path=str(tmp_path / "model"))) | {"dtype": "float32"}
    write_model(tmp_path / "model", config, tmp_path / "model.gguf", name)
    with torch.no_grad():
        plain = model(IDS).logits[0, -1].log_softmax(-1)
    tuned = peft_adapter(model, tmp_path / "adapter", tmp_path / "model").log_softmax(-1)
    write_adapter(read_adapter(tmp_path / "adapter"), config, tmp_path / "adapter.gguf")
    ids = IDS[0].tolist()
    assert (llama_cpp_logprobs(tmp_path / "model.gguf", ids) - plain).abs().max() < 1e-4
    assert (llama_cpp_logprobs(tmp_path / "model.gguf", ids, tmp_path / "adapter.gguf") - tuned).abs().max() < 1e-4
    assert (tuned - plain).abs().max() > 0.5  # twin
