"""Find the layers whose exported tensors PEFT would not put back where they were trained.

PEFT picks layers by their last names, and for some families it renames tensors or turns names into
stacked experts (`transformers_weight_conversion.py`). So PEFT itself is asked, on a model without
weights of the class that a user loads. Which tensors find their place depends on names alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from engine.adapter.expert_lora import stored_path
from engine.adapter.peft_files import PREFIX, shortest_names, shortest_parameters
from engine.config.targets import is_expert

ADAPTER = "default"
SEEN = 2  # layers of one build, so that their numbers differ


def misplaced_layers(
    make: Callable[[], nn.Module], features: Mapping[str, tuple[int, int]], kind_of: Callable[[str], str]
) -> set[str]:
    """Return the kinds of layers that PEFT cannot load; the others it loads, all of them together.

    make: returns a new model on the meta device. features: layer name -> (out, in). kind_of: layer
    name -> the kind that it stays or goes with.
    """
    lost: set[str] = set()
    while True:
        model = without_repeats(make())
        there = {name for name, _ in model.named_modules()}
        kept = {name: shape for name, shape in features.items() if name in there and kind_of(name) not in lost}
        if not kept:
            break
        odd = _odd_layers(model, kept)
        if odd is not None and not odd:
            break
        found = {kind_of(name) for name in odd or ()}
        if not found:  # PEFT refuses the whole, or changes something else
            found = _refused_kinds(lambda: without_repeats(make()), kept, kind_of)
        lost |= found
    return lost


def without_repeats(model: nn.Module) -> nn.Module:
    """Take layers out of the model's lists that repeat two earlier ones in all their names, classes and shapes.

    The names of the others stay, gaps in their numbers included. PEFT goes by names, so what it does
    with two layers it does with the rest; a model of 30 layers takes a third of the time.
    """
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        seen: Counter[tuple[object, ...]] = Counter()
        for index, layer in list(layers._modules.items()):
            built = tuple((name, type(module)) for name, module in layer.named_modules()) if layer is not None else ()
            sizes = tuple((name, tensor.shape) for name, tensor in layer.named_parameters()) if layer is not None else ()
            seen[built, sizes] += 1
            if seen[built, sizes] > SEEN:
                del layers._modules[index]
    return model


def _refused_kinds(
    make: Callable[[], nn.Module], features: Mapping[str, tuple[int, int]], kind_of: Callable[[str], str]
) -> set[str]:
    """Return the kinds that fail alone, by last name; all kinds if each last name alone is right."""
    ends: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in features.items():
        ends.setdefault(name.rpartition(".")[2], {})[name] = shape
    failing = [part for part in ends.values() if _odd_layers(make(), part) != set()]
    return {kind_of(name) for part in failing or list(ends.values()) for name in part}


def _odd_layers(model: nn.Module, features: Mapping[str, tuple[int, int]]) -> set[str] | None:
    """Return the layers whose tensors are lost or put elsewhere, or None if other layers change or PEFT raises."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    experts = {n: _num_experts(model, n) for n in features if is_expert(n)}
    state = _state(features, experts)
    linears = [name for name in features if name not in experts]
    targets = shortest_names(linears, [name for name, _ in model.named_modules()])
    weights = shortest_parameters(list(experts), [name for name, _ in model.named_parameters()])
    stacked = {"target_parameters": weights} if experts else {}
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, task_type="CAUSAL_LM", **stacked)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
            places = {_plain(name) for name, _ in adapted.named_parameters() if ".lora_" in name}
            result = set_peft_model_state_dict(adapted, dict(state), low_cpu_mem_usage=True)
    except Exception:  # PEFT refuses some layers of some families
        return None
    unfilled = {_plain(name) for name in result.missing_keys if ".lora_" in name}
    odd = (state.keys() - places) | (unfilled & state.keys())
    if not odd and (places - state.keys() or result.unexpected_keys):
        return None
    paths = {stored_path(name, set(features)): name for name in features}
    return {paths[name.removeprefix(PREFIX).rpartition(".lora_")[0]] for name in odd}


def _num_experts(model: nn.Module, name: str) -> int:
    return model.get_parameter(name).shape[0]


def _state(features: Mapping[str, tuple[int, int]], experts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return an adapter of rank 1 without values. experts: name -> the experts over which its features are summed."""
    state = {}
    for name, (height, width) in features.items():
        number, path = experts.get(name, 1), PREFIX + stored_path(name, set(features))
        state[f"{path}.lora_A.weight"] = torch.empty(number, width // number, device="meta")
        state[f"{path}.lora_B.weight"] = torch.empty(height // number, number, device="meta")
    return state


def _plain(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")
