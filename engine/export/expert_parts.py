"""Find where a model folder holds the experts that an adapter changes, and compute their share of it.

A folder holds all experts of a layer in one tensor, or each expert's gate, up and down on their own.
transformers' own rules say which tensors become which parameter. Rules that do more than stack and
join are not followed.

Shape letters: E experts, O output features, D input features, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model.pretrained import read_config, without_weights

FOLLOWED = ("MergeModulelist", "Concatenate")


@dataclass(frozen=True)
class ExpertPart:
    """What one stored tensor holds of an adapted weight.

    expert: None if all. part, parts: which share of the output features. is_transposed: stored as
    [E, D, O].
    """

    layer: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    is_transposed: bool = False

    def delta(self, pair: tuple[Tensor, Tensor], rank: int) -> Tensor:
        """Return B A of this part, before scaling: [O / parts, D], or of all experts as they are stored."""
        a_RD, b_OR = pair
        a_ERD, b_ORE = a_RD.view(-1, rank, a_RD.shape[1]), b_OR.view(b_OR.shape[0], rank, -1)
        if self.expert is not None:
            return (b_ORE[:, :, self.expert] @ a_ERD[self.expert]).chunk(self.parts)[self.part]
        delta_EOD = torch.einsum("ore,erd->eod", b_ORE, a_ERD)
        return delta_EOD.transpose(1, 2) if self.is_transposed else delta_EOD


def expert_parts(experts: Iterable[str], keys: Iterable[str], model: ModelConfig) -> dict[str, ExpertPart]:
    """Return tensor name -> what it holds of these weights. Raises InputError if one is not there or made by other rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted = set(experts)
    skeleton = without_weights(read_config(model), model)
    rules, state = get_model_conversion_mapping(skeleton), skeleton.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, ExpertPart] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, state)
        if name in wanted:
            found[key] = _part(name, key, pattern, by_pattern, skeleton)
    if missing := wanted - {part.layer for part in found.values()}:
        raise InputError("adapter", min(missing), "the base model has no such experts")
    return found


def _part(name: str, key: str, pattern: str | None, by_pattern: dict[str, object], skeleton: nn.Module) -> ExpertPart:
    if pattern is None:
        module = skeleton.get_submodule(name.rpartition(".")[0])
        return ExpertPart(name, is_transposed=bool(getattr(module, "is_transposed", False)))
    rule = by_pattern[pattern]
    kinds, number = [type(operation).__name__ for operation in rule.operations], re.search(r"\.experts\.(\d+)\.", key)
    if not set(kinds) <= set(FOLLOWED) or number is None:
        made = f"transformers makes it of {key} by {', '.join(kinds)}"
        raise InputError("adapter", name, f"cannot be merged: {made}; allowed: --to peft")
    return ExpertPart(name, int(number[1]), rule.source_patterns.index(pattern), len(rule.source_patterns))
