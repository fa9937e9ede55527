"""The resident base model: loaded and quantised once, then lent to one trial after another.

Everything is loaded by transformers; linear layers are then taken over by `FrozenLinear` and attention runs through the
`packed` entry of transformers' registry. No forward method is replaced: the decoder gives hidden states, and the loss takes
those and the head.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine import attention
from engine.builtin import resolve_model
from engine.config import HUB_ID, ModelConfig, load_json
from engine.embedding import place_embedding
from engine.errors import InputError, first_line
from engine.layer import Policy
from engine.layer_plan import POLICIES
from engine.loss import Head, linear_cross_entropy
from engine.metrics import GIB
from engine.model_files import check_weights
from engine.offload import HostStash
from engine.packed import load_packed
from engine.packing import Batch
from engine.quant import freeze_linears, nf4_load_config
from engine.swap import SwapReport, cache_weights, fuse_layers, require_fused, set_policy, survey

NO_LINEAR = "has no linear layer that an adapter could sit on"


@dataclass
class Base:
    """A loaded base model. `linear_names` are the layers an adapter may sit on (the head is not among them)."""

    model: nn.Module
    tokenizer: Any
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    linear_names: list[str]
    swaps: SwapReport
    stash: HostStash = field(default_factory=HostStash)

    def matches(self, config: ModelConfig, device: torch.device) -> bool:
        """Whether a trial with this model section can use this base as it stands."""
        return self.config == config and self.device == device

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [T, D] of a packed row; `batch` is already on the device."""
        self.stash.clear()
        decoder = self.model.get_decoder()
        output = decoder(
            input_ids=batch.input_ids_T.unsqueeze(0),
            position_ids=batch.position_ids_T.unsqueeze(0),
            use_cache=False,
            document_lengths=batch.document_lengths,
            document_offsets=batch.document_offsets,
        )
        self.stash.flush()
        return output.last_hidden_state.squeeze(0)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over the row's targets of -log p(target), fp32 scalar in nats; `batch` is already on the device."""
        return linear_cross_entropy(self.hidden_states(batch), batch.labels_T, self.head(), batch.target_rows)

    def checkpoint_activations(
        self, wanted: bool | Literal["selective", "offload"], keep_layers: int = 0, host_layers: int = 0
    ) -> None:
        """Whether decoder layers are computed again in the backward pass, or keep their matmul outputs, as the last `keep_layers`
        always do, and `host_layers` of the others in host memory; selective: the MLP is computed again; offload: all is, from
        inputs in host memory. Layers that run unfused are computed again whole."""
        self.stash.clear()
        self.stash = set_policy(self.model, Policy[POLICIES[wanted].upper()], keep_layers, host_layers)
        if self.swaps.unfused:
            # transformers is renaming the methods (5.23)
            switch = "enable" if wanted else "disable"
            methods = [getattr(self.model, f"{word}_checkpointing_{switch}", None) for word in ("activation", "gradient")]
            method = next(filter(None, methods))
            method({"use_reentrant": False}) if wanted else method()

    def cache_weights(self, gib: float) -> float:
        """Keep up to `gib` GiB of the fused layers' weights dequantised; returns the GiB kept."""
        return cache_weights(self.model, self.dtype, int(gib * GIB)) / GIB

    def head(self) -> Head:
        """The output embedding with the logit transforms that the model's config declares."""
        layer, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return Head(layer.weight, layer.bias, float(scale), getattr(config, "final_logit_softcapping", None))


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one. Asking for CUDA without one is an InputError."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device", wanted, "no CUDA device is visible; allowed here: auto, cpu")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU, unless told otherwise."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]


def load_base(config: ModelConfig, device: torch.device, attention_name: str = attention.NAME) -> Base:
    """Load, quantise and freeze the base model on `device`. attention_name: an entry of transformers' registry; training's own
    takes packed rows, generation needs one that knows the library's cache of keys and values."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # hundreds of redrawn lines per trial in a log file
    attention.register()
    source, dtype = locate(config), pick_dtype(config.dtype, device)
    options: dict[str, Any] = {"device_map": {"": device.type}, "dtype": dtype, "attn_implementation": attention_name}
    options |= {"use_safetensors": True, "output_loading_info": True}
    if Path(source).is_dir():
        check_weights(Path(source), config.path)

    def load(folder: str | Path, **more: Any) -> tuple[Any, dict[str, Any]]:
        return _from_pretrained(AutoModelForCausalLM, config, str(folder), **options, **more)

    if config.quantization == "nf4":
        model, loading = _load_nf4(config, source, device, dtype, load)
    else:
        model, loading = load(source)
    if loading["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise InputError("model.path", config.path, f"lacks {len(loading['missing_keys'])} tensors, {_first(loading)} among them")
    model.requires_grad_(False).eval()
    names = freeze_linears(model, skip=[model.get_output_embeddings()])
    if not names:
        raise InputError("model.path", config.path, NO_LINEAR)
    swaps = _swaps(model, config, fuse_layers)
    if place_embedding(model, config):
        swaps = replace(swaps, others=(*swaps.others, "embed_tokens"))
    return Base(model, load_tokenizer(config), config, device, dtype, names, swaps)


def _load_nf4(
    config: ModelConfig, source: str, device: torch.device, dtype: torch.dtype, load: Callable[..., tuple[Any, dict[str, Any]]]
) -> tuple[Any, dict[str, Any]]:
    """Quantised, or read as another process of this node has quantised it."""

    def quantise() -> tuple[Any, dict[str, Any]]:
        return load(source, quantization_config=nf4_load_config(config.double_quantization, dtype))

    folder = _local_folder(config, source)
    if folder is None or config.trust_remote_code or "quantization_config" in load_json(folder / "config.json"):
        return quantise()  # a model's own code is not saved with it; what is quantised already is no larger
    settings = {"double": config.double_quantization, "dtype": str(dtype), "device": device.type}
    return load_packed(folder, settings, quantise, load)


def _local_folder(config: ModelConfig, source: str) -> Path | None:
    """Where the model's files are on this machine; None where they are not yet."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=config.revision, local_files_only=True))
        check_weights(folder, config.path)
    except Exception:  # not there, or not whole: what comes next downloads it, or says what is wrong
        return None
    return folder


def model_config(config: ModelConfig) -> dict[str, Any]:
    """The model's config.json as transformers reads it, as plain data; no weights are needed."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config, locate(config)).to_dict()


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, config, locate(config))


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says without its weights. features: (out, in) of each layer an adapter may sit on, by name."""

    features: dict[str, tuple[int, int]]
    swaps: SwapReport


def inspect_model(config: ModelConfig) -> ModelFacts:
    """Build the model without weights. InputError where it is no causal language model, or `strict` asks for more than it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = locate(config)
    model_config = _from_pretrained(AutoConfig, config, source)
    if Path(source).is_dir():
        check_weights(Path(source), config.path)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # a config.json of the wrong types fails anywhere in the model's code
            raise InputError("model.path", config.path, f"must be a causal language model ({first_line(error)})") from None
    head = model.get_output_embeddings()
    features = {
        n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    }
    if not features:
        raise InputError("model.path", config.path, NO_LINEAR)
    return ModelFacts(features, _swaps(model, config, survey))


def _swaps(model: nn.Module, config: ModelConfig, method: Callable[[nn.Module], SwapReport]) -> SwapReport:
    """What `method` (survey or fuse_layers) reports under `config.layers`."""
    if config.layers == "original":
        return SwapReport((), {"all": "model.layers = original"})
    report = method(model)
    if config.layers == "strict":
        require_fused(report, config.path)
    return report


def locate(config: ModelConfig) -> str:
    """A folder or hub id that transformers can load; a folder without config.json is an InputError."""
    source = str(resolve_model(config.path))
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError("model.path", config.path, "must be a Hugging Face model folder; config.json is not in it")
        return str(path)
    if not HUB_ID.fullmatch(source) or ".." in source:
        raise InputError("model.path", config.path, "no such folder; allowed: a model folder, a hub id, builtin:<name>")
    return source


def free(device: torch.device) -> None:
    """Give memory of dropped tensors back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _from_pretrained(factory: Any, config: ModelConfig, source: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(
            source, revision=config.revision or "main", trust_remote_code=config.trust_remote_code, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files of the wrong types or sizes fail anywhere in the library, as whatever comes up
        if "DefaultCPUAllocator" in str(error):  # the CPU's way to say that memory ran out
            raise
        allowed = "a folder or hub id that transformers can load; it said: "
        raise InputError("model.path", config.path, allowed + first_line(error)) from error


def _first(loading: dict[str, Any]) -> str:
    return min(map(str, loading["missing_keys"]))
