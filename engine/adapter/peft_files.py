"""Write and read the adapter in PEFT's file format, which every loader of PEFT adapters reads.

`adapter_model.safetensors` holds `base_model.model.<layer>.lora_A.weight` [R, D] and
`.lora_B.weight` [O, R] in fp32. `adapter_config.json` is sorted JSON with only PEFT's keys.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import SafetensorError
from safetensors.numpy import save as array_bytes
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.adapter.lora import AnyLora, host_arrays, load_adapter_state
from engine.adapter.token_rows import TokenRows, token_indices
from engine.config.targets import is_expert, layer_ranks, layer_scalings
from engine.config.trial import TRAIN_CONFIG, LoraConfig, TrainConfig, load_train_config
from engine.errors import InputError, first_line
from engine.sources.builtin import published_name
from engine.sources.locate import locate
from engine.system.files import link_or_copy, write_folder

PREFIX = "base_model.model."
_TOKENIZER_FILES: WeakKeyDictionary[Any, tuple[Any, dict[Path, bytes]]] = WeakKeyDictionary()

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_adapter(
    folder: Path,
    config: TrainConfig,
    layers: dict[str, AnyLora],
    model: nn.Module,
    tokenizer: Any,
    weights: Path | None = None,
) -> None:
    """Write adapter and tokenizer to `folder` atomically, replacing an earlier export.

    weights: a flushed file of `adapter_bytes(layers)`, which then becomes the export's too.
    """

    def fill(target: Path) -> None:
        if weights is None:
            (target / WEIGHTS).write_bytes(adapter_bytes(layers))
        else:
            link_or_copy(weights, target / WEIGHTS)
        adapted = [name for name, layer in layers.items() if not isinstance(layer, TokenRows)]
        modules, parameters = ([name for name, _ in found] for found in (model.named_modules(), model.named_parameters()))
        values = peft_config(config, adapted, modules, parameters)
        values |= _class_of(model)
        values |= {"trainable_token_indices": indices} if (indices := token_indices(layers)) else {}
        (target / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        for name, content in _tokenizer_files(tokenizer, target).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)

    write_folder(folder, fill)


def adapter_bytes(layers: dict[str, AnyLora]) -> bytes:
    """Return the content of adapter_model.safetensors."""
    state = {PREFIX + name: array for name, array in host_arrays(layers).items()}
    return array_bytes(state, metadata={"format": "pt"})


def _tokenizer_files(tokenizer: Any, on_disk: Path) -> dict[Path, bytes]:
    """Return the files of `save_pretrained`, made once: a large vocabulary takes it up to a second.

    on_disk: a folder on the disk that gets them. The place for temporary files may be full or small.
    """
    state, known = (tokenizer.chat_template, len(tokenizer)), _TOKENIZER_FILES.get(tokenizer)
    if known is None or known[0] != state:
        with tempfile.TemporaryDirectory(dir=on_disk) as folder:
            tokenizer.save_pretrained(folder)
            files = {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        known = _TOKENIZER_FILES[tokenizer] = (state, files)
    return known[1]


def peft_config(
    config: TrainConfig, targets: list[str], module_names: list[str], parameter_names: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the content of adapter_config.json. `r` is PEFT's key for the rank."""
    lora = config.lora
    experts = [name for name in targets if is_expert(name)]
    linears = [name for name in targets if not is_expert(name)]
    stacked = {"target_parameters": shortest_parameters(experts, parameter_names)} if experts else {}
    ranks = layer_ranks(lora, targets)
    rank = max(ranks.values())  # loaders make room for it, and some of them know no pattern
    return {
        "base_model_name_or_path": _base_name(config),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _alpha(lora, rank, lora.scaling),
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": config.model.revision,
        "target_modules": shortest_names(linears, module_names),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
        **_patterns(lora, ranks, rank),
        **stacked,
    }


def _patterns(lora: LoraConfig, ranks: dict[str, int], usual: int) -> dict[str, Any]:
    """Return PEFT's keys for layers of other ranks or alphas than the usual ones, none if there are none.

    Without an alpha of its own, a layer of another rank gets the alpha that leaves its scaling. Each key
    fits its own layers alone, so the order of the keys, which the file sorts, does not matter.
    """
    alphas = {name: _alpha(lora, ranks[name], scaling) for name, scaling in layer_scalings(lora, ranks).items()}
    by_end: dict[str, set[tuple[int, float]]] = {}
    for name, rank in ranks.items():
        by_end.setdefault(name.rpartition(".")[2], set()).add((rank, alphas[name]))
    keys = {name: end if len(by_end[end := name.rpartition(".")[2]]) == 1 else name for name in ranks}
    other_ranks = {keys[name]: rank for name, rank in ranks.items() if rank != usual}
    usual_alpha = _alpha(lora, usual, lora.scaling)
    other_alphas = {keys[name]: alpha for name, alpha in alphas.items() if alpha != usual_alpha}
    return {"rank_pattern": other_ranks, "alpha_pattern": other_alphas} if other_ranks or other_alphas else {}


def _alpha(lora: LoraConfig, rank: int, scaling: float) -> int | float:
    """Return the alpha with which a layer of this rank has the scaling; whole numbers as PEFT writes them."""
    alpha = lora.alpha if rank == lora.rank and scaling == lora.scaling else scaling * lora.divisor(rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def _class_of(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's key that names the base model's class, for a model that reads more than text."""
    if model.config.get_text_config() is model.config or not type(model).__module__.startswith("transformers."):
        return {}
    return {"auto_mapping": {"base_model_class": type(model).__name__, "parent_library": "transformers"}}


def shortest_names(targets: list[str], module_names: list[str]) -> list[str]:
    """Return last name parts (`q_proj`) if they select exactly the targets, else full names."""
    ends = {name.rpartition(".")[2] for name in targets}
    exact = {name for name in module_names if name.rpartition(".")[2] in ends} == set(targets)
    return sorted(ends) if exact else sorted(targets)


def shortest_parameters(experts: list[str], parameter_names: Iterable[str]) -> list[str]:
    """Return last two name parts (`experts.down_proj`) if they select exactly these weights of experts, else full names."""
    ends = {".".join(name.split(".")[-2:]) for name in experts}
    exact = {name for name in parameter_names if ".".join(name.split(".")[-2:]) in ends} == set(experts)
    return sorted(ends) if exact else sorted(experts)


def load_adapter(folder: Path, layers: dict[str, AnyLora]) -> None:
    """Load exported weights into attached layers. Raises InputError if damaged or not fitting."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError("adapter", str(folder), f"must be a folder with {WEIGHTS}")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError("adapter", str(path), f"must be a complete safetensors file ({first_line(error)})") from None
    load_adapter_state(layers, {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}, str(path))


def _base_name(config: TrainConfig) -> str:
    """Return a folder's absolute path or a hub id.

    A builtin model has its published name, because other machines lack this one's cache.
    """
    if published := published_name(config.model.path):
        return published
    source = locate(config.model)
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def find_train_config(folder: Path) -> TrainConfig | None:
    """Return the config the adapter was trained with, or None if there is none.

    For the best adapter of a sweep, the file is in `folder`. For a trial's adapter, it is in the
    parent.
    """
    for place in (folder, folder.resolve().parent):
        if (place / TRAIN_CONFIG).is_file():
            return load_train_config(place / TRAIN_CONFIG)
    return None
