"""Model shapes are read from config.json."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InputError
from engine.shape.families import WITHOUT_GATE
from engine.shape.model_shape import ModelShape
from tests.support.published_models import GEMMA2_9B, GEMMA3_4B, LLAMA_1B, LLAMA_8B, MISTRAL_7B, QWEN2_7B, QWEN3_8B

STARCODER2_3B = {"model_type": "starcoder2", "num_hidden_layers": 30, "hidden_size": 3072, "intermediate_size": 12288,
                 "num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True,
                 "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "num_parameters", "expected"),
    [
        (LLAMA_8B, 8_030_261_248, {"family": "llama", "head_dim": 128, "qkv_bias": False, "sliding_window": None}),
        (LLAMA_1B, 1_235_814_400, {"head_dim": 64, "tied_embeddings": True}),
        (QWEN2_7B, 7_615_616_512, {"family": "qwen2", "qkv_bias": True, "sliding_window": None}),
        (QWEN3_8B, 8_190_735_360, {"family": "qwen3", "qkv_bias": False}),
        (GEMMA2_9B, 9_241_705_984, {"family": "gemma2", "tied_embeddings": True, "attention_softcap": True}),
        (GEMMA3_4B, 3_880_263_168, {"family": "gemma3", "num_heads": 8, "num_kv_heads": 4, "head_dim": 256,
                                    "attention_softcap": False, "sliding_window": 1024}),
        (MISTRAL_7B, 7_241_732_096, {"family": "mistral", "sliding_window": 4096}),
    ],
    ids=["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b", "qwen3-8b", "gemma-2-9b", "gemma-3-4b", "mistral-7b"],
)  # fmt: skip
def test_shapes_of_published_models(config: dict[str, Any], num_parameters: int, expected: dict[str, Any]) -> None:
    shape = ModelShape.of(config, "config.json")
    assert shape.num_parameters == num_parameters
    assert {name: getattr(shape, name) for name in expected} == expected
    assert shape.projections()["k_proj"] == (shape.num_kv_heads * shape.head_dim, shape.hidden_size)


def test_any_other_model_is_read_by_the_usual_names() -> None:
    shape = ModelShape.of({**LLAMA_8B, "model_type": "olmo"}, "x")
    assert (shape.family, shape.num_layers, shape.head_dim) == ("other", 32, 128)
    assert ModelShape.of({**LLAMA_8B, "hidden_act": "gelu"}, "x").family == "other"


def test_an_mlp_without_a_gate_has_one_matrix_less() -> None:
    shape = ModelShape.of(STARCODER2_3B, "x")
    assert (shape.family, shape.num_parameters) == ("other", pytest.approx(3.030e9, rel=1e-3))
    assert ModelShape.of({**STARCODER2_3B, "model_type": "olmo"}, "x").num_parameters > 1.36 * shape.num_parameters
    assert ModelShape.of({**LLAMA_8B, "hidden_act": "relu2"}, "x").has_gate  # unfused too, but with a gate


@pytest.mark.parametrize("kind", sorted(WITHOUT_GATE))
def test_the_types_without_a_gate_are_the_library_s(kind: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if kind not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know it")
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 4}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = AutoConfig.for_model(kind, **sizes, **ids, num_hidden_layers=1, vocab_size=99)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert (shapes.count((112, 64)), shapes.count((64, 112))) == (1, 1)


def test_null_is_no_window_and_no_softcap() -> None:
    assert ModelShape.of({**MISTRAL_7B, "sliding_window": None}, "x").sliding_window is None
    assert not ModelShape.of({**GEMMA2_9B, "attn_logit_softcapping": None}, "x").attention_softcap


@pytest.mark.parametrize("value", [None, 0, "32", True])
def test_a_config_without_a_number_is_an_input_error(value: Any) -> None:
    config = {**LLAMA_8B, "num_hidden_layers": value}
    with pytest.raises(InputError, match=r"^my/config\.json: num_hidden_layers = .*: must be a positive whole number") as error:
        ModelShape.of(config, "my/config.json")
    assert "\n" not in str(error.value)


GEMMA4 = {"model_type": "gemma4_text", "num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96,
          "num_attention_heads": 4, "num_key_value_heads": 2,
          "layer_types": ["sliding_attention", "full_attention"] * 3}  # fmt: skip


def test_layers_that_differ_have_shapes_of_their_own():
    shape = ModelShape.of({**GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}, "x")
    assert [one.head_dim for one in shape.each] == [256, 512] * 3
    assert [one.keys for one in shape.each] == ["own"] * 3 + ["shared"] * 3
    assert [one.source for one in shape.each] == [None, 1, 2, 1, 2, 1]
    assert [one.reads_first for one in shape.each] == [False] * 3 + [True, True, False]
    assert [one.intermediate_size for one in shape.each] == [96] * 3 + [192] * 3
    assert "v_proj" not in shape.each[4].projections() and shape.outside == {"per_layer_model_projection": (6 * 256, 64)}


def test_values_that_are_keys_need_no_projection():
    own = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
    shape = ModelShape.of({**GEMMA4, **own}, "x")
    assert [one.keys for one in shape.each] == ["own", "values"] * 3 and shape.outside == {}
    assert shape.each[1].projections()["k_proj"] == (512, 64) and "v_proj" not in shape.each[1].projections()


def test_a_gemma_4_with_experts_is_not_predicted():
    assert ModelShape.known({**GEMMA4, "enable_moe_block": True, "num_experts": 8}, "x") is None
