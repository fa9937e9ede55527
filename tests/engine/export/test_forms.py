"""Every export form, loaded by its target program, gives the intended model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapter.portable import read_adapter
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.evaluation.reevaluate import evaluate_adapter
from engine.export.__main__ import main
from engine.export.forms import export
from engine.export.gguf_model import Naming, write_adapter, write_model
from engine.export.merge import merged_dtype, merged_tensors
from engine.model.device import one_thread
from engine.model.inspect import model_config
from engine.sources.smollm2 import tensor_name, unpermute
from engine.sources.weight_files import tensor_files
from tests.support.export_models import FAMILIES, save_adapter, save_model
from tests.support.trials import build, run

IDS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(2))
PLAIN = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}


@torch.no_grad()
def logits(base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    return model(IDS).logits[0].float()


def left_by(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "plain", base)


def test_rslora_and_patterns_are_folded_in_so_that_plain_alpha_over_r_is_right(base, tmp_path):
    given = save_adapter(tmp_path / "given", base, **PATTERNS)
    export(given, "peft", tmp_path / "out", measure=False)
    wanted = logits(base, given)
    assert torch.allclose(logits(base, tmp_path / "out"), wanted, atol=2e-5)
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: values[key] for key in PLAIN} == PLAIN
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name} == {values["r"]}
    # twin: a loader that ignores rsLoRA and the patterns of the original adapter gets another model
    naive = tmp_path / "naive"
    shutil.copytree(given, naive)
    values = json.loads((naive / "adapter_config.json").read_text())
    (naive / "adapter_config.json").write_text(json.dumps({**values, "use_rslora": False, "alpha_pattern": {}}))
    assert not torch.allclose(logits(base, naive), wanted, atol=1e-2)


def test_a_plain_adapter_is_exported_bit_for_bit(base, adapter, tmp_path):
    export(adapter, "peft", tmp_path / "out", measure=False)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_merged_model_is_the_original_weights_plus_the_adapter_rounded_once(base, adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(adapter, "merged", tmp_path / "out", measure=False)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    whole.merge_and_unload().to(torch.bfloat16).save_pretrained(tmp_path / "peft")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    ours = logits(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(ours, logits(tmp_path / "peft", dtype=torch.bfloat16))
    assert not torch.equal(ours, logits(base, dtype=torch.bfloat16))  # twin


def test_a_base_in_several_files_is_merged_file_by_file(base, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    shutil.copytree(adapter, tmp_path / "adapter")
    values = json.loads((adapter / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    export(tmp_path / "adapter", "merged", tmp_path / "many", measure=False)
    export(adapter, "merged", tmp_path / "one", measure=False)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "many"), logits(tmp_path / "one"))


def test_weights_that_a_16_bit_base_holds_in_fp32_stay_as_they_are(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    norm = state["model.layers.0.input_layernorm.weight"] = torch.rand(64)  # more digits than 16 bits have
    query = state["model.layers.0.self_attn.q_proj.weight"] = state["model.layers.0.self_attn.q_proj.weight"].float()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    files = tensor_files(tmp_path / "base")
    dtype, keeps_fp32 = merged_dtype(files)
    targets = {"model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj"}
    found = dict(merged_tensors(read_adapter(adapter), files["model.norm.weight"], dtype, targets, keeps_fp32))
    assert torch.equal(found["model.layers.0.input_layernorm.weight"], norm) and keeps_fp32
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], query.bfloat16())
    assert {tensor.dtype for name, tensor in found.items() if "input_layernorm" not in name} == {torch.bfloat16}


def test_a_merged_weight_beyond_float16_is_refused(base, adapter):
    layers = read_adapter(adapter).layers
    layers["model.layers.0.self_attn.q_proj"][1].mul_(1e7)
    found = read_adapter(adapter)
    object.__setattr__(found, "layers", layers)
    file = next(iter(tensor_files(base).values()))
    targets = {f"{name}.weight": name for name in layers}
    dict(merged_tensors(found, file, torch.bfloat16, targets))  # twin: bfloat16 holds it
    with pytest.raises(InputError, match="beyond what torch.float16 can hold"):
        dict(merged_tensors(found, file, torch.float16, targets))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_gguf_adapter_has_llama_cpps_names_row_order_and_metadata(family, tmp_path):
    base = save_model(tmp_path / "base", family)
    given = save_adapter(tmp_path / "given", base)
    export(given, "gguf-adapter", tmp_path / "out", measure=False)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == family
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    layers = read_adapter(given).layers
    assert len(tensors) == 2 * len(layers) == 28
    for name, (a_RD, b_OR) in layers.items():
        kind = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
                "up_proj": "ffn_up", "down_proj": "ffn_down"}[name.rpartition(".")[2]]  # fmt: skip
        stem = f"blk.{name.split('.')[2]}.{kind}.weight"
        assert (tensors[f"{stem}.lora_a"] == a_RD.numpy()).all()
        rows = tensors[f"{stem}.lora_b"]
        heads = {"attn_q": 4, "attn_k": 2}.get(kind)
        if family == "llama" and heads:
            assert (rows != b_OR.numpy()).any()  # twin: the order did change
            rows = unpermute(rows, heads)
        assert (rows == b_OR.numpy()).all()


def test_the_merged_gguf_holds_the_merged_weights_and_what_llama_cpp_reads_of_the_config(base, adapter, tmp_path):
    export(adapter, "gguf-merged", tmp_path / "out", measure=False)
    export(adapter, "merged", tmp_path / "merged", measure=False)
    assert left_by(tmp_path / "out") == ["README.md", "model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    seen = set()
    for tensor in reader.tensors:
        name = tensor_name(tensor.name)
        seen.add(name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
        assert ((unpermute(values, heads) if heads else values) == merged[name].float().numpy()).all(), name
    assert seen == merged.keys() - {"lm_head.weight"}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    sizes = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    assert [fields[f"llama.{name}"] for name in sizes] == [2, 64, 128, 4, 2]
    assert (fields["general.type"], fields["tokenizer.ggml.pre"], len(fields["tokenizer.ggml.tokens"])) == ("model", "gpt-2", 260)
    assert fields["tokenizer.ggml.eos_token_id"] == 257 and "<|assistant|>" in fields["tokenizer.chat_template"]


def test_the_model_card_states_the_losses_of_the_adapter_as_trained_and_of_the_merged_model(tiny_config, tmp_path):
    config = build(tiny_config, lora={"use_rslora": True}, train={"max_tokens": 1024, "num_reports": 1})
    run(config, tmp_path / "trial")
    (tmp_path / "trial" / "train_config.json").write_text(config.model_dump_json())
    known = evaluate_adapter(config, tmp_path / "trial" / "adapter")
    measured = export(tmp_path / "trial" / "adapter", "merged", tmp_path / "out")
    assert (measured.base, measured.adapter) == pytest.approx((known.base_eval_loss, known.eval_loss), rel=1e-5)
    assert measured.merged != measured.adapter
    # twin: it is not the base model alone
    assert measured.merged < (measured.base + measured.adapter) / 2
    card = (tmp_path / "out" / "README.md").read_text()
    told = [float(cell) for cell in re.findall(r"^\| (?:base|merged) model.*?\| (\d+\.\d{4}) \|", card, re.M)]
    assert told == [round(loss, 4) for loss in (measured.base, measured.adapter, measured.merged)]
    assert measured.training_digest in card and config.fingerprint() in card and "vllm serve" in card
    plain = config.model.model_copy(update={"path": str(tmp_path / "out"), "quantization": "none"})
    again = evaluate_adapter(config.model_copy(update={"model": plain}), tmp_path / "trial" / "adapter")
    assert measured.merged == pytest.approx(again.base_eval_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("peft", {"file": "adapter_config.json"}, "adapter_config.json is not in it"),
        ("peft", {"use_dora": True}, "use_dora = True: must say whether adapter_model.safetensors holds lora_magnitude_vector"),
        ("peft", {"r": 5}, "rank 4.*must be 5"),
        ("merged", {"base_model_name_or_path": "/nowhere/model"}, "no such folder"),
        ("gguf-adapter", {"architectures": ["OlmoForCausalLM"]}, "no GGUF export for it; allowed: LlamaForCausalLM"),
        ("gguf-merged", {"pre_tokenizer": {"type": "Whitespace"}}, "no GGUF export for this tokenizer"),
        ("merged", {"shape": True}, r"fits a weight \[7, 64\], the base model's is \[64, 64\]"),
        ("merged", {"out": True}, "must be a new or empty folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(form, spoil, message, base, adapter, tmp_path, capsys):
    place, given, out = tmp_path / "base", tmp_path / "given", tmp_path / "out"
    shutil.copytree(base, place)
    shutil.copytree(adapter, given)
    values = json.loads((given / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(place)}
    (given / "adapter_config.json").write_text(json.dumps({**values, **{key: v for key, v in spoil.items() if key in values}}))
    for file, key in ((place / "config.json", "architectures"), (place / "tokenizer.json", "pre_tokenizer")):
        if key in spoil:
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: spoil[key]}))
    if "file" in spoil:
        (given / spoil["file"]).unlink()
    if "shape" in spoil:
        state = load_file(given / "adapter_model.safetensors")
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        save_file({**state, name: state[name][:7].clone()}, given / "adapter_model.safetensors")
    if "out" in spoil:
        out.mkdir()
        (out / "precious").write_text("kept")
    before = left_by(tmp_path)
    assert main([str(given), "--to", form, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(message, error), error
    assert left_by(tmp_path) == before
    assert "out" not in spoil or left_by(out) == ["precious"]


def test_an_export_that_is_interrupted_leaves_nothing(base, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.export.forms._write_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([str(adapter), "--to", "merged", "--out", str(tmp_path / "out"), "--no-losses"]) == 130
    assert capsys.readouterr().err == "\nstopped; nothing was written\n"
    assert left_by(tmp_path) == []


@pytest.mark.faults
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_itself_computes_the_same_logits(family, tmp_path, monkeypatch):
    """Needs llama-cpp-python (not a dependency; skipped without it).

    The tolerance is 1 % of the largest logit, because keys and values are cached in 16 bits.
    """
    pytest.importorskip("llama_cpp")
    base = save_model(tmp_path / "base", family, torch.float32)
    given = save_adapter(tmp_path / "given", base)
    config = model_config(ModelConfig(path=str(base))) | {"dtype": "float32"}
    write_model(base, config, tmp_path / "base.gguf", family)
    write_adapter(read_adapter(given), config, tmp_path / "adapter.gguf")
    plain, tuned = logits(base), logits(base, given)
    assert _distance(_llama_cpp(tmp_path / "base.gguf"), plain) < 0.01
    assert _distance(_llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), tuned) < 0.01
    # twin: rows of q and k in the wrong order give other logits
    monkeypatch.setattr(Naming, "rows", _shuffled if family.startswith("qwen") else _as_they_were)
    write_adapter(read_adapter(given), config, tmp_path / "wrong.gguf")
    assert _distance(_llama_cpp(tmp_path / "base.gguf", tmp_path / "wrong.gguf"), tuned) > 0.05


def _as_they_were(self, key, tensor):
    return tensor


def _shuffled(self, key, tensor):
    from engine.export.gguf_model import permute

    return permute(tensor, 2) if re.search(r"\.[qk]_proj\.", key) else tensor


def _distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def _llama_cpp(model: Path, lora: Path | None = None) -> torch.Tensor:
    import llama_cpp

    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1}
    loaded = llama_cpp.Llama(str(model), lora_path=str(lora) if lora else None, **options)
    loaded.eval(IDS[0].tolist())
    scores = torch.tensor(loaded.scores[: IDS.shape[1]]).clone()
    loaded.close()
    return scores
