"""Choose the class that a checkpoint names, fit its tensors in, and turn each error of from_pretrained into one line."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from engine.config.trial import ModelConfig
from engine.errors import InputError, first_line
from engine.quant.unpacked_weights import UnpackedWeights
from engine.sources.locate import locate
from engine.sources.packed_weights import MXFP4, packing_of, stored_weights
from engine.sources.quantized_folders import ALLOWED, KEYS
from engine.sources.weight_files import tensor_headers
from engine.units import counted

OTHER_TASK = re.compile(r"For(Sequence|Token)Classification$|ForQuestionAnswering$|ForMultipleChoice$|Reward(Model)?$")


def from_pretrained(factory: Any, given: ModelConfig, source: str | None, **options: Any) -> Any:
    """Return what `factory` loads from a folder or hub id, None with a `state_dict`. Raises InputError for any fault in it."""
    try:
        return factory.from_pretrained(
            source, revision=given.revision or "main", trust_remote_code=given.trust_remote_code, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files with wrong types or sizes can raise any error in the library
        if "DefaultCPUAllocator" in str(error):  # torch's only sign that CPU memory ran out
            raise
        allowed = "must be a folder or hub id that transformers can load; its error: "
        raise InputError("model.path", given.path, allowed + first_line(error)) from error


def read_config(config: ModelConfig) -> Any:
    """Return the model's config.json as transformers reads it. Raises InputError."""
    from transformers import AutoConfig

    found = from_pretrained(AutoConfig, config, locate(config))
    _forget_attention(found)
    return found


def _forget_attention(config: Any) -> None:
    """Remove the attention that some folders name, which may need a package. Here the model's verdict names it."""
    config._attn_implementation_internal = None
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            _forget_attention(part)


def model_factory(found: Any) -> Any:
    """Return transformers' auto class for a config.

    It is AutoModelForCausalLM, or for a model that reads more than text the one that gives the class
    of `architectures`. The names of layers follow from that class, in PEFT and in vLLM too.
    """
    import transformers

    causal = transformers.AutoModelForCausalLM
    names = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText")  # the first is newer and knows more
    several = next(filter(None, (getattr(transformers, name, None) for name in names)), causal)
    if type(found) not in several._model_mapping or "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {}):
        return causal
    if type(found) not in causal._model_mapping:
        return several
    own = several._model_mapping[type(found)].__name__
    return several if own in (getattr(found, "architectures", None) or []) else causal


def without_weights(found: Any, config: ModelConfig) -> nn.Module:
    """Return the model of a config on the meta device. Raises InputError if it is no causal language model."""
    with torch.device("meta"):
        try:
            return model_factory(found).from_config(found, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # wrong types in config.json can raise any error in model code
            raise InputError("model.path", config.path, f"must be a causal language model ({first_line(error)})") from None


def unused_tensors(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> list[str]:
    """Return the tensors of a folder that the model has no place for, after transformers' own renaming.

    model: one without weights. shapes: of each tensor in the folder. InputError if one is missing or
    has another shape. Nothing is known of a class that cannot be filled in this way; then the
    worker's load refuses it.
    """
    report = _filled(model, shapes)
    if report is None:
        return []
    require_tensors(report, config)
    if differing := sorted(report["mismatched_keys"]):
        name, stored, wanted = differing[0]
        text = f"{name} is {list(stored)} in its weights and {list(wanted)} by config.json ({len(differing)} such tensors)"
        raise InputError("model.path", config.path, f"{text}: take config.json and weights of one model")
    return sorted(report["unexpected_keys"])


def places_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> set[str] | None:
    """Return the parameters that these tensors fill; None if nothing is known. Arguments as in `unused_tensors`."""
    report = _filled(model, shapes)
    return None if report is None else {n for n, _ in model.named_parameters()} - set(report["missing_keys"])


def require_numbers(model: nn.Module, whole: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raise InputError if tensors of whole numbers are weights of the model: their scales are not there.

    whole: their shapes by name. Some families keep whole numbers that are no weights, such as masks.
    """
    if whole and (places := places_of(model, whole)):
        allowed = f"allowed: {ALLOWED}: take the 16-bit model"
        which = f"{min(places)} holds whole numbers without scales ({counted(len(places), 'such weight')})"
        raise InputError("model.path", config.path, f"{which}; {allowed}")


def refuse_lost_biases(model: nn.Module, unused: Iterable[str], files: Mapping[str, Path], config: ModelConfig) -> None:
    """Raise InputError if the folder has a bias for a layer that config.json says has none. Zeros change nothing.

    unused: what `unused_tensors` returned. files: of the folder's tensors.
    """
    modules = dict(model.named_modules())
    for name in unused:
        layer = modules.get(name.removesuffix(".bias")) if name.endswith(".bias") and name in files else None
        if layer is None or "weight" not in layer._parameters:
            continue
        with safe_open(files[name], framework="pt") as opened:
            if opened.get_tensor(name).any():
                wrong = f"has values in {name}, and config.json gives that layer no bias"
                raise InputError("model.path", config.path, f"{wrong}: take config.json and weights of one model")


def check_task(found: Any, config: ModelConfig) -> None:
    """Raise InputError if `architectures` names a class that scores or sorts texts: its weights were trained for that."""
    names = [name for name in getattr(found, "architectures", None) or [] if isinstance(name, str)]
    if names and all(map(OTHER_TASK.search, names)):
        allowed = f"is a {names[0]}, which writes no text: take the model that it was made from"
        raise InputError("model.path", config.path, allowed)


def _filled(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any] | None:
    """Return transformers' report on fitting tensors without values into a second such model, or None."""
    found = copy.deepcopy(model.config)
    forget_quantization(found)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options = {"device_map": {"": "meta"}, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        logging.disable(logging.WARNING)  # its table of all differences
        return type(model).from_pretrained(None, config=found, state_dict=state, output_loading_info=True, **options)[1]
    except Exception:  # code of a model's own, or a conversion that needs values
        return None
    finally:
        logging.disable(logging.NOTSET)


def forget_quantization(config: Any) -> None:
    """Remove what a config says about quantised weights, in its text part too."""
    for part in (config, getattr(config, "text_config", None)):
        for key in KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)


def unpacked_weights(folder: Path, content: Mapping[str, Any], given: ModelConfig) -> UnpackedWeights | None:
    """Return the reader of an FP8 or MXFP4 folder with this config.json, or None for others.

    Raises InputError for scales that do not fit their weights.
    """
    if (packing := packing_of(content)) is None:
        return None
    stored = stored_weights(tensor_headers(folder, given.path), packing, given.path)
    return UnpackedWeights(stored, packing.block, packing.kind == MXFP4)


def require_tensors(report: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise InputError if transformers would fill missing tensors with random numbers.

    report: its loading report. Nothing may save or train such a model.
    """
    if missing := report["missing_keys"]:
        raise InputError("model.path", config.path, f"lacks {len(missing)} tensors, such as {min(map(str, missing))}")


def text_attention(config: Any, name: str) -> str | dict[str, str]:
    """Return what to ask transformers for, so that the text decoder gets this attention and towers keep theirs.

    config: that of the model which is made, or that a model has.
    """
    try:
        text = config.get_text_config()
    except ValueError:  # several could be meant
        return name
    keys = [key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text]
    return {keys[0]: name} if keys else name


def release_towers(model: nn.Module) -> None:
    """Free the weights of whatever stands beside the text decoder, in a model that reads more than text.

    The modules stay, because PEFT tells layers apart by the names of all. To call one is an error.
    """
    if isinstance(text_attention(model.config, ""), str):
        return
    kept = {id(part) for part in (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())}

    def release(module: nn.Module) -> None:
        if id(module) in kept:
            return
        if any(id(part) in kept for part in module.modules()):
            for child in module.children():
                release(child)
            return
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                part.register_parameter(name, nn.Parameter(torch.empty_like(value.data, device="meta"), requires_grad=False))

    release(model)
