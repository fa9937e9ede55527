"""A model in FP8, as it is released, is trained like the 16-bit copy with the same values."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model.comparison import difference, our_losses, random_samples
from engine.model.inspect import inspect_model, known_shape
from engine.model.load import load_base
from engine.model.pretrained import unpacked_weights
from engine.quant.unpacked_weights import unpack_fp8
from tests.support.fp8_folders import BLOCKS, FBGEMM, ONE_SCALE, compressed, quantised, save_pair
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU

SIZES = {"hidden_size": 144, "intermediate_size": 272, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 40}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 136, "num_experts": 4, "num_experts_per_tok": 2}


def tiny(family, **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more, vocab_size=len(byte_tokenizer()))
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("family", "more", "settings", "kind", "saved"),
    [
        ("Qwen3", {}, BLOCKS, "block", {}),
        ("Llama", {"tie_word_embeddings": True}, ONE_SCALE, "tensor", {}),
        ("Llama", {}, FBGEMM, "channel", {}),
        ("Qwen3", {}, compressed("channel"), "channel", {}),
        ("Qwen3Moe", EXPERTS, BLOCKS, "block", {}),
        ("Qwen3Moe", EXPERTS, BLOCKS, "block", {"save_original_format": False}),
        ("Qwen3Moe", EXPERTS, compressed("tensor"), "tensor", {"save_original_format": False}),
    ],
)
def test_weights_and_losses_are_those_of_the_copy_bit_for_bit(family, more, settings, kind, saved, tmp_path):
    folders = save_pair(tiny(family, **more), tmp_path, settings, kind, **saved)
    given = [ModelConfig(path=str(folder), dtype="float32") for folder in folders]
    assert inspect_model(given[0]).features == inspect_model(given[1]).features
    assert known_shape(given[0]) == known_shape(given[1])  # so the forecast is the copy's
    bases = [load_base(one, CPU) for one in (*given, given[0])]  # the last from the shared cache
    states = [base.model.state_dict() for base in bases]
    for name, value in states[1].items():
        assert all(torch.equal(state[name], value) for state in states), name
    samples = random_samples(200)
    losses = [our_losses(base, samples) for base in bases]
    assert difference(losses[0], losses[1]) == difference(losses[0], losses[2]) == 0.0


def test_transformers_own_dequantisation_gives_the_same_weights(tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 128, "head_dim": 64}  # it takes whole blocks alone
    config = Qwen3MoeConfig(**{**sizes, **EXPERTS, "moe_intermediate_size": 128}, vocab_size=len(byte_tokenizer()))
    packed, _ = save_pair(Qwen3MoeForCausalLM(config), tmp_path, BLOCKS, "block")
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(packed, **options).state_dict()
    weights = unpacked_weights(packed, {"quantization_config": BLOCKS}, ModelConfig(path=str(packed)))
    assert sum(map(weights.is_packed, weights.files)) == 2 * (4 + 3 * 4)
    for name in weights.files:
        if name in theirs:
            assert torch.equal(weights.read(name, torch.bfloat16).to(theirs[name].dtype), theirs[name]), name
    experts = theirs["model.layers.1.mlp.experts.gate_up_proj"]
    for number, expert in enumerate(experts):
        names = [f"model.layers.1.mlp.experts.{number}.{part}_proj.weight" for part in ("gate", "up")]
        assert torch.equal(torch.cat([weights.read(name, torch.bfloat16) for name in names]), expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "block"), [("block", (128, 128)), ("channel", None), ("tensor", None)])
def test_unpacking_is_the_plain_formula_rounded_once(kind, block, dtype):
    weight_EOD = torch.randn(3, 130, 257, generator=torch.Generator().manual_seed(0))
    values, scales, meant = quantised(weight_EOD, kind)
    assert torch.equal(unpack_fp8(values, scales, block, dtype), meant.to(dtype))
    assert torch.equal(unpack_fp8(values[1], scales[1], block, dtype), meant[1].to(dtype))
    powers = torch.exp2(torch.randint(-9, 0, scales.shape)).to(torch.float8_e8m0fnu)
    assert torch.equal(unpack_fp8(values, powers, block, dtype), unpack_fp8(values, powers.float(), block, dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pair(tiny("Llama"), tmp_path_factory.mktemp("fp8"), BLOCKS, "block")[0]


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{NAME}_scale_inv"), "is FP8 without a scale beside it"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(3, 2)}), r"blocks of 128 x 128, and has \[3, 2\] in F32"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}), r"\[2, 2\] in U8"),
        (lambda t: t.update({NAME: torch.zeros(160, 72, dtype=torch.int8)}), "is I8 in a folder of FP8"),
    ],
)
def test_scales_that_do_not_fit_are_one_line_before_weights_are_read(change, named, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for read in (inspect_model, lambda config: load_base(config, CPU)):
        with pytest.raises(InputError, match=rf"{named}.*: take the 16-bit model$"):
            read(ModelConfig(path=str(copy)))


@pytest.mark.parametrize(
    "settings",
    [
        {**BLOCKS, "weight_block_size": [128]},
        {**BLOCKS, "scale_fmt": "other"},
        {**BLOCKS, "expert_dtype": "fp4"},
        compressed("tensor", num_bits=4),
        compressed("group", group_size=128),
        {**compressed("tensor"), "format": "pack-quantized"},
        {**compressed("tensor"), "transform_config": {"config_groups": {"R1": {}}}},
        {**compressed("tensor"), "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
)
def test_other_forms_are_refused_in_one_line(settings, folder, tmp_path):
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"holds {settings['quant_method']} quantised weights.*take the 16-bit model$"):
        inspect_model(ModelConfig(path=str(tmp_path)))


def test_without_quantisation_one_line_says_so(folder):
    with pytest.raises(InputError, match=r"model.quantization = 'none': .* are FP8; allowed here: nf4"):
        inspect_model(ModelConfig(path=str(folder), quantization="none"))
