"""The guard takes the fastest route for Gemma 4, whose tiny models it makes from their own configs."""

import pytest
import transformers

from engine.config.trial import ModelConfig
from engine.layers.swap import survey
from engine.model.guard import choose_route
from engine.model.route import FASTEST

PATTERN = ["sliding_attention", "full_attention"]
WIDTHS = {"num_attention_heads": 8, "head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0,
          "sliding_window": 512}  # fmt: skip
E4B = {**WIDTHS, "hidden_size": 2560, "intermediate_size": 10240, "num_key_value_heads": 2, "num_hidden_layers": 4,
       "layer_types": 2 * PATTERN, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}  # fmt: skip
DENSE_31B = {**WIDTHS, "hidden_size": 5376, "intermediate_size": 21504, "num_key_value_heads": 16, "num_attention_heads": 32,
             "num_hidden_layers": 12, "attention_k_eq_v": True, "num_global_key_value_heads": 4,
             "hidden_size_per_layer_input": 0}  # fmt: skip
EXPERTS = {**DENSE_31B, "num_hidden_layers": 2, "layer_types": PATTERN, "enable_moe_block": True, "num_experts": 4,
           "top_k_experts": 2, "moe_intermediate_size": 32}  # fmt: skip


def make(config, attention_name):
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention_name)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("values", [E4B, DENSE_31B])
def test_the_route_is_fused_and_samples_share_rows(values, quantization):
    verdict = choose_route(transformers.Gemma4TextConfig(**values), ModelConfig(path="x", quantization=quantization), make)
    assert verdict.checked and verdict.route == FASTEST and verdict.faults == ()
    assert verdict.without_gradient == verdict.read_directly == ()


def test_the_model_with_experts_keeps_its_own_layers():
    verdict = choose_route(transformers.Gemma4TextConfig(**EXPERTS), ModelConfig(path="x", quantization="none"), make)
    assert verdict.checked and not verdict.route.fused


def test_the_text_decoder_of_the_multimodal_model_runs_fused():
    text = {**E4B, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "vocab_size_per_layer_input": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    model = make(config, "eager")
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    assert survey(model).describe() == "4 of 4 decoder layers run fused"
