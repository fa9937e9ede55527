"""Model shapes are read from config.json."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InputError
from engine.planning.model_shape import ModelShape
from tests.support.published_models import GEMMA2_9B, GEMMA3_4B, LLAMA_1B, LLAMA_8B, MISTRAL_7B, QWEN2_7B, QWEN3_8B


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


def test_null_is_no_window_and_no_softcap() -> None:
    assert ModelShape.of({**MISTRAL_7B, "sliding_window": None}, "x").sliding_window is None
    assert not ModelShape.of({**GEMMA2_9B, "attn_logit_softcapping": None}, "x").attention_softcap


@pytest.mark.parametrize("value", [None, 0, "32", True])
def test_a_config_without_a_number_is_an_input_error(value: Any) -> None:
    config = {**LLAMA_8B, "num_hidden_layers": value}
    with pytest.raises(InputError, match=r"^my/config\.json: num_hidden_layers = .*: must be a positive whole number") as error:
        ModelShape.of(config, "my/config.json")
    assert "\n" not in str(error.value)
