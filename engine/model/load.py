"""Load and quantise the base model.

transformers loads the model. `FrozenLinear` then replaces the linear layers, and attention runs
through the `packed` entry of transformers' registry. No forward method is patched: the decoder
returns hidden states, from which the loss is computed with the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from engine.adapter.token_rows import install
from engine.config.parsing import load_json
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.layers import attention
from engine.layers.library.library_kernels import replace_failing_kernels, use_torch_functions
from engine.layers.swap import fuse_layers
from engine.model.base import Base
from engine.model.comparison import EXACT_LENGTHS, LENGTHS, num_tokens, text_samples
from engine.model.device import let_segments_grow as let_segments_grow
from engine.model.device import pick_dtype
from engine.model.guard import NO_LINEAR
from engine.model.inspect import check_route, checked_skeleton, load_tokenizer, swaps_of, unquantised_names
from engine.model.loaded_check import CHECKS, KnownChecks, check_loaded, loaded_losses, require_finite_rows
from engine.model.pretrained import (
    forget_quantization,
    from_pretrained,
    model_factory,
    read_config,
    release_towers,
    require_tensors,
    text_attention,
    unpacked_weights,
)
from engine.model.route import MADE_WITH, ModelVerdict, Route, pattern_of
from engine.model.verdicts import verdict_of, with_rows_of
from engine.quant.bnb import load_library, nf4_load_config
from engine.quant.expert_quantizer import expert_load_config, register
from engine.quant.frozen_experts import freeze_experts
from engine.quant.frozen_linear import freeze_linears
from engine.quant.shared_base import load_packed
from engine.quant.unpacked_weights import VERSION as UNPACKED_VERSION
from engine.sources.locate import download_weights, local_folder, locate
from engine.sources.packed_weights import packing_of
from engine.sources.quantized_folders import is_quantized, quantization_of, require_packed
from engine.sources.weight_files import GENERATION
from engine.vocabulary.host_embedding import place_embeddings


def load_base(config: ModelConfig, device: torch.device, attention_name: str | None = None) -> Base:
    """Load, quantise and freeze the base model on `device`.

    attention_name: an entry of transformers' registry. Generation needs one that knows
    transformers' key-value cache. If it is None, the model is loaded for training: with the
    attention of its verdict, and its losses are compared with the library's own. Raises InputError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # in a log file it writes hundreds of lines per trial
    attention.register()
    load_library()  # before transformers does
    source, dtype = locate(config), pick_dtype(config.dtype, device)
    found = read_config(config)
    content = found.to_dict()
    download_weights(config)
    skeleton = checked_skeleton(config)
    verdict, tokenizer = verdict_of(config), load_tokenizer(config)
    require_packed(content, verdict.experts, config)
    if skeleton.unpacked is not None:
        forget_quantization(found)
        found.quantization_config = {**quantization_of(content), "llm_int8_skip_modules": skeleton.unpacked}
    if attention_name is None and device.type == "cuda":
        verdict = with_rows_of(config, verdict, device)
    if attention_name is not None and not verdict.route.packed_attention:
        attention_name = verdict.route.attention  # the only one that is known to be right for this model
    options: dict[str, Any] = {"device_map": {"": device.type}, "dtype": dtype}
    wanted, factory = attention_name or verdict.route.attention, model_factory(found)
    options |= {"attn_implementation": MADE_WITH if factory is AutoModelForCausalLM else text_attention(found, MADE_WITH)}
    options |= {"use_safetensors": True, "output_loading_info": True}

    original = _unpacked(config, found, type(skeleton.model), dtype, device) or (factory, source, {"config": found})
    read: list[str] = []

    def load(folder: str | Path, **more: Any) -> tuple[Any, dict[str, Any]]:
        read.append(str(folder))
        made_by, place, own = original if str(folder) == source else (factory, str(folder), {})  # a copy has its own config
        model, loading = from_pretrained(made_by, config, place, **options, **own, **more)
        require_tensors(loading, config)
        if getattr(model, "_hf_peft_config_loaded", False):  # the hub has one beside the weights
            raise InputError("model.path", config.path, "holds an adapter, which transformers adds: take a copy without it")
        return model, loading

    is_packed = config.quantization == "nf4"
    model, _ = _load_nf4(config, source, device, dtype, load, verdict) if is_packed else load(source)
    model.set_attn_implementation(text_attention(model.config, wanted))
    model.requires_grad_(False).eval()
    if device.type == "cpu":
        use_torch_functions(model)
    is_copy = read[-1] != source  # of the packed weights: they are checked too
    checks = None if attention_name else _checks(config, source, dtype, device, asdict(verdict), is_copy)
    known = checks.known() if checks else None
    theirs = None
    if checks and known is None:
        require_finite_rows(model, config.path)
        samples = text_samples(tokenizer, num_tokens(model), EXACT_LENGTHS if dtype == torch.float32 else LENGTHS)
        theirs = loaded_losses(model, samples, config.path, verdict.measures)
    kept = [module for name, module in model.named_modules() if pattern_of(name) in verdict.read_directly]
    frozen = freeze_linears(model, skip=[model.get_output_embeddings(), *kept]) + freeze_experts(model)
    names = [n for n in frozen if verdict.adapts(n)]
    if not names:
        raise InputError("model.path", config.path, NO_LINEAR)
    if attention_name is None and verdict.route.head_loss:  # else the whole model is called
        release_towers(model)
    swaps = swaps_of(model, config, fuse_layers, verdict)
    swaps = replace(swaps, others=(*swaps.others, *place_embeddings(model, config)))
    if device.type == "cuda":
        replace_failing_kernels(model, dtype, device)
    base = Base(model, tokenizer, config, device, dtype, names, swaps, Route(**known) if known else verdict.route)
    if checks and theirs:
        base = check_loaded(base, theirs)
        checks.passed(base)
    base.lasting[CHECKS] = checks
    if config.train_tokens:
        check_route(config, base.route, model.config)
        install(model, tokenizer, config.train_tokens, device)
    return base


def _checks(
    config: ModelConfig, source: str, dtype: torch.dtype, device: torch.device, made: dict[str, Any], is_copy: bool
) -> KnownChecks:
    folder = None if config.trust_remote_code else local_folder(config)
    settings = config.model_dump(exclude={"path", "revision"}) | {"dtype": str(dtype), "verdict": made}
    return KnownChecks(folder, settings, device, is_copy)


def _load_nf4(
    config: ModelConfig,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    load: Callable[..., tuple[Any, dict[str, Any]]],
    verdict: ModelVerdict,
) -> tuple[Any, dict[str, Any]]:
    """Load the model in NF4, from this node's shared cache if another process has quantised it."""

    def quantise() -> tuple[Any, dict[str, Any]]:
        keep = unquantised_names(config, verdict)
        if verdict.experts:
            made = expert_load_config(config.double_quantization, dtype, keep)
        else:
            made = nf4_load_config(config.double_quantization, dtype, keep)
        return load(source, quantization_config=made)

    folder = local_folder(config)
    content = {} if folder is None else load_json(folder / "config.json")
    packing = packing_of(content)
    if folder is None or config.trust_remote_code or (is_quantized(content) and packing is None):
        # The cache cannot hold custom model code, and an already quantised model gains nothing.
        return quantise()
    settings: dict[str, Any] = {"double": config.double_quantization, "dtype": str(dtype), "device": device.type}
    if packing is not None:
        settings["unpacked"] = [UNPACKED_VERSION, packing.kind]
    if verdict.read_directly:
        settings["kept"] = verdict.read_directly
    if verdict.experts:
        settings["experts"] = register().__name__  # entered before a saved model is read
    return load_packed(folder, settings, quantise, load)


def _unpacked(
    config: ModelConfig, found: Any, made_by: type, dtype: torch.dtype, device: torch.device
) -> tuple[Any, None, dict[str, Any]] | None:
    """Return class and options by which transformers reads the unpacked weights of an FP8 or MXFP4 folder, or None.

    found: the model's config; it loses its quantization_config, for which transformers would take its own quantiser.
    """
    if packing_of(found.to_dict()) is None:
        return None
    from transformers import GenerationConfig

    if (folder := local_folder(config)) is None:
        raise InputError("model.path", config.path, "the hub did not deliver its weights: try again, or name a folder")
    weights = unpacked_weights(folder, found.to_dict(), config)
    forget_quantization(found)
    options = {"config": found, "state_dict": weights.lazily(dtype, device)}
    if (folder / GENERATION).is_file():
        options["generation_config"] = from_pretrained(GenerationConfig, config, str(folder))
    return made_by, None, options
