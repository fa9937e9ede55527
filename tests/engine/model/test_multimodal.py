"""A model that reads images or sound too is trained in its text decoder only, under the names of its own class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.lora import attach
from engine.adapter.peft_files import export_adapter
from engine.adapter.portable import read_adapter
from engine.chat import load_chat
from engine.config.trial import LoraConfig, ModelConfig
from engine.errors import InputError
from engine.evaluation.reevaluate import evaluate_adapter
from engine.export.forms import export
from engine.model.comparison import library_losses, our_losses, random_samples
from engine.model.device import one_thread
from engine.model.guard import plain_linears
from engine.model.inspect import inspect_model
from engine.model.load import load_base
from engine.model.pretrained import without_weights
from tests.support.multimodal import KINDS, multimodal_config, save_multimodal
from tests.support.trials import CPU, build

LORA = LoraConfig(rank=4, lora_alpha=8.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return save_multimodal(tmp_path_factory.mktemp(request.param), request.param)


def export_random(base, folder: Path, tiny_config) -> list[str]:
    """Export an adapter with random values; return the names of its layers."""
    layers = attach(base.model, base.linear_names, LORA, 0)
    torch.manual_seed(1)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.3 * layer.out_features**-0.5)
    config = build(tiny_config, model=base.config.model_dump(), lora=LORA.model_dump())
    export_adapter(folder, config, layers, base.model, base.tokenizer)
    return list(layers)


@torch.no_grad()
def losses_by_peft(base: Path, adapter: Path | None, samples) -> np.ndarray:
    """Return the losses of the class that the folder's config names, and which a user loads."""
    import transformers
    from peft import PeftModel

    kind = multimodal_class(base)
    model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return torch.cat([library_losses(model, sample) for sample in samples]).numpy()


def multimodal_class(base: Path) -> str:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base).architectures[0]


def test_peft_loads_the_adapter_on_the_class_of_the_checkpoint_with_equal_losses(folder, tiny_config, tmp_path):
    given = ModelConfig(path=str(folder), quantization="none")
    base = load_base(given, CPU)
    names = export_random(base, tmp_path / "adapter", tiny_config)
    assert all(name.startswith("model.language_model.") for name in names)
    assert set(names) == set(inspect_model(given).features)
    samples = random_samples(200)
    ours = torch.cat([our_losses(base, [sample])[0] for sample in samples]).numpy()
    theirs = losses_by_peft(folder, tmp_path / "adapter", samples)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert abs(theirs - losses_by_peft(folder, None, samples)).max() > 0.01  # twin: the adapter does something


def test_the_merged_folder_has_the_adapters_losses(folder, tiny_config, tmp_path):
    base = load_base(ModelConfig(path=str(folder), quantization="none"), CPU)
    export_random(base, tmp_path / "adapter", tiny_config)
    export(tmp_path / "adapter", "merged", tmp_path / "merged", measure=False)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())}
    assert len(changed) == len(read_adapter(tmp_path / "adapter").layers)


def test_a_folder_with_three_towers_is_exported_for_its_class_and_chatted_with_in_nf4(tiny_config, tmp_path):
    given = ModelConfig(path=str(save_multimodal(tmp_path / "model", "gemma4")))
    facts = inspect_model(given)
    assert any("get no adapter, because text never reaches them" in note and "tower" in note for note in facts.notes)
    base = load_base(given, CPU)
    towers = [p for name, p in base.model.named_parameters() if "_tower" in name]
    assert towers and all(p.is_meta for p in towers) and not any(p.is_meta for p in base.model.get_decoder().parameters())
    export_random(base, tmp_path / "adapter", tiny_config)
    measured = evaluate_adapter(build(tiny_config, model=given.model_dump(), lora=LORA.model_dump()), tmp_path / "adapter", 1)
    assert measured.examples and abs(measured.eval_loss - measured.base_eval_loss) > 0.01
    assert isinstance(load_chat(tmp_path / "adapter", max_new_tokens=3, temperature=0.0).answer("What is 7 plus 7?"), str)
    export(tmp_path / "adapter", "peft", tmp_path / "out", measure=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from transformers import AutoTokenizer, Gemma4ForConditionalGeneration" in card
    with pytest.raises(InputError, match="architectures = 'Gemma4ForConditionalGeneration': no GGUF export"):
        export(tmp_path / "adapter", "gguf-merged", tmp_path / "gguf", measure=False)


@pytest.mark.parametrize(("architectures", "expected"), [(["Qwen3_5ForCausalLM"], "model.layers."), (None, "model.layers.")])
def test_a_folder_that_names_the_text_class_is_loaded_as_that_class(architectures, expected):
    config = multimodal_config("qwen3_5")
    config.architectures = architectures
    names = plain_linears(without_weights(config, ModelConfig(path="x")))
    assert all(name.startswith(expected) for name in names)
