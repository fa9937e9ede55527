"""An exported adapter gives the trained model again, in PEFT and in the engine."""

from pathlib import Path

import pytest
import torch

from engine.adapter.lora import attach
from engine.adapter.peft_files import peft_config
from engine.data.packing import collate
from engine.data.views import load_data
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model import load as model
from engine.model.load import load_base
from engine.sample_losses import read_sample_losses
from tests.support.trials import CPU, build, run


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "mlp.up_proj"], "lora_alpha": 3.5},
        {"target_modules": r"model\.layers\.1\..*_proj"},
    ],
)
def test_peft_loads_the_exported_adapter_with_equal_logits(tiny_config, tmp_path, lora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = build(tiny_config, lora=lora)
    run(config, tmp_path)
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 99)
    from engine.adapter.peft_files import load_adapter

    load_adapter(tmp_path / "adapter", layers)
    view, _ = load_data(config.data, base.tokenizer)
    batch = collate([view[0]])
    quantised = model.nf4_load_config(True, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    # bitsandbytes' Linear4bit computes in bf16 on CPUs with avx512_bf16. Its weights in fp32 give
    # the same logits on any CPU.
    theirs = theirs.dequantize()
    assert {type(module) for module in theirs.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    peft_model = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours_logits = torch.nn.functional.linear(base.hidden_states(batch), base.head().weight_VD)
        peft_logits = peft_model(input_ids=batch.input_ids_T[None]).logits[0]
        plain_logits = load_base(config.model, CPU).hidden_states(batch) @ base.head().weight_VD.T
    torch.testing.assert_close(ours_logits, peft_logits, rtol=1e-4, atol=1e-4)
    # the adapter does something
    assert not torch.allclose(ours_logits, plain_logits, rtol=1e-4, atol=1e-4)


def test_a_fresh_load_of_the_exported_adapter_has_the_reported_loss(tiny_config, tmp_path):
    config = build(tiny_config)
    reports = run(config, tmp_path)
    measured = evaluate_adapter(config, tmp_path / "adapter")
    assert measured.eval_loss == pytest.approx(min(r.eval_loss for r in reports), rel=1e-6)
    assert measured.base_eval_loss > measured.eval_loss
    kept = read_sample_losses(tmp_path, min(reports, key=lambda report: report.eval_loss))
    again, base = measured.sample_losses, measured.base_sample_losses
    assert again.sums == pytest.approx(kept.sums, rel=1e-5) and len(again.sums) > 1
    assert again.evaluation_digest == base.evaluation_digest == kept.evaluation_digest
    assert (base.mean, again.mean) == (measured.base_eval_loss, measured.eval_loss)


def test_the_base_is_named_so_that_it_is_found_again_from_any_folder(tiny_config, tmp_path, monkeypatch):
    def base_of(path):
        return peft_config(build(tiny_config, model={"path": path}), ["a"], ["a"])["base_model_name_or_path"]

    folder = tiny_config["model"]["path"]
    monkeypatch.chdir(Path(folder).parent)
    assert base_of(Path(folder).name) == base_of(folder) == folder  # relative to where training ran
    assert base_of("org/model") == "org/model"
    assert base_of("builtin:smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"  # not the cache of this machine


def test_the_tokenizer_s_files_are_made_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from engine.adapter import peft_files
    from tests.support.tiny_models import byte_tokenizer

    tokenizer, made = byte_tokenizer(), []
    save = type(tokenizer).save_pretrained
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda self, *a, **k: made.append(1) or save(self, *a, **k))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # nothing is written to the place for temporary files
    files = peft_files._tokenizer_files(tokenizer, tmp_path)
    assert peft_files._tokenizer_files(tokenizer, tmp_path) is files and len(made) == 1
    save(tokenizer, tmp_path)
    assert {str(name) for name in files} == {file.name for file in tmp_path.iterdir()}
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
    tokenizer.chat_template = "other"
    assert peft_files._tokenizer_files(tokenizer, tmp_path) != files and len(made) == 2
