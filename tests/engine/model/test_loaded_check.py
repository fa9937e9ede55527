"""Each kind of fault on real weights is found on samples of both lengths: those for 16 bits, and the shorter ones for fp32."""

import numpy as np
import pytest
import torch

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model import comparison, loaded_check, skeleton
from engine.model.comparison import EXACT_LENGTHS, LENGTHS, as_sample, library_losses, our_losses, random_samples
from engine.model.load import load_base
from engine.model.loaded_check import LEAST, LibraryLosses, check_loaded
from engine.model.pretrained import model_factory
from engine.quant.frozen_linear import FrozenLinear
from tests.support.model_families import config_of
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers whose weights are so large that each part of it shows in the losses."""
    config, folder = config_of("llama"), tmp_path_factory.mktemp("loud") / "model"
    factory = model_factory(config)
    library = skeleton.build(
        config,
        lambda small: factory.from_config(small, attn_implementation="eager"),
        lambda made: library_losses(made, random_samples(skeleton.VOCABULARY)[0]),
    )
    library.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    return load_base(ModelConfig(path=str(folder), dtype="float32"), CPU)


def truth(base, lengths):
    samples = random_samples(skeleton.VOCABULARY, lengths=lengths)
    return LibraryLosses(samples, [our_losses(base, [sample])[0] for sample in samples])


def one_layer_lost(base):
    layer = next(module for module in base.model.modules() if isinstance(module, FrozenLinear))
    layer.weight.data.fill_(0x77)  # two codes of zero


def logits_scaled(base):
    base.model.get_output_embeddings().weight.data.mul_(0.9)


def norm_left_out(base):
    base.model.model.norm.weight.data.fill_(1.0)


@pytest.mark.parametrize("fault", [one_layer_lost, logits_scaled, norm_left_out])
@pytest.mark.parametrize("lengths", [LENGTHS, EXACT_LENGTHS])
def test_a_fault_in_the_loaded_weights_is_refused(loaded, lengths, fault):
    theirs = truth(loaded, lengths)
    assert check_loaded(loaded, theirs).route.shares_rows
    with torch.no_grad():
        fault(loaded)
    with pytest.raises(InputError, match="differ from those of transformers") as refused:
        check_loaded(loaded, theirs)
    assert "try model.layers=original" in refused.value.allowed


@pytest.mark.parametrize("lengths", [LENGTHS, EXACT_LENGTHS])
def test_samples_that_see_each_other_have_rows_of_their_own(loaded, lengths, monkeypatch):
    theirs = truth(loaded, lengths)

    def joined(base, samples):
        whole = our_losses(base, [as_sample(np.concatenate([sample.input_ids for sample in samples]))])[0]
        ends = np.cumsum([len(sample.input_ids) for sample in samples])
        return [whole[end - len(sample.input_ids) : end - 1] for sample, end in zip(samples, ends)]

    monkeypatch.setattr(loaded_check, "our_losses", joined)
    assert comparison.mean_difference(joined(loaded, theirs.samples), theirs.losses) > 10 * LEAST
    assert not check_loaded(loaded, theirs).route.shares_rows


def test_fp32_is_checked_on_the_shorter_samples(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.model.load.check_loaded", lambda base, theirs: seen.append(theirs.samples) or base)
    load_base(ModelConfig(path=str(folder), dtype="float32"), CPU)
    assert tuple(len(sample.input_ids) for sample in seen[0]) == EXACT_LENGTHS


def test_the_measure_is_an_attention_of_the_library_that_is_right_for_the_model(monkeypatch):
    """PaliGemma's `sdpa` is not causal without a mask; another model has an `sdpa` that raises."""
    from tests.support.model_families import judge

    assert judge("llama").measures == ("sdpa", "eager")
    assert judge("paligemma").measures == ("eager",)

    asked = []
    model = torch.nn.Linear(1, 1)
    model._supports_sdpa, model.dtype = True, torch.bfloat16
    monkeypatch.setattr(loaded_check, "keep_as_stored", lambda given: None)
    monkeypatch.setattr(loaded_check, "text_attention", lambda config, name: name)
    model.config = type("Config", (), {"get_text_config": lambda self: type("Text", (), {"_attn_implementation": "packed"})})()
    model.set_attn_implementation = lambda name: None
    monkeypatch.setattr(loaded_check, "_losses", lambda given, name, samples: asked.append(name) or [torch.ones(3)])
    found = loaded_check.loaded_losses(model, random_samples(100)[:1], measures=("eager",))
    assert asked == ["eager"] and found.rounding is None  # no rounding is measured by an attention that is wrong
