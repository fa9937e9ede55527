"""A folder whose files contradict each other is read as what its weights are, or refused before anything is paid for."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.export.merge import base_folder
from engine.model.comparison import our_losses, random_samples
from engine.model.inspect import inspect_model
from engine.model.load import load_base
from engine.model.pretrained import model_factory
from engine.sources.weight_files import tensor_files
from tests.support.multimodal import save_multimodal
from tests.support.tiny_models import NF4, change_config
from tests.support.trials import CPU

UP = "model.layers.0.mlp.up_proj.weight"


def rewrite(folder, edit):
    weights = edit(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder):
    with pytest.raises(InputError) as caught:
        inspect_model(ModelConfig(path=str(folder)))
    with pytest.raises(InputError) as again:
        load_base(ModelConfig(path=str(folder)), CPU)
    assert str(again.value) == str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def losses(folder):
    inspect_model(ModelConfig(path=str(folder)))
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), CPU)
    return base, torch.cat([our_losses(base, [sample])[0] for sample in random_samples(200)])


def packed_folder(folder, target, kind="nf4", skip=None):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, llm_int8_skip_modules=skip)
    model_factory(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    ).save_pretrained(target)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


@pytest.mark.parametrize("said", [["lm_head"], None, ["lm_head", "language_model.model.layers.1.mlp"], ["lm_head", "v_proj"]])
def test_the_weights_of_a_folder_in_nf4_say_which_layers_are_packed_whatever_its_config_says(folder, tmp_path, said):
    kept = ["lm_head", "q_proj", "model.layers.1.mlp"]
    packed_folder(folder, tmp_path / "nf4", skip=kept)
    base, wanted = losses(tmp_path / "nf4")
    (note,) = inspect_model(ModelConfig(path=str(tmp_path / "nf4"))).notes
    assert note.startswith("its weights hold 5 linear layers in 16 bits, which a forecast counts as NF4: ")
    change_config(tmp_path / "nf4", quantization_config={**NF4, "llm_int8_skip_modules": said})
    found, again = losses(tmp_path / "nf4")
    first, second = inspect_model(ModelConfig(path=str(tmp_path / "nf4"))).notes
    assert "packs other layers" in first and second == note
    plain = [name for name in found.linear_names if not found.model.get_submodule(name).is_packed]
    assert plain == [name for name in found.linear_names if "q_proj" in name or "layers.1.mlp" in name]
    assert found.linear_names == base.linear_names and torch.equal(wanted, again)


def test_an_adapter_is_not_merged_into_packed_weights(folder, tmp_path):
    adapter = SimpleNamespace(revision=None)
    assert base_folder(adapter, str(folder)) == folder
    with pytest.raises(InputError, match="holds NF4 weights; allowed: --to peft"):
        base_folder(adapter, str(packed_folder(folder, tmp_path / "nf4")))


def test_what_config_says_about_nf4_counts_in_the_text_part_too(tmp_path):
    folder = packed_folder(save_multimodal(tmp_path / "plain", "gemma3"), tmp_path / "nf4", skip=["vision_tower", "lm_head"])
    _, wanted = losses(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(losses(folder)[1], wanted)


@pytest.mark.parametrize(
    ("end", "value", "line"),
    [
        (".absmax", None, "lacks .*absmax, a part of a packed weight"),
        (".quant_map", None, "lacks .*quant_map, a part of a packed weight"),
        (".absmax", torch.ones(3), r"absmax has 3 values, and its weight needs \d+"),
        ("", torch.zeros(5, 1, dtype=torch.uint8), r"up_proj.weight has 5 values, and its weight needs \d,\d+"),
    ],
)
def test_a_packed_weight_without_all_its_parts_is_refused(folder, tmp_path, end, value, line):
    packed_folder(folder, tmp_path / "nf4")

    def edit(weights):
        weights.pop(UP + end)
        return weights if value is None else weights | {UP + end: value}

    rewrite(tmp_path / "nf4", edit)
    with pytest.raises(InputError, match=line):
        inspect_model(ModelConfig(path=str(tmp_path / "nf4")))


def test_fp4_among_nf4_is_refused_by_its_weight_s_name(folder, tmp_path):
    packed_folder(folder, tmp_path / "nf4")
    packed_folder(folder, tmp_path / "fp4", kind="fp4")
    other = {name: value for name, value in load_file(tmp_path / "fp4" / "model.safetensors").items() if name.startswith(UP)}
    rewrite(tmp_path / "nf4", lambda weights: {n: v for n, v in weights.items() if not n.startswith(UP)} | other)
    assert f"{UP} is bitsandbytes fp4; allowed: NF4" in refusal(tmp_path / "nf4")


def test_a_packed_output_head_is_refused(folder, tmp_path):
    rewrite(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"] * 2})
    change_config(folder, tie_word_embeddings=False)
    packed_folder(folder, tmp_path / "nf4", skip=[])
    assert "holds NF4 weights of lm_head (1 such layer)" in refusal(tmp_path / "nf4")


def test_a_mixture_in_nf4_is_refused_in_either_way_of_packing(tmp_path, tiny_config):
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 2, "head_dim": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 1}
    config = Qwen3MoeConfig(vocab_size=300, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tiny_config['model']['path']}/{file}", tmp_path / "plain")
    packed_folder(tmp_path / "plain", tmp_path / "nf4")  # its experts stay in 16 bits
    assert "holds NF4 weights beside its experts" in refusal(tmp_path / "nf4")
    whole = load_file(tmp_path / "nf4" / "model.safetensors")
    stem = "model.layers.0.self_attn.q_proj.weight"
    parts = {name.removeprefix(stem): value for name, value in whole.items() if name.startswith(stem)}

    def packed_experts(weights):  # as bitsandbytes packs a layer for each expert
        names = [n for n in weights if ".experts." in n]
        kept = {n: v for n, v in weights.items() if n not in names}
        return kept | {n + end: value.clone() for n in names for end, value in parts.items()}

    rewrite(tmp_path / "nf4", packed_experts)
    assert "take the 16-bit model" in refusal(tmp_path / "nf4")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_weights_of_whole_numbers_without_scales_are_refused(folder, kind):
    rewrite(folder, lambda weights: weights | {UP: (weights[UP] * 50).to(kind)})
    assert f"{UP} holds whole numbers without scales (1 such weight)" in refusal(folder)


def test_whole_numbers_that_are_no_weights_are_not_looked_at(folder):
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    rewrite(folder, lambda weights: weights | {"model.layers.0.self_attn.bias": mask})
    (note,) = inspect_model(ModelConfig(path=str(folder))).notes
    assert note.startswith("1 tensor of the folder is not part of this model")


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_config_leaves_out_is_refused_unless_it_is_zero(folder, value):
    rewrite(folder, lambda weights: weights | {UP.replace("weight", "bias"): torch.full((128,), value, dtype=torch.bfloat16)})
    if value:
        assert "has values in model.layers.0.mlp.up_proj.bias, and config.json gives that layer no bias" in refusal(folder)
    else:
        assert len(inspect_model(ModelConfig(path=str(folder))).notes) == 1


@pytest.mark.parametrize("name", ["Qwen2ForSequenceClassification", "LlamaForTokenClassification", "MistralForReward"])
def test_a_model_that_scores_texts_is_refused_though_its_tensors_fit(folder, name):
    change_config(folder, architectures=[name])
    assert f"is a {name}, which writes no text" in refusal(folder)


def test_an_adapter_beside_the_weights_is_refused_because_transformers_would_add_it(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json): name its base model, and lora.start_from" in refusal(folder)


def test_the_files_say_where_a_tensor_is_and_not_their_index(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    _, wanted = losses(folder)
    (folder / "model.safetensors").unlink()
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    swapped = {name: "b.safetensors" if name in names[:9] else "a.safetensors" for name in names[1:]}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": swapped}))
    assert 'lacks its metadata: add "metadata": {} to it' in refusal(folder)
    index.write_text(json.dumps({"weight_map": swapped, "metadata": {}}))
    assert torch.equal(losses(folder)[1], wanted)
    assert {name: path.name for name, path in tensor_files(folder).items()} == {n: f for f, part in files.items() for n in part}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # the library prefers it, and so does a merge
    assert {path.name for path in tensor_files(folder).values()} == {"model.safetensors"}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_of_a_token_that_is_no_number_is_refused_though_no_sample_of_the_check_has_it(folder, value):
    def edit(weights):
        weights["model.embed_tokens.weight"][3, 5] = value
        return weights

    rewrite(folder, edit)
    with pytest.raises(InputError, match=r"holds NaN or infinity in the row of token 3 \(1 such row\)"):
        load_base(ModelConfig(path=str(folder)), CPU)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a folder of the hub's cache in which a model named org/model may be put, and the files asked of the hub."""
    from huggingface_hub.errors import EntryNotFoundError

    root = tmp_path / "hub" / "models--org--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot, asked = root / "snapshots" / ("a" * 40), []

    def deliver(source, name, revision=None):
        asked.append(name)
        if name == "model.safetensors":
            raise EntryNotFoundError("no such file")
        return str(shutil.copy(tmp_path / "there" / name, snapshot))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", deliver)
    return snapshot, asked


def test_weights_of_the_hub_are_checked_as_those_of_a_folder_are_once_they_are_here(folder, hub):
    snapshot, asked = hub
    shutil.copytree(folder, snapshot)
    assert inspect_model(ModelConfig(path="org/model")).notes == ()
    rewrite(snapshot, lambda weights: weights | {UP: weights[UP].to(torch.int8)})
    with pytest.raises(InputError, match="'org/model': .*whole numbers without scales"):
        inspect_model(ModelConfig(path="org/model"))
    assert not asked


def test_a_worker_fetches_the_files_that_transformers_would_read_and_checks_them_first(folder, hub, tmp_path, monkeypatch):
    snapshot, asked = hub
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    weights = load_file(there / "model.safetensors")
    (there / "model.safetensors").unlink()
    save_file(weights | {UP: weights[UP].to(torch.int8)}, there / "part.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "part.safetensors"), "metadata": {}}
    (there / "model.safetensors.index.json").write_text(json.dumps(index))
    snapshot.mkdir(parents=True)
    for file in (*there.glob("*config.json"), there / "tokenizer.json"):
        shutil.copy(file, snapshot)
    assert inspect_model(ModelConfig(path="org/model")).notes == ()  # nothing is known yet
    monkeypatch.setattr("engine.model.load.from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="'org/model': .*whole numbers without scales"):
        load_base(ModelConfig(path="org/model"), CPU)
    assert asked == ["model.safetensors", "model.safetensors.index.json", "part.safetensors"]
