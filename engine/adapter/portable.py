"""Read a PEFT adapter folder as plain LoRA with one rank, which every loader applies the same way.

Plain LoRA adds lora_alpha / r * B A to each layer. vLLM ignores rank_pattern and alpha_pattern, and
llama.cpp knows only alpha / r. `read_adapter` therefore folds any other scaling of a layer into its
B, and pads smaller ranks with zeros. A plain adapter stays bit for bit the same.

Adapters that change more than linear layers (biases, saved modules) are refused, because those
loaders would ignore these parts silently. Rows of trained tokens are read for what can hold them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.adapter.expert_lora import INNER, stored_path
from engine.adapter.lora import MAGNITUDE
from engine.adapter.peft_files import CONFIG, PREFIX, WEIGHTS
from engine.adapter.token_rows import SUFFIX
from engine.config.lora_section import ALL_LINEAR, LoraConfig
from engine.config.parsing import load_json
from engine.config.targets import EXPERT_WEIGHTS, EXPERTS, is_expert, pattern_value
from engine.errors import InputError, first_line

TOKENS, EMBEDDING = "trainable_token_indices", "embed_tokens"
REFUSED = ("modules_to_save", "lora_bias", "fan_in_fan_out")


@dataclass(frozen=True)
class Adapter:
    """Hold a plain LoRA adapter, which adds lora_alpha / rank * B A to each of its layers.

    layers: name of a linear layer -> (A [R, D], B [O, R]) in fp32. base: folder or hub id of the
    base model. revision: its hub revision, or None. peft_config: content of a matching
    adapter_config.json. magnitudes: DoRA's lengths [O] of each layer's rows, empty without DoRA.
    token_rows: name of an embedding or head -> ids and rows [N, D] of its trained tokens.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    rank: int
    lora_alpha: float
    base: str
    revision: str | None
    peft_config: dict[str, Any]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.rank

    def lora_config(self) -> LoraConfig:
        """Return the `lora` config section that targets exactly these layers."""
        shape = {"rank": self.rank, "lora_alpha": float(self.lora_alpha), "use_dora": bool(self.magnitudes)}
        return LoraConfig(**shape, target_modules=tuple(self.layers))

    def merged(self, name: str, weight_OD: Tensor) -> Tensor:
        """Return a layer's weight [O, D] with the adapter in it, in fp32."""
        a_RD, b_OR = self.layers[name]
        sum_OD = weight_OD.float() + self.scaling * (b_OR @ a_RD)
        if name not in self.magnitudes:
            return sum_OD
        return sum_OD * (self.magnitudes[name] / torch.linalg.norm(sum_OD, dim=1))[:, None]

    @property
    def experts(self) -> list[str]:
        """Return the weights of experts that it adapts, by name; A is [R * E, D] there and B [O, R * E], as in PEFT."""
        return [name for name in self.layers if is_expert(name)]

    def state(self) -> dict[str, Tensor]:
        """Return name -> tensor, with the names that `engine.adapter.lora.adapter_state` uses."""
        parts = {stored_path(name, set(self.layers)): ab for name, ab in self.layers.items()}
        lengths = {f"{name}.{MAGNITUDE}": length_O for name, length_O in self.magnitudes.items()}
        rows = {f"{name}.{SUFFIX}": rows_ND for name, (_, rows_ND) in self.token_rows.items()}
        return {f"{name}.lora_{'AB'[i]}.weight": ab[i] for name, ab in parts.items() for i in (0, 1)} | lengths | rows


def read_adapter(folder: Path, takes_rows: bool = False) -> Adapter:
    """Return the adapter in `folder` as plain LoRA.

    takes_rows: the caller has a place for rows of trained tokens. Raises InputError if the folder
    holds no adapter, if it is damaged, or if plain LoRA cannot express it.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError("adapter", str(folder), f"must be a folder with {CONFIG} and {WEIGHTS}; {name} is not in it")
    values = _checked(load_json(folder / CONFIG), folder / CONFIG)
    if values.get(TOKENS) and not takes_rows:
        allowed = "cannot be exported: rows of tokens are no plain LoRA; or: merged, gguf-merged"
        raise InputError(f"{CONFIG}: {TOKENS}", values[TOKENS], allowed)
    pairs, magnitudes, rows = _pairs(folder / WEIGHTS)
    token_rows = _with_ids(rows, values.get(TOKENS) or {})
    pairs = _with_weight_names(pairs, values)
    if magnitudes.keys() != (pairs.keys() if values.get("use_dora") else set()):
        allowed = f"must say whether {WEIGHTS} holds {MAGNITUDE} of each layer"
        raise InputError(f"{CONFIG}: use_dora", values.get("use_dora"), allowed)
    ranks = {name: _rank(values, name, pair[0].shape[0], folder) for name, pair in pairs.items()}
    scalings = {name: _scaling(values, name, rank) for name, rank in ranks.items()}
    rank = max(ranks.values())
    alpha = values["lora_alpha"]
    layers = {name: _fold(pair, ranks[name], rank, scalings[name] / (alpha / rank)) for name, pair in pairs.items()}
    targets = values.get("target_modules")
    portable = values | {"r": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True}
    if not isinstance(targets, list) and targets != ALL_LINEAR:
        # vLLM and older loaders do not know regular expressions.
        portable["target_modules"] = sorted(name for name in layers if not is_expert(name))
    base, revision = values["base_model_name_or_path"], values.get("revision")
    return Adapter(layers, rank, alpha, base, revision, portable, magnitudes, token_rows)


def _with_ids(rows: Mapping[str, Tensor], indices: Any) -> dict[str, tuple[list[int], Tensor]]:
    """Return the rows of each module with the ids of their tokens. indices: PEFT's, by the end of a module's name."""
    indices = {EMBEDDING: indices} if isinstance(indices, list) else indices
    by_name = {name: indices.get(name.rpartition(".")[2]) for name in rows} if isinstance(indices, dict) else {}
    fits = all(isinstance(ids, list) and len(ids) == len(rows[name]) for name, ids in by_name.items())
    if not fits or len(by_name) != len(indices):
        raise InputError(f"{CONFIG}: {TOKENS}", indices, f"must name the rows of tokens that {WEIGHTS} holds, module by module")
    return {name: (ids, rows[name]) for name, ids in by_name.items()}


def _checked(values: Any, path: Path) -> dict[str, Any]:
    field = path.name
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise InputError(field, str(path), 'must be a PEFT config with "peft_type": "LORA"')
    if not isinstance(values.get("base_model_name_or_path"), str) or not values["base_model_name_or_path"]:
        raise InputError(field, values.get("base_model_name_or_path"), "base_model_name_or_path must be a folder or hub id")
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(values.get(key), kind) or isinstance(values[key], bool) or not values[key] > 0:
            raise InputError(f"{field}: {key}", values.get(key), "must be a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, int | float) and v > 0 for v in pattern.values()):
            raise InputError(f"{field}: {key}", pattern, "must map layer names to numbers above 0")
    for key in REFUSED:
        if values.get(key):
            raise InputError(f"{field}: {key}", values[key], "cannot be exported: vLLM and llama.cpp load only plain LoRA")
    if values.get("bias", "none") != "none":
        raise InputError(f"{field}: bias", values["bias"], "cannot be exported; allowed: none")
    return values


def _pairs(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Return A and B of each layer, DoRA's magnitudes, and rows of trained tokens."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError("adapter", str(path), f"must be a complete safetensors file ({first_line(error)})") from None
    names: dict[str, dict[str, Tensor]] = {}
    lengths: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(PREFIX) and key.endswith(f".{SUFFIX}") and tensor.dim() == 2:
            rows[key.removeprefix(PREFIX).removesuffix(f".{SUFFIX}")] = tensor.float()
            continue
        if key.startswith(PREFIX) and key.endswith(f".{MAGNITUDE}") and tensor.dim() == 1:
            lengths[key.removeprefix(PREFIX).removesuffix(f".{MAGNITUDE}")] = tensor.float()
            continue
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not found or tensor.dim() != 2:
            raise InputError("adapter", key, f"must be {PREFIX}<layer>.lora_A.weight or .lora_B.weight, a matrix")
        names.setdefault(found[1], {})[found[2]] = tensor.float()
    if not names:
        raise InputError("adapter", str(path), "must hold at least one pair of lora_A and lora_B")
    for name, pair in names.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InputError("adapter", name, "must have lora_A [r, in] and lora_B [out, r] with the same r")
    for name, length_O in lengths.items():
        if name in names and length_O.shape[0] != names[name]["B"].shape[0]:
            raise InputError("adapter", name, f"must have {MAGNITUDE} [out], with the out of its lora_B")
    order = sorted(names, key=_natural)
    pairs = {name: (names[name]["A"], names[name]["B"]) for name in order}
    return pairs, dict(sorted(lengths.items(), key=lambda item: _natural(item[0]))), rows


def _natural(name: str) -> list[Any]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _with_weight_names(pairs: dict[str, tuple[Tensor, Tensor]], values: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs with the names of the weights of experts in the place of PEFT's nested modules.

    Raises InputError for target_parameters that are no weights of experts.
    """
    wanted = values.get("target_parameters") or []
    field = f"{CONFIG}: target_parameters"
    wanted = wanted if isinstance(wanted, list) else [""]
    ends = {str(name).rpartition(".")[2] for name in wanted}
    if not ends <= set(EXPERT_WEIGHTS):
        raise InputError(field, wanted, f"cannot be exported; allowed: weights of experts ({', '.join(EXPERT_WEIGHTS)})")
    found = {}
    for name, pair in pairs.items():
        path = name.removesuffix(f".{INNER}")
        if path.rpartition(".")[2] != EXPERTS:
            found[name] = pair
            continue
        here = [w for w in EXPERT_WEIGHTS if any(f".{path}.{w}".endswith(f".{end}") for end in wanted)]
        if not here:
            raise InputError("adapter", name, f"adapts experts, and {CONFIG} has no target_parameters there")
        found[f"{path}.{here[0] if path != name else here[-1]}"] = pair
    return found


def _rank(values: dict[str, Any], name: str, width: int, folder: Path) -> int:
    """Return the rank that the config says. width: of A; of experts it is a multiple of the rank."""
    wanted = _matched(values.get("rank_pattern") or {}, name, values["r"])
    if (is_expert(name) and isinstance(wanted, int) and width % wanted) or (not is_expert(name) and width != wanted):
        raise InputError("adapter", f"{name}: rank {width}", f"must be {wanted}, as {CONFIG} in {folder} says")
    return wanted


def _scaling(values: dict[str, Any], name: str, rank: int) -> float:
    """Return the factor by which PEFT multiplies B A of this layer.

    PEFT's patterns are regular expressions that match a whole name or its dotted end.
    """
    alpha = _matched(values.get("alpha_pattern") or {}, name, values["lora_alpha"])
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _matched(pattern: dict[str, Any], name: str, default: Any) -> Any:
    try:
        return pattern_value(pattern, name, default)
    except re.error as error:
        raise InputError(CONFIG, sorted(pattern), f"must be valid regular expressions ({error})") from None


def _fold(pair: tuple[Tensor, Tensor], own: int, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """Return the pair with zeros up to `rank`, of each expert if there are several, and the factor in its B."""
    a_RD, b_OR = pair
    if rank != own:
        a_ERD, b_ORE = a_RD.view(-1, own, a_RD.shape[1]), b_OR.view(b_OR.shape[0], own, -1)
        a_RD = F.pad(a_ERD, (0, 0, 0, rank - own)).flatten(0, 1)
        b_OR = F.pad(b_ORE, (0, 0, 0, rank - own)).flatten(1)
    return a_RD, (b_OR if factor == 1.0 else b_OR * factor)
