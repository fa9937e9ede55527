"""Have transformers quantise experts while it reads a model, one weight of one layer at a time.

transformers stacks a checkpoint's experts to weights of 3 dimensions and leaves those in 16 bits.
Its interface for quantisers takes another: this one is bitsandbytes' for linear layers, and packs
experts too. The host holds one weight of one layer, and the device its packed form after that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from engine.quant.bnb import load_library
from engine.quant.frozen_experts import UP, FrozenExperts, packable_experts

METHOD = "qlora_sweep_nf4"


def place_experts(model: nn.Module, double_quantization: bool, is_packed: bool = True) -> None:
    """Put FrozenExperts without values in the place of a model's experts, before its weights are read.

    is_packed: they are read as bytes, not in their own dtype.
    """
    for name, library in packable_experts(model).items():
        stored = torch.uint8 if is_packed else getattr(library, UP).dtype
        model.set_submodule(name, FrozenExperts(library, double_quantization, stored))


def expert_load_config(double_quantization: bool, compute_dtype: torch.dtype, keep: list[str] | None = None) -> Any:
    """Return the quantization_config for `from_pretrained` of a model with experts; arguments as in `nf4_load_config`."""
    return register()(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=keep,
    )


@functools.cache
def register() -> type:
    """Enter the quantiser in transformers' list under METHOD, also to read a saved model; return the class of its config."""
    load_library()
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    @register_quantization_config(METHOD)
    class ExpertsConfig(BitsAndBytesConfig):
        """Hold bitsandbytes' settings, without the keys by which transformers would take its own quantiser."""

        def __init__(self, **settings: Any) -> None:
            settings = {key: value for key, value in settings.items() if key not in ("quant_method", "load_in_8bit")}
            super().__init__(**settings | {"load_in_4bit": True})
            self.quant_method = METHOD

        def to_dict(self) -> dict[str, Any]:
            return {key: value for key, value in super().to_dict().items() if "load_in_" not in key} | {"quant_method": METHOD}

    @register_quantizer(METHOD)
    class ExpertsQuantizer(Bnb4BitHfQuantizer):
        """Quantise linear layers as bitsandbytes does, and experts with them."""

        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            place_experts(model, self.quantization_config.bnb_4bit_use_double_quant, self.pre_quantized)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return _expert_weight(model, param_name) is not None or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self) -> Any:
            return _operation()(self)

    return ExpertsConfig


@functools.cache
def _operation() -> type:
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    class QuantizeExperts(Bnb4bitQuantize):
        """Pack an expert weight, or quantise a linear one as its class does."""

        def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
            packed, others = {}, {}
            for name, value in input_dict.items():
                found = _expert_weight(model, name)
                if found is None:
                    others[name] = value
                    continue
                experts, weight = found
                packed[name] = experts.packed(weight, value[0] if isinstance(value, list) else value)
                experts._is_hf_initialized = True
            return packed | (super().convert(others, model=model, **kwargs) if others else {})

    return QuantizeExperts


def _expert_weight(model: Any, name: str) -> tuple[FrozenExperts, str] | None:
    """Return the experts and which of their weights a parameter's name means, or None."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return (module, last) if isinstance(module, FrozenExperts) and last in module.shapes else None
