"""The systems that are measured: how each builds its model and takes one step, by its own documented interface.

All train r 16 (or `--rank`) on the seven linear layers of every decoder layer, on the same random NF4 weights. A builder takes
(options, device) and returns the step (batch -> loss), the trainable parameters, and what follows the optimizer's step. options:
a `Setting`'s fields, `child` (the system's name) and `checkpoint` (a model folder, for systems that load from one).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.bench.shapes import random_base, random_model
from engine.config import LoraConfig
from engine.graphs import make_graphs
from engine.layer_plan import POLICIES
from engine.lora import FlatAdapter, attach
from engine.model import pick_dtype
from engine.packing import Batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OUR_POLICIES: dict[str, Any] = {name: setting for setting, name in POLICIES.items()}
Built = tuple[Callable[[Batch], torch.Tensor], list[nn.Parameter], Callable[[], None]]


def _our_step(options: argparse.Namespace, device: torch.device) -> Built:
    base = random_base(options.model, device, pick_dtype("auto", device), fused=options.child == "ours")
    layers = attach(base.model, base.linear_names, LoraConfig(rank=options.rank, lora_dropout=options.dropout), 0)
    adapter = FlatAdapter(layers, base.dtype)
    base.checkpoint_activations(OUR_POLICIES[options.policy], options.keep_layers, options.host_layers)
    base.cache_weights(options.weight_cache_gib)
    base.model.train()
    graphs = make_graphs(base, options.batch * options.length, options.length) if options.cuda_graphs else None

    def step(batch: Batch) -> torch.Tensor:
        if graphs is not None:
            return graphs.backward(batch, batch.num_targets) / batch.num_targets
        loss = base.loss(batch.to(device)) / batch.num_targets
        loss.backward()
        return loss.detach()

    def after_step() -> None:
        adapter.refresh()
        adapter.zero_grad()

    return step, [adapter.parameter], after_step


def _peft_step(options: argparse.Namespace, device: torch.device) -> Built:
    """Hugging Face's model, PEFT's adapter and bitsandbytes' matmul, as TRL puts them together."""
    model, _ = random_model(options.model, device, pick_dtype("auto", device), "sdpa")
    return _library_step(_with_peft(model, options), options, device)


def _peft_liger_step(options: argparse.Namespace, device: torch.device) -> Built:
    """The same with Liger's RMSNorm, RoPE, SwiGLU and fused linear cross-entropy. Liger replaces RoPE in transformers' module."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model, _ = random_model(options.model, device, pick_dtype("auto", device), "sdpa")
    _apply_liger_kernel_to_instance(model=model)
    return _library_step(_with_peft(model, options), options, device)


def _unsloth_step(options: argparse.Namespace, device: torch.device) -> Built:
    """Unsloth as its documentation uses it. It wants to be imported before transformers and peft."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(options.checkpoint), max_seq_length=options.length, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        target_modules=TARGETS,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if options.policy in ("recompute", "offload") else False,
        random_state=0,
    )
    FastLanguageModel.for_training(model)
    return _library_step(model, options, device)


def _with_peft(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model, prepare_model_for_kbit_training

    model.is_loaded_in_4bit = True
    model.config.use_cache = False
    recomputed = options.policy in ("recompute", "offload")
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=recomputed, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = PeftConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules=TARGETS)
    return get_peft_model(model, config).train()


def _library_step(model: Any, options: argparse.Namespace, device: torch.device) -> Built:
    """Labels are the inputs: transformers' models, and all built on them, shift them inside."""
    autocast = pick_dtype("auto", device) == torch.bfloat16

    def step(batch: Batch) -> torch.Tensor:
        ids = batch.input_ids_T.to(device).view(options.batch, options.length)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def after_step() -> None:
        model.zero_grad(set_to_none=True)

    return step, [p for p in model.parameters() if p.requires_grad], after_step


@dataclass(frozen=True)
class System:
    """needs: packages without which its row is `not installed`. from_folder: whether it loads its model from a folder."""

    build: Callable[[argparse.Namespace, torch.device], Built]
    needs: tuple[str, ...] = ()
    from_folder: bool = False


SYSTEMS: dict[str, System] = {
    "ours": System(_our_step),
    "ours-unfused": System(_our_step),
    "peft": System(_peft_step, needs=("peft",)),
    "peft-liger": System(_peft_liger_step, needs=("peft", "liger_kernel")),
    "unsloth": System(_unsloth_step, needs=("unsloth",), from_folder=True),
}
