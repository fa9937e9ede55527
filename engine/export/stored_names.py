"""Find the tensors of a model folder that hold the weights of a model's layers.

transformers renames tensors when it loads some families: a checkpoint's
`language_model.model.layers.0` is the class's `model.language_model.layers.0`. Adapters have the
names of the class.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.config.trial import ModelConfig
from engine.model.pretrained import read_config, without_weights


def stored_names(layers: Iterable[str], keys: Iterable[str], model: ModelConfig) -> dict[str, str]:
    """Return layer -> name of its weight in the folder, for each layer that has one.

    keys: the names of all tensors of the folder.
    """
    wanted, keys = list(layers), set(keys)
    found = {name: f"{name}.weight" for name in wanted if f"{name}.weight" in keys}
    if len(found) < len(wanted):
        renamed = _renamed(keys, model)
        found |= {name: renamed[f"{name}.weight"] for name in wanted if f"{name}.weight" in renamed}
    return found


def _renamed(keys: Iterable[str], model: ModelConfig) -> dict[str, str]:
    """Return name in the class -> name in the folder. Tensors that are stacked while loading are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    skeleton = without_weights(read_config(model), model)
    rules, state = get_model_conversion_mapping(skeleton), skeleton.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names = {key: rename_source_key(key, renamings, converters, skeleton.base_model_prefix, state) for key in keys}
    return {name: key for key, (name, converted) in names.items() if converted is None}
