"""Define the systems to measure: each builds its model and steps by its own documented interface.

All train r 16 (or `--rank`) on all linear layers of every decoder layer, on the same random
NF4 weights. A builder loads the model once. `prepare` sets it up for one setting. It returns the
step (host batch -> loss), the trainable parameters and a function to call after the optimizer's
step. `undo` reverts the setup.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import AnyLora, attach, detach
from engine.bench.rows import Setting
from engine.bench.shapes import linear_names, random_base, random_config, random_model
from engine.config.matmul import Matmul
from engine.config.trial import LoraConfig
from engine.data.packing import Batch
from engine.layers.host_stash import HostStash
from engine.model.device import pick_dtype
from engine.shape.policies import Policy
from engine.training.cuda_graphs import make_graphs
from engine.training.recordings import Recordings
from engine.units import GIB

Prepared = tuple[Callable[[Batch], torch.Tensor], list[nn.Parameter], Callable[[], None]]


class Builder(Protocol):
    def prepare(self, setting: Setting) -> Prepared: ...

    def undo(self) -> None: ...

    def host_gib(self) -> float | None:
        """Return the GiB of host memory for activations, or None if the system does not tell."""
        return None


class _Ours:
    def __init__(self, setting: Setting, device: torch.device, fused: bool) -> None:
        self._device = device
        self._base = random_base(setting.model, device, pick_dtype("auto", device), fused)
        self._layers: dict[str, AnyLora] = {}

    def prepare(self, setting: Setting) -> Prepared:
        base, device = self._base, self._device
        if setting.batch > 1 and not base.route.shares_rows:
            raise ValueError("these layers take one sample a row: --batch 1")
        lora = LoraConfig(rank=setting.rank, lora_dropout=setting.dropout, target_modules=setting.targets)
        self._layers = attach(base.model, base.linear_names, lora, 0)
        adapter = FlatAdapter(self._layers, base.dtype)
        base.checkpoint_activations(Policy(setting.policy), setting.keep_layers, setting.host_layers)
        if stay := base.set_matmul(Matmul(setting.matmul)):
            raise ValueError(f"{stay[0]} and {len(stay) - 1} other layers cannot multiply by INT8 codes")
        base.cache_weights(setting.weight_cache_gib)
        base.model.train()
        capacity, passes = setting.batch * setting.length, itertools.count()
        graphs = make_graphs(base, adapter.memory, setting, capacity, setting.length) if setting.cuda_graphs else None

        def step(batch: Batch) -> torch.Tensor:
            adapter.draw_masks(0, next(passes))
            if graphs is not None:
                return graphs.backward(batch, batch.num_targets) / batch.num_targets
            loss = base.loss(batch.to(device)) / batch.num_targets
            loss.backward()
            return loss.detach()

        def after_step() -> None:
            adapter.refresh()
            adapter.zero_grad()

        return step, [adapter.parameter], after_step

    def host_gib(self) -> float:
        return self._base.stash.memory.num_bytes / GIB

    def undo(self) -> None:
        detach(self._base.model, self._layers)
        self._layers, self._base.stash = {}, HostStash()  # the next setting pins its own memory
        Recordings.of(self._base).clear()
        self._base.checkpoint_activations(Policy.KEEP)
        self._base.set_matmul(Matmul.BF16)
        self._base.cache_weights(0.0)


class _Peft(Builder):
    """Train Hugging Face's model with PEFT's adapter and bitsandbytes' matmul, combined as in TRL.

    liger: adds Liger's RMSNorm, RoPE, SwiGLU and fused linear cross-entropy. Liger replaces RoPE in
    transformers' module.
    """

    def __init__(self, setting: Setting, device: torch.device, liger: bool) -> None:
        self._device = device
        self._model, _ = random_model(setting.model, device, pick_dtype("auto", device), "sdpa")
        self._model.is_loaded_in_4bit, self._model.config.use_cache = True, False
        self._peft: Any = None
        if liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self._model)

    def prepare(self, setting: Setting) -> Prepared:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model, prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            self._model,
            use_gradient_checkpointing=_recomputes(setting),
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        lora = PeftConfig(
            r=setting.rank,
            lora_alpha=2 * setting.rank,
            lora_dropout=setting.dropout,
            target_modules=linear_names(setting.model),
            task_type="CAUSAL_LM",
        )
        self._peft = get_peft_model(model, lora).train()
        return library_step(self._peft, setting, self._device)

    def undo(self) -> None:
        if self._peft is not None:
            self._model, self._peft = self._peft.unload(), None
        self._model.gradient_checkpointing_disable()


class _Axolotl(_Peft):
    """Train PEFT's model with Axolotl's LoRA kernels, as its `lora_qkv_kernel`, `lora_o_kernel` and `lora_mlp_kernel` do.

    Liger's RMSNorm, RoPE and fused linear cross-entropy are on too, as by its Liger plugin. Like its
    loader, norms, embeddings and head get the model's type back after PEFT's preparation.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        from axolotl.monkeypatch.lora_kernels import patch_self_attn_lora
        from axolotl.utils.dict import DictDefault

        super().__init__(setting, device, liger=True)
        self._kernels = DictDefault(lora_qkv_kernel=True, lora_o_kernel=True, lora_mlp_kernel=True)
        with tempfile.TemporaryDirectory() as folder:  # it finds the attention's class by a folder's config
            random_config(setting.model).save_pretrained(folder)
            patch_self_attn_lora(DictDefault(base_model=folder))  # after Liger, so that it takes Liger's RoPE

    def prepare(self, setting: Setting) -> Prepared:
        from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches

        step, parameters, after_step = super().prepare(setting)
        dtype = pick_dtype("auto", self._device)
        for name, module in self._peft.named_modules():
            if "norm" in name or name.endswith(("embed_tokens", "lm_head")):
                module.to(dtype)
        apply_lora_kernel_patches(self._peft, self._kernels)
        return step, parameters, after_step


class _Unsloth(Builder):
    """Train with Unsloth as its documentation does, one setting per process.

    Unsloth must be imported before transformers and peft.
    """

    def __init__(self, setting: Setting, device: torch.device, checkpoint: Path | None) -> None:
        from unsloth import FastLanguageModel

        self._device = device
        self._model, _ = FastLanguageModel.from_pretrained(
            model_name=str(checkpoint), max_seq_length=setting.length, dtype=torch.bfloat16, load_in_4bit=True
        )

    def prepare(self, setting: Setting) -> Prepared:
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            self._model,
            r=setting.rank,
            target_modules=linear_names(setting.model),
            lora_alpha=2 * setting.rank,
            lora_dropout=setting.dropout,
            bias="none",
            use_gradient_checkpointing="unsloth" if _recomputes(setting) else False,
            random_state=0,
        )
        FastLanguageModel.for_training(model)
        return library_step(model, setting, self._device)

    def undo(self) -> None:
        pass


def _recomputes(setting: Setting) -> bool:
    return setting.policy in ("recompute", "offload")


def library_step(model: Any, setting: Setting, device: torch.device) -> Prepared:
    """Return the step of a transformers model. It shifts labels itself, so they are the inputs."""
    autocast = pick_dtype("auto", device) == torch.bfloat16

    def step(batch: Batch) -> torch.Tensor:
        ids = batch.input_ids_T.to(device).view(setting.batch, setting.length)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def after_step() -> None:
        model.zero_grad(set_to_none=True)

    return step, [p for p in model.parameters() if p.requires_grad], after_step


@dataclass(frozen=True)
class System:
    """Describe one system.

    build: (a setting of the model, device, its folder) -> builder. needs: packages without which
    its row says `not installed`. from_folder: loads its model from a folder, in a new process for
    each setting.
    """

    build: Callable[[Setting, torch.device, Path | None], Builder]
    needs: tuple[str, ...] = ()
    from_folder: bool = False


SYSTEMS: dict[str, System] = {
    "ours": System(lambda setting, device, _: _Ours(setting, device, fused=True)),
    "ours-unfused": System(lambda setting, device, _: _Ours(setting, device, fused=False)),
    "peft": System(lambda setting, device, _: _Peft(setting, device, liger=False), needs=("peft",)),
    "peft-liger": System(lambda setting, device, _: _Peft(setting, device, liger=True), needs=("peft", "liger_kernel")),
    "axolotl": System(lambda setting, device, _: _Axolotl(setting, device), needs=("peft", "liger_kernel", "axolotl")),
    "unsloth": System(_Unsloth, needs=("unsloth",), from_folder=True),
}
