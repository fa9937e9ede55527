"""Refuse model folders whose weights are quantised in a way that is not trained here. No torch.

bitsandbytes' NF4 is read as it is. FP8 and gpt-oss's MXFP4 are unpacked and quantised again while they
are read (packed_weights.py). All other methods keep scales that an adapter trained here would not
see, so the way out is the 16-bit folder that they were made from.
"""

from __future__ import annotations

from typing import Any

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.sources.packed_weights import MXFP4, packing_of

KEYS = ("quantization_config", "compression_config")
ALLOWED = "16 or 32 bits, bitsandbytes NF4, or FP8"


def check_quantization(content: dict[str, Any], config: ModelConfig) -> None:
    """Raise InputError if config.json names another quantisation than bitsandbytes' NF4, FP8 or gpt-oss's MXFP4."""
    packing, given = packing_of(content), _settings(content)
    for settings in given:
        if settings == {}:  # transformers takes it for a quantisation without a method
            raise InputError("model.path", config.path, "has an empty quantization_config in its config.json: remove it")
        if not isinstance(settings, dict) or not (_is_nf4(settings) or (packing and len(given) == 1)):
            allowed = f"holds {_describe(settings)} weights; allowed: {ALLOWED}: take the 16-bit model"
            raise InputError("model.path", config.path, allowed)
        if config.quantization != "nf4":
            kind = packing.kind.upper() if packing else "NF4"
            allowed = f"the weights of {config.path} are {kind}; allowed here: nf4"
            raise InputError("model.quantization", config.quantization, allowed)


def require_packed(content: dict[str, Any], packs_experts: bool, config: ModelConfig) -> None:
    """Raise InputError for a quantised folder with experts that would not be in NF4, or are so already.

    content: config.json. packs_experts: experts of 16 bits are packed while they are read.
    """
    packing = packing_of(content)
    if packing and packing.kind == MXFP4 and not packs_experts:
        allowed = "holds MXFP4 weights of experts that cannot be packed here: take the 16-bit model"
        raise InputError("model.path", config.path, allowed)
    if is_quantized(content) and packing is None and packs_experts:
        allowed = "holds NF4 weights beside its experts, which are packed only from 16 bits: take the 16-bit model"
        raise InputError("model.path", config.path, allowed)


def quantization_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json says about its quantised weights; {} if they are not."""
    return next(iter(_settings(content)), {})


def is_quantized(content: dict[str, Any]) -> bool:
    """Return True if config.json names a quantisation."""
    return bool(_settings(content))


def _settings(content: dict[str, Any]) -> list[Any]:
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]  # of a model with several parts, each
    return [part[key] for part in parts for key in KEYS if part.get(key) is not None]


def _is_nf4(settings: dict[str, Any]) -> bool:
    return (
        settings.get("quant_method", "bitsandbytes") == "bitsandbytes"
        and bool(settings.get("load_in_4bit"))
        and not settings.get("load_in_8bit")
        and settings.get("bnb_4bit_quant_type") == "nf4"
        and settings.get("bnb_4bit_quant_storage", "uint8") in ("uint8", None)
    )


def _describe(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "quantised"
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "bitsandbytes")
    if method != "bitsandbytes":
        return f"{method} quantised"
    if settings.get("load_in_4bit") and not settings.get("load_in_8bit"):
        storage = settings.get("bnb_4bit_quant_storage", "uint8")
        return f"bitsandbytes {settings.get('bnb_4bit_quant_type', 'fp4')} (stored as {storage})"
    return "bitsandbytes 8-bit"
