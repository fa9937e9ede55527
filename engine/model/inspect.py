"""Read a model folder without its weights: config, tokenizer, linear and fusable layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from engine.adapter.token_rows import add_tokens
from engine.config.possible import TRAIN_TOKENS
from engine.config.trial import ModelConfig
from engine.dialogue.encoding import REVISION
from engine.errors import InputError
from engine.layers.library.library_kernels import FLASH_LINEAR_ATTENTION, lacks_kernels
from engine.layers.swap import SwapReport, require_fused, survey
from engine.model.comparison import num_tokens
from engine.model.guard import NO_LINEAR, plain_linears
from engine.model.library_layers import runs_unfused, with_library_bytes
from engine.model.pretrained import (
    check_task,
    from_pretrained,
    places_of,
    read_config,
    refuse_lost_biases,
    require_numbers,
    unpacked_weights,
    unused_tensors,
    without_weights,
)
from engine.model.route import ModelVerdict, Route, pattern_of
from engine.model.skeleton import POSITIONS
from engine.model.verdicts import expert_features, model_parts, verdict_of
from engine.quant.frozen_linear import is_known_linear
from engine.shape.model_shape import ModelShape
from engine.sources.locate import local_folder, locate, refuse_adapter
from engine.sources.nf4_folder import packed_shapes, unpacked
from engine.sources.quantized_folders import check_quantization, is_quantized, quantization_of, require_packed
from engine.sources.weight_files import (
    check_generation_config,
    check_rows,
    check_unused,
    check_weights,
    tensor_files,
    tensor_shapes,
    whole_numbers,
)
from engine.units import counted

INSTALL_LINEAR_ATTENTION = "pip install flash-linear-attention"


def model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model's config.json as transformers reads it, as plain data."""
    return read_config(config).to_dict()


def model_shape(config: ModelConfig) -> ModelShape:
    """Return the model's shape. Raises InputError if nothing is predicted for such a model."""
    return _as_installed(ModelShape.of(model_config(config), config.path), config)


def known_shape(config: ModelConfig) -> ModelShape | None:
    """Return the model's shape, or None if nothing is predicted for it. Raises InputError if there is no such model."""
    shape = ModelShape.known(model_config(config), config.path)
    return None if shape is None else _as_installed(shape, config)


def _as_installed(shape: ModelShape, config: ModelConfig) -> ModelShape:
    """Return the shape with kernels for linear attention, and what the library's layers keep, as installed here.

    Whether the kernels suit the card shows only when the model is loaded.
    """
    if importlib.util.find_spec(FLASH_LINEAR_ATTENTION) is not None:
        shape = shape.with_kernels()
    return with_library_bytes(shape, config, *model_parts(config)) if runs_unfused(shape, config) else shape


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer, with the tokens of `model.train_tokens`. Raises InputError if transformers cannot."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, config, locate(config))
    setattr(tokenizer, REVISION, config.revision)
    add_tokens(tokenizer, config.train_tokens)
    return tokenizer


def check_route(config: ModelConfig, route: Route, found: Any) -> None:
    """Raise InputError if a model with this transformers config cannot have trained tokens."""
    if not config.train_tokens:
        return
    tokens = list(config.train_tokens)
    if found.get_text_config() is not found:
        raise InputError(TRAIN_TOKENS, tokens, "must be empty for a model that reads more than text")
    if not route.head_loss:
        raise InputError(TRAIN_TOKENS, tokens, "must be empty for a model whose losses are made of its own logits")


@dataclass(frozen=True)
class ModelFacts:
    """Hold what is known about a model without its weights.

    features: layer name -> (out, in) of each layer that an adapter may target; of experts the sums
    over all. swaps: which layers run fused. num_rows: tokens with a row in the embedding and in the
    head. row_values: values of such a row, both tables together unless they are one. num_positions:
    the longest sample that the model was made for, if it says so. rotary: True if it can compute
    longer ones. notes: what the user should know, one line each.
    """

    features: dict[str, tuple[int, int]]
    swaps: SwapReport
    route: Route
    num_rows: int
    row_values: int = 0
    num_positions: int | None = None
    rotary: bool = True
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line on how the model is computed."""
        slower = self.route.describe()
        return f"{self.swaps.describe()}; {slower}" if slower else self.swaps.describe()


def inspect_model(config: ModelConfig) -> ModelFacts:
    """Build the model without weights and return its facts.

    Raises InputError if it is not a causal language model, if its weights cannot be read or trained
    rightly, or if `layers` is `strict` and some layer cannot run fused.
    """
    model, unused, unpacked_layers = checked_skeleton(config)
    linears = plain_linears(model)
    if not linears:
        raise InputError("model.path", config.path, NO_LINEAR)
    num_rows = num_tokens(model)
    verdict = verdict_of(config)
    check_route(config, verdict.route, model.config)
    require_packed(model.config.to_dict(), verdict.experts, config)
    features = {n: (m.out_features, m.in_features) for n, m in linears.items() if verdict.adapts(n)}
    features |= expert_features(model, verdict)
    if not features:
        raise InputError("model.path", config.path, "; ".join([NO_LINEAR, *_notes(model, linears, verdict)]))
    swaps = swaps_of(model, config, partial(survey, packs_experts=verdict.experts), verdict)
    text = model.config.get_text_config()
    positions = next((value for name in POSITIONS if (value := getattr(text, name, None))), None)
    rotary = bool(getattr(text, "rope_parameters", None))
    notes = tuple(_notes(model, linears, verdict))
    if unpacked_layers is not None and set(unpacked_layers) != _kept_by_config(model):
        notes += ("its config.json packs other layers than its weights do: here the weights decide, transformers alone may fail",)
    if kept := [name for name in unpacked_layers or () if name in features]:
        what = f"its weights hold {counted(len(kept), 'linear layer')} in 16 bits, which a forecast counts as NF4"
        notes += (f"{what}: {_some(kept)}",)
    if unused:
        are = "is" if len(unused) == 1 else "are"
        what = f"{counted(len(unused), 'tensor')} of the folder {are} not part of this model"
        notes += (f"{what}, as transformers loads it: {_some(unused)}",)
    row_values = model.get_input_embeddings().weight.shape[1] * (1 if getattr(text, "tie_word_embeddings", False) else 2)
    return ModelFacts(features, swaps, verdict.route, num_rows, row_values, positions, rotary, notes)


class Skeleton(NamedTuple):
    """A model without weights, and what the headers of its weights say.

    unused: tensors of its folder that it has no place for. unpacked: the plain linear layers whose
    weights a folder in NF4 does not hold packed; None of any other folder.
    """

    model: nn.Module
    unused: list[str]
    unpacked: list[str] | None = None


def checked_skeleton(config: ModelConfig) -> Skeleton:
    """Return the model without weights. Of the weights it reads headers only.

    A model of the hub is checked once it is downloaded. Raises InputError if weights cannot be read,
    are quantised in a way that is not read here, or are not those that config.json asks for.
    """
    found, folder = read_config(config), local_folder(config)
    check_quantization(found.to_dict(), config)
    check_task(found, config)
    if folder is not None:
        check_weights(folder, config.path)
        refuse_adapter(folder, config.path)
    model = without_weights(found, config)
    if folder is None:
        return Skeleton(model, [])
    check_generation_config(folder, config.path)
    content = found.to_dict()
    reader = unpacked_weights(folder, content, config)
    shapes, packed = reader.shapes if reader else tensor_shapes(folder, config.path), {}
    check_rows(shapes, model.get_input_embeddings().weight.shape[0], config.path)
    if reader is None and is_quantized(content):
        packed = packed_shapes(folder, shapes, config.path)
        shapes = unpacked(shapes, packed)
    unused = unused_tensors(model, shapes, config)
    check_unused(unused, config.path)
    whole = [name for name in whole_numbers(folder, config.path) if name in shapes and name not in packed]
    require_numbers(model, {name: shapes[name] for name in whole}, config)
    refuse_lost_biases(model, unused, tensor_files(folder), config)
    return Skeleton(model, unused, _unpacked_layers(model, packed, config) if packed else None)


def _unpacked_layers(model: nn.Module, packed: Mapping[str, tuple[int, ...]], config: ModelConfig) -> list[str] | None:
    """Return the plain linear layers that the folder does not hold packed; None if that is not known.

    The folder's config names them too, but in the names of the library that wrote it. Raises
    InputError if something else than a linear layer is packed.
    """
    places = places_of(model, packed)
    if places is None:
        return None
    layers = {name.removesuffix(".weight") for name in places}
    if odd := sorted(layers - plain_linears(model).keys()):
        which = f"holds NF4 weights of {odd[0]} ({counted(len(odd), 'such layer')}); allowed: of plain linear layers"
        raise InputError("model.path", config.path, f"{which}, without the output head: take the 16-bit model")
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in layers]


def _kept_by_config(model: nn.Module) -> set[str]:
    """Return the plain linear layers that transformers would not read packed, by the config of a folder in NF4."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    named = quantization_of(model.config.to_dict()).get("llm_int8_skip_modules")
    kept = HfQuantizer.get_modules_to_not_convert(model, named, getattr(model, "_keep_in_fp32_modules", None))
    return {n for n, module in model.named_modules() if type(module) is nn.Linear and not should_convert_module(n, kept)}


def unquantised_names(config: ModelConfig, verdict: ModelVerdict) -> list[str] | None:
    """Return the layers that transformers must leave unquantised, or None for its own choice."""
    if not verdict.read_directly:
        return None
    from transformers.quantizers.base import get_keys_to_not_convert

    model = without_weights(read_config(config), config)
    kept = [name for name in plain_linears(model) if pattern_of(name) in verdict.read_directly]
    return sorted({*kept, *get_keys_to_not_convert(model)})


def _notes(model: nn.Module, linears: dict[str, nn.Linear], verdict: ModelVerdict) -> Iterator[str]:
    """Yield what the user should know about the layers of this model, one line each."""
    dead = (*verdict.without_gradient, *verdict.read_directly)
    for kinds, why in (
        (dead, "text never reaches them, or the model's code reads their weight itself"),
        (verdict.not_exported, "PEFT would not put their tensors back in their place"),
    ):
        if left := [name for name in linears if name in kinds or pattern_of(name) in kinds]:
            get = "gets" if len(left) == 1 else "get"
            yield f"{counted(len(left), 'linear layer')} {get} no adapter, because {why}: {_some(left)}"
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_known_linear(m)]
    if others:
        stay = "stays as it is" if len(others) == 1 else "stay as they are"
        yield f"{counted(len(others), 'layer')} {stay}, in 16 bits and without adapters: {_some(others)}"
    plain = (module for module in model.modules() if not isinstance(module, nn.Conv1d))
    stacked = sum(p.numel() for module in plain for p in module.parameters(recurse=False) if p.dim() >= 3)
    if stacked and verdict.experts:
        share = stacked / sum(p.numel() for p in model.parameters())
        adapted = "lora.target_modules=[all-linear,experts] adapts them too, all-linear does not, as in PEFT"
        yield f"{share:.0%} of the weights are experts, in NF4: {adapted}"
        yield "the router stays in 16 bits and frozen, and its auxiliary loss is off, as in PEFT"
    elif stacked:
        share = stacked / sum(p.numel() for p in model.parameters())
        yield f"{share:.0%} of the weights are experts or others of 3 dimensions: they stay in 16 bits, without adapters"
    if needs := next((fault for fault in verdict.faults if "told where samples begin" in fault and "Install" in fault), None):
        yield f"samples could share rows on a card with more packages: {needs.rpartition(': ')[2]}"
    if lacks_kernels(model, FLASH_LINEAR_ATTENTION):
        yield f"its linear attention runs on torch operations, several times slower: {INSTALL_LINEAR_ATTENTION}"
    if not verdict.checked:
        yield f"it was not checked on a tiny model ({verdict.faults[0]}); each worker checks it on the real weights"


def _some(names: list[str]) -> str:
    """Return up to three kinds of these names."""
    kinds = list(dict.fromkeys(map(pattern_of, names)))
    return ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else "")


def swaps_of(
    model: nn.Module, config: ModelConfig, method: Callable[[nn.Module], SwapReport], verdict: ModelVerdict
) -> SwapReport:
    """Return the report of `method` (survey or fuse_layers) under the rule in `config.layers`.

    A model whose fused layers would compute something else keeps its own.

    Raises InputError under `strict` if some layer cannot run fused.
    """
    if config.layers == "original":
        return SwapReport((), {"all": "model.layers = original"})
    if not verdict.route.fused and survey(model, verdict.experts).fused:
        return SwapReport((), {"all": verdict.faults[0]})
    report = method(model)
    if config.layers == "strict":
        require_fused(report, config.path)
    return report
