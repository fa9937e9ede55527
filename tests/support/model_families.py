"""Judge the families of transformers as the guard does, on tiny models."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from engine.adapter.lora import attach
from engine.adapter.peft_files import export_adapter
from engine.config.trial import DataConfig, LoopConfig, ModelConfig, TrainConfig
from engine.errors import InputError
from engine.model import skeleton
from engine.model.comparison import difference, library_losses, our_losses, random_samples
from engine.model.guard import LORA, LORA_ON_EXPERTS, choose_route
from engine.model.inspect import inspect_model
from engine.model.load import load_base
from engine.model.pretrained import model_factory, without_weights
from engine.model.route import ModelVerdict
from engine.model.verdicts import with_export
from engine.quant.frozen_experts import frozen_experts
from engine.quant.frozen_linear import FrozenLinear
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU

LFM2_LAYERS = (["conv", "conv", "full_attention"] * 11)[:32]
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"lm_head_multiplier": 0.04, "embedding_multiplier": 5.0},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "granitemoehybrid": {"logits_scaling": 8.0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hyperclovax": {"logits_scaling": 4.0},
    "lfm2": {"layer_types": LFM2_LAYERS},
    "lfm2_moe": {"layer_types": LFM2_LAYERS},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}
"""Values that released checkpoints have and the defaults of the config class lack."""

MIXTURE_OF_GEMMA4 = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
"""What the config of a Gemma 4 with experts has; the defaults of its class have none."""


def released_mixture(name: str) -> Any:
    """Return the config of the text model of a released mixture: the defaults of its class, or the published numbers."""
    from transformers import CONFIG_MAPPING

    if name == "qwen3.5-35b-a3b":
        return CONFIG_MAPPING["qwen3_5_moe_text"]()
    return CONFIG_MAPPING["gemma4_text"](
        **MIXTURE_OF_GEMMA4 | {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}, hidden_size=2816,
        intermediate_size=2112, num_hidden_layers=30, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        global_head_dim=512, num_global_key_value_heads=2, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        sliding_window=1024, final_logit_softcapping=30.0,
    )  # fmt: skip


def families() -> list[str]:
    """Return the model types that transformers can load to write text, those that read more than text included."""
    from transformers.models.auto import modeling_auto as auto

    return sorted({*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def config_of(model_type: str, **given: Any) -> Any:
    """Return a config with the defaults of its class, the numbers and the class that checkpoints name, and what is given."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    config = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}), **given)
    if name := auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(model_type):
        config.architectures = [name]
    return config


def judge(
    model_type: str, numbers: dict[str, Any] | None = None, device: torch.device = CPU, **given: Any
) -> ModelVerdict | InputError:
    """Return the guard's verdict, or the line that refuses the family. numbers: of the config; given: of `model`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(model_type, **(numbers or {}))
        factory = model_factory(config)
        try:
            return choose_route(
                config,
                ModelConfig(path=model_type, **given),
                lambda small, name: factory.from_config(small, attn_implementation=name),
                device,
            )
        except InputError as error:
            return error


def judge_export(model_type: str, verdict: ModelVerdict) -> ModelVerdict:
    """Return the verdict with the layers that PEFT would not load again, on a model of few and small layers."""
    config = skeleton.shrink(config_of(model_type))
    return with_export(verdict, lambda: without_weights(copy.deepcopy(config), ModelConfig(path=model_type)))


def peft_difference(model_type: str, folder: Path, **numbers: Any) -> float | None:
    """Return by how many nats PEFT's losses differ from ours, with an adapter that a trial would export.

    None if the small model cannot be saved, because its class wants widths that are not so small.

    A small model is saved to the folder, prepared and loaded in NF4 as for a trial. PEFT reads the
    adapter on the library's own model with the same weights. Raises InputError where `prepare`
    refuses the folder, and AssertionError where a worker would.
    """
    from peft import PeftModel

    config, samples = config_of(model_type, **numbers), random_samples(skeleton.VOCABULARY)
    factory = model_factory(config)
    library = skeleton.build(
        config,
        lambda small: factory.from_config(small, attn_implementation="eager"),
        lambda made: library_losses(made, samples[0]),
    )
    try:
        library.save_pretrained(folder / "model")
    except StrictDataclassClassValidationError:
        return None
    byte_tokenizer().save_pretrained(folder / "model")
    given = ModelConfig(path=str(folder / "model"), dtype="float32")
    try:
        names = list(inspect_model(given).features)
    except InputError as error:
        if "Class validation error" in error.allowed:
            return None
        raise
    try:
        base, later = load_base(given, CPU), load_base(given, CPU)  # the second from the shared cache
    except InputError as error:
        raise AssertionError(f"a worker refuses it: {error.allowed}") from error
    if (gap := difference(*(our_losses(each, samples[:1]) for each in (base, later)))) > 1e-4:
        raise AssertionError(f"the shared copy of its base has losses that differ by {gap:.2g} nats")
    frozen = {n: m for n, m in base.model.named_modules() if isinstance(m, FrozenLinear) and not m.weight.is_meta}
    weights = {name: module.dequantized(torch.float32) for name, module in frozen.items()}
    experts = {n: m for n, m in frozen_experts(base.model)}
    lora = LORA_ON_EXPERTS if experts else LORA
    layers = attach(base.model, names, lora, seed=0)
    torch.manual_seed(1)
    for layer in layers.values():
        layer.lora_b.data.normal_(std=0.2)
    trained = TrainConfig(model=given, data=DataConfig(train="none"), lora=lora, train=LoopConfig(max_tokens=100))
    export_adapter(folder / "adapter", trained, layers, base.model, base.tokenizer)
    rows = [samples] if base.shares_rows(len(samples[0].input_ids)) else [[sample] for sample in samples]
    ours = [losses for row in rows for losses in our_losses(base, row)]
    plain = factory.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight
    for name, module in experts.items():
        for weight, (number, *_) in module.shapes.items():
            rows = [module.dequantized(weight, i, torch.float32) for i in range(number)]
            plain.get_parameter(f"{name}.{weight}").data = torch.stack(rows)
    read = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    with torch.no_grad():
        return difference(ours, [library_losses(read, sample) for sample in samples])


def kind(verdict: ModelVerdict | InputError) -> str:
    """Return how a family is trained, in a few words."""
    if isinstance(verdict, InputError):
        return "refused"
    if not verdict.checked:
        return "checked on the real weights only"
    layers = "fused layers" if verdict.route.fused else "its own layers"
    return "; ".join(filter(None, [layers, verdict.route.describe()]))
