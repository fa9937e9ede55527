"""What a model folder shows without its weights being read: it can be trained, or is refused in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.config.trial import ModelConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import InputError
from engine.evaluation.eval_loss import EvaluationSet, evaluate, evaluation_batches
from engine.model.comparison import as_sample, difference, library_losses, our_losses
from engine.model.inspect import inspect_model, known_shape
from engine.model.load import load_base
from engine.model.loaded_check import loaded_losses
from engine.model.route import Route
from engine.model.skeleton import make_loud
from engine.prepare import prepare
from engine.quant.frozen_linear import freeze_linears
from tests.support.model_families import LFM2_LAYERS
from tests.support.tiny_models import NF4, change_config
from tests.support.trials import CPU, build, run


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "made-up"}, "made-up"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "stored as bfloat16"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_quantised_folders_are_refused_before_their_weights_are_read(folder, settings, named, place):
    change_config(folder, **{place: settings})
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for read in (inspect_model, lambda config: load_base(config, CPU)):
        with pytest.raises(InputError, match=rf"^model\.path = .*{named}.*16-bit model$"):
            read(ModelConfig(path=str(folder)))


def test_a_folder_in_nf4_is_trained_as_it_is_and_not_as_something_else(tiny_config, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = tiny_config["model"]["path"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(path, quantization_config=settings).save_pretrained(tmp_path / "nf4")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{path}/{file}", tmp_path / "nf4")
    base = load_base(ModelConfig(path=str(tmp_path / "nf4")), CPU)
    assert all(base.model.get_submodule(name).is_packed for name in base.linear_names)
    with pytest.raises(InputError, match=r"model\.quantization = 'none'.*allowed here: nf4"):
        load_base(ModelConfig(path=str(tmp_path / "nf4"), quantization="none"), CPU)


@pytest.mark.parametrize("layers", ["auto", "original"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"intermediate_size": 192}, r"is \[64, 128\] in its weights and \[64, 192\] by config.json \(6 such tensors\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \[32, 64\] in its weights and \[64, 64\]"),
        ({"hidden_size": 128, "head_dim": 16}, "in its weights and"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors, such as model.layers.2.input_layernorm.weight"),
        ({"attention_bias": True}, "lacks 8 tensors, such as model.layers.0.self_attn.k_proj.bias"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors, such as lm_head.weight"),
        ({"model_type": "qwen3", "head_dim": 16}, "lacks 4 tensors, such as model.layers.0.self_attn.k_norm.weight"),
        ({"quantization_config": NF4}, "holds no packed weight"),
    ],
)
def test_weights_of_another_model_than_config_says_are_refused_before_any_value_is_read(
    folder, monkeypatch, values, line, quantization, layers
):
    if "quantization_config" in values and quantization == "none":
        line = "the weights of .* are NF4"
    change_config(folder, **values)
    config = ModelConfig(path=str(folder), quantization=quantization, layers=layers)
    monkeypatch.setattr("engine.model.inspect.verdict_of", lambda _: pytest.fail("a tiny model was tried"))
    with pytest.raises(InputError, match=line) as caught:
        inspect_model(config)
    monkeypatch.setattr("engine.model.load.from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=line):
        load_base(config, CPU)
    assert "\n" not in str(caught.value)


def test_a_family_that_chooses_a_class_by_its_attention_is_loaded_as_it_was_tried(folder):
    from transformers import GPTJConfig

    config = GPTJConfig(n_embd=64, n_head=4, n_layer=2, rotary_dim=8, vocab_size=320, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert load_base(ModelConfig(path=str(folder)), CPU).route == inspect_model(ModelConfig(path=str(folder))).route


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_attention_that_a_folder_names_is_not_asked_for(folder, quantization):
    change_config(folder, _attn_implementation="flash_attention_2")  # its package is not installed
    config = ModelConfig(path=str(folder), quantization=quantization)
    assert inspect_model(config).route == load_base(config, CPU).route == Route()


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("generation_config.json", "[1]", "generation_config.json must hold a JSON object"),
        ("config.json", '{"quantization_config": {}}', "has an empty quantization_config in its config.json: remove it"),
    ],
)
def test_files_that_only_a_worker_s_load_would_stumble_over_are_refused_before(folder, file, text, line):
    given = json.loads(text)
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(content | given if isinstance(given, dict) else given))
    with pytest.raises(InputError, match=line):
        inspect_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("dropped", range(1, 19, 3))  # not the embedding: the head is tied to it
def test_each_tensor_that_is_missing_is_named(folder, dropped):
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[dropped]
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 tensors, such as {name}"):
        inspect_model(ModelConfig(path=str(folder)))


def test_tensors_that_are_not_part_of_the_model_are_said_and_scales_refused(folder):
    weights = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.extra_proj.bias": torch.ones(64) for i in range(2)}
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    notes = inspect_model(ModelConfig(path=str(folder))).notes
    (note,) = [note for note in notes if "2 tensors of the folder are not part of this model" in note]
    assert note.endswith(": model.layers.*.self_attn.extra_proj.bias")
    for name in ("weight_scale_inv", "weight_scale", "SCB"):
        scale = {f"model.layers.0.mlp.up_proj.{name}": torch.ones(1)}
        save_file(weights | scale, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"scales such as model.layers.0.mlp.up_proj.{name}"):
            inspect_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_whose_losses_are_not_finite_are_refused_by_the_worker(folder, value, quantization):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= value
    weights["model.layers.1.mlp.down_proj.weight"] *= value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"'{folder}': has losses that are not finite, in transformers too"):
        load_base(ModelConfig(path=str(folder), quantization=quantization), CPU)


def test_a_token_of_the_data_beyond_the_embedding_is_refused_by_name(tiny_config, folder):
    with pytest.raises(InputError, match=r"model\.path = .*token 4?\d+ \('<\|\w+\|>'\).*embedding has 2\d\d rows"):
        prepare([build(tiny_config, model={"path": str(shrink_rows(folder))})])


def shrink_rows(folder):
    """Cut the last two rows off the embedding, so that the tokenizer has more tokens than it."""
    weights = load_file(folder / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = rows[:-2].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, vocab_size=len(rows) - 2)
    return folder


def test_an_embedding_of_another_size_than_config_says_is_refused(folder):
    change_config(folder, vocab_size=300)
    with pytest.raises(InputError, match=r"model\.path.*300 rows.*weights hold 2\d\d"):
        inspect_model(ModelConfig(path=str(folder)))


def test_samples_beyond_the_model_s_positions_are_said(tiny_config, folder):
    assert prepare([build(tiny_config)]).model_notes == []
    change_config(folder, max_position_embeddings=16)
    notes = prepare([build(tiny_config, model={"path": str(folder)})]).model_notes
    assert any("made for 16 positions" in note for note in notes)


def test_experts_are_said_with_how_to_adapt_them(folder):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 260}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    given = ModelConfig(path=str(folder))
    facts = inspect_model(given)
    assert any("are experts, in NF4: lora.target_modules=[all-linear,experts]" in note for note in facts.notes)
    assert any("auxiliary loss is off" in note for note in facts.notes)
    assert facts.features["model.layers.1.mlp.experts.down_proj"] == (4 * 64, 4 * 32)
    assert known_shape(given).experts.active == 2
    plain = inspect_model(given.model_copy(update={"quantization": "none"}))  # twin: only NF4 packs them
    assert any("16 bits, without adapters" in note for note in plain.notes)
    assert not any("experts" in name for name in plain.features)


def test_only_layers_that_are_known_are_replaced():
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1), x

    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "router": Router(4, 4)})
    assert freeze_linears(model) == ["q"] and type(model["router"]) is Router

    class Int8(torch.nn.Linear):
        pass

    odd = torch.nn.ModuleDict({"q": Int8(4, 4)})
    odd["q"].weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"q is a Int8 of int8"):
        freeze_linears(odd)


def in_rows(parts):
    return EvaluationSet.of([collate(part) for part in parts])


@pytest.fixture
def hybrid(tiny_config, folder):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 260}
    config = Lfm2Config(**sizes, num_key_value_heads=2, layer_types=LFM2_LAYERS[:3], eos_token_id=0, initializer_range=0.3)
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return build(tiny_config, model={"path": str(folder)})


def test_a_hybrid_model_trains_and_is_evaluated_one_sample_a_row(hybrid, tmp_path):
    assert "one sample a row" in prepare([hybrid]).layers
    base = load_base(hybrid.model, CPU)
    _, view = load_data(hybrid.data, base.tokenizer)
    batches = evaluation_batches(base, view, hybrid.data.eval_max_seq_length)
    assert [len(batch.document_lengths) for batch in batches.batches] == [1] * len(view)
    # the same model by the library, sample by sample
    samples = [view[i] for i in range(len(view))]
    losses = loaded_losses(base.model.eval(), samples).losses
    wanted = torch.cat([loss[torch.tensor(s.is_target[1:])] for loss, s in zip(losses, samples)]).mean().item()
    assert evaluate(base, batches).mean == pytest.approx(wanted, abs=1e-4)
    # and a shared row would have another loss
    assert abs(evaluate(base, in_rows([samples])).mean - wanted) > 1e-3
    reports = run(hybrid, tmp_path / "trial", base)
    assert np.isfinite(reports[-1].eval_loss)


def test_a_mixed_model_trains_fused_in_shared_rows_and_names_the_package_that_it_lacks(tiny_config, folder, tmp_path):
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 260, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text = Qwen3_5TextConfig(**sizes, linear_key_head_dim=16, linear_value_head_dim=16, eos_token_id=0, initializer_range=0.3)
    Qwen3_5ForCausalLM(text).save_pretrained(folder)
    config = build(tiny_config, model={"path": str(folder)})
    facts = inspect_model(config.model)
    assert facts.describe() == "4 of 4 decoder layers run fused"
    lacks = importlib.util.find_spec("fla") is None
    line = "its linear attention runs on torch operations, several times slower: pip install flash-linear-attention"
    assert [note for note in facts.notes if "flash-linear-attention" in note] == [line][:lacks]
    assert not any("dimensions" in note for note in facts.notes)  # its convolution is no expert
    base = load_base(config.model, CPU)
    _, view = load_data(config.data, base.tokenizer)
    samples = [view[i] for i in range(len(view))]
    alone, shared = (evaluate(base, in_rows(parts)).mean for parts in ([[s] for s in samples], [samples]))
    assert base.shares_rows(512) and shared == pytest.approx(alone, abs=1e-5)
    assert np.isfinite(run(config, tmp_path / "trial", base)[-1].eval_loss)


@pytest.mark.parametrize("layers", ["auto", "original"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_loss_does_not_depend_on_the_rows_before(folder, kind, layers):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 48}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | (factors if kind == "longrope" else {})
    change_config(folder, rope_parameters=rope, max_position_embeddings=48)
    model = AutoModelForCausalLM.from_pretrained(folder)
    make_loud(model)
    model.save_pretrained(folder)
    base = load_base(ModelConfig(path=str(folder), quantization="none", layers=layers), CPU)
    random = np.random.default_rng(0)
    samples = [as_sample(random.integers(8, 250, size)) for size in (100, 70, 48, 20, 60)]
    with torch.no_grad():
        alone = [library_losses(AutoModelForCausalLM.from_pretrained(folder), sample) for sample in samples]
    assert not base.shares_rows(100) and base.shares_rows(48)
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0)):
        for i in order:
            assert difference(our_losses(base, [samples[i]]), [alone[i]]) < 1e-3
