"""Give trials the loaded base model: hidden states, loss, recomputation and cached weights."""

from __future__ import annotations

import inspect
from collections.abc import Container, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapter.token_rows import TokenHead
from engine.config.matmul import Matmul
from engine.config.trial import ModelConfig
from engine.data.packing import Batch
from engine.layers import attention
from engine.layers.host_stash import HostStash
from engine.layers.library.library_mixer import read_offsets
from engine.layers.swap import (
    SwapReport,
    cache_weights,
    cached_weights,
    fused_projections,
    int8_groups,
    mixers,
    set_matmul,
    set_policy,
)
from engine.model.route import FASTEST, Route
from engine.quant.frozen_experts import frozen_experts
from engine.quant.int8_weight import Int8Group
from engine.shape.compute_limits import evaluation_row_tokens
from engine.shape.policies import Policy
from engine.units import GIB
from engine.vocabulary.embedding_noise import EmbeddingNoise
from engine.vocabulary.head import Head
from engine.vocabulary.loss import linear_cross_entropy, token_cross_entropy, trained_token_cross_entropy


@dataclass
class Base:
    """Hold a loaded base model.

    linear_names: the layers that an adapter may target, without the output head. swaps: the layers
    that run fused. route: how losses are computed. stash: activations kept in host memory. lasting:
    what its users keep from trial to trial, by their name for it; it goes with the model.
    embedding_noise: what `add_noise` set.
    """

    model: nn.Module
    tokenizer: Any
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    linear_names: list[str]
    swaps: SwapReport
    route: Route = FASTEST
    stash: HostStash = field(default_factory=HostStash)
    lasting: dict[str, Any] = field(default_factory=dict)
    embedding_noise: EmbeddingNoise | None = None

    def matches(self, config: ModelConfig, device: torch.device) -> bool:
        """Return True if a trial with this model section and device can use this base."""
        return self.config == config and self.device == device

    def shares_rows(self, longest: int) -> bool:
        """Return True if samples of up to `longest` tokens may share a row without changing a loss."""
        return self.route.shares_rows and not rotates_by_row(self.model.config.get_text_config(), longest)

    def pads_rows(self, longest: int) -> bool:
        """Return True if filler may follow the samples of a row, and the device alone knows where samples begin.

        Such a row can be recorded as a CUDA graph. On the CPU only the first half counts.
        """
        if self.swaps.unfused or not self.shares_rows(longest):
            return False
        return self.device.type == "cpu" or (attention.reads_offsets_only(self.dtype) and self._mixers_read_offsets())

    def evaluation_row_tokens(self, longest: int) -> int:
        """Return the most tokens in a row of an evaluation of samples of up to `longest` tokens."""
        is_plain = self.device.type == "cuda" and not self.swaps.unfused and not self.calls_library
        return evaluation_row_tokens(longest, self.model.config.get_text_config().hidden_size if is_plain else None)

    @property
    def has_mixers(self) -> bool:
        """Return True if fused layers call the library's token mixers."""
        return bool(mixers(self.model))

    @property
    def calls_library(self) -> bool:
        """Return True if fused layers call modules of the library: token mixers, or blocks of router and experts."""
        return self.has_mixers or any(frozen_experts(self.model))

    def _mixers_read_offsets(self) -> bool:
        """Return True if the library's mixers, if there are some, need no lengths on the host; tried once."""
        width = self.model.config.get_text_config().hidden_size
        return read_offsets(mixers(self.model), width, self.dtype, self.device)

    def add_noise(self, alpha: Tensor | None, noise: Tensor | None = None) -> None:
        """Add NEFTune's noise to the embeddings in training from now on; without an alpha, none.

        alpha: fp32 []. noise: int64 [2] with the seed of each pass (`ops.dropout`). Both on the device.
        """
        if self.embedding_noise is not None:
            self.embedding_noise.remove()
        self.embedding_noise = None if alpha is None else EmbeddingNoise(self.model.get_input_embeddings(), alpha, noise)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the final hidden states [T, D] of a packed row; `batch` must be on the device."""
        self.stash.clear()
        output = self._call(self.model.get_decoder(), batch)
        self.stash.flush()
        return output.last_hidden_state.squeeze(0)

    def loss(self, batch: Batch) -> Tensor:
        """Return the sum of -log p(target) over the row's targets, as an fp32 scalar in nats.

        `batch` must be on the device.
        """
        if not self.route.head_loss:
            return self._token_losses_of_logits(batch).sum()
        return linear_cross_entropy(self.hidden_states(batch), batch.labels_T, self.head(), batch.target_rows)

    def trained_target_losses(self, batch: Batch) -> Tensor:
        """Return what `target_losses` returns, with its gradients, for a loss that weighs targets by itself."""
        if not self.route.head_loss:
            return self._token_losses_of_logits(batch)
        return trained_token_cross_entropy(self.hidden_states(batch), batch.labels_T, self.head(), batch.target_rows)

    @torch.no_grad()
    def target_losses(self, batch: Batch) -> Tensor:
        """Return -log p(target) at each of the row's `target_rows` [M], in nats and fp32; their sum is `loss`."""
        if not self.route.head_loss:
            return self._token_losses_of_logits(batch)
        return token_cross_entropy(self.hidden_states(batch), batch.labels_T, self.head(), batch.target_rows)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Return -log p(target) at each position of the row, in fp32; 0 where there is no target."""
        losses = torch.zeros(batch.num_tokens, device=self.device)
        losses[batch.target_rows] = self.target_losses(batch)
        return losses

    def _token_losses_of_logits(self, batch: Batch) -> Tensor:
        logits_TV = self._call(self.model, batch).logits.squeeze(0)
        rows = batch.target_rows
        return nn.functional.cross_entropy(logits_TV[rows].float(), batch.labels_T[rows], reduction="none")

    def _call(self, module: nn.Module, batch: Batch) -> Any:
        """Call the decoder or the whole model on a row, with all that its forward method takes."""
        if any("dynamic" in kind.get("rope_type", "") for kind in _rotations(self.model.config.get_text_config())):
            _forget_longer_rows(module)
        if self.embedding_noise is not None:
            self.embedding_noise.offsets_N = batch.document_offsets
        given: dict[str, Any] = {"input_ids": batch.input_ids_T.unsqueeze(0), "use_cache": False}
        if self.route.packed_attention:
            given["position_ids"] = batch.position_ids_T.unsqueeze(0)
            given |= {"document_lengths": batch.document_lengths, "document_offsets": batch.document_offsets}
            given |= _boundaries(batch) if self.route.boundaries else {}
        elif len(batch.document_lengths) > 1:
            raise ValueError("this model takes one sample a row")
        else:
            known = inspect.signature(module.forward).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                given = {name: value for name, value in given.items() if name in known}
        return module(**given)

    def checkpoint_activations(self, policy: Policy, keep_layers: int = 0, host_layers: int = 0) -> None:
        """Set which activations the decoder layers keep for the backward pass.

        Layers follow `policy`, with two exceptions. The last `keep_layers` keep all activations,
        and `host_layers` of the others keep theirs on the host. Unfused layers keep all activations
        under KEEP and recompute the whole layer under any other policy.
        """
        self.stash.clear()  # a pass that failed under the former policy: a recording could not wait for its copies
        set_policy(self.model, policy, keep_layers, host_layers, self.stash)
        if self.swaps.unfused:
            # transformers 5.23 is renaming the methods, so both names are tried
            recomputes = policy is not Policy.KEEP
            switch = "enable" if recomputes else "disable"
            methods = [getattr(self.model, f"{word}_checkpointing_{switch}", None) for word in ("activation", "gradient")]
            method = next(filter(None, methods))
            if not getattr(self.model, "supports_gradient_checkpointing", True):
                return  # such a family always keeps its activations
            method({"use_reentrant": False}) if recomputes else method()

    def set_matmul(self, mode: Matmul, exempt: Container[str] = (), kind: type[Int8Group] = Int8Group) -> list[str]:
        """Set how frozen layers multiply in training, but for the `exempt`; return the names of those that stay as they are.

        Call `cache_weights` after it: what is kept depends on the mode.
        """
        return set_matmul(self.model, mode, exempt, kind)

    def cache_weights(self, gib: float) -> float:
        """Keep up to `gib` GiB of what products of fused layers read; return the GiB kept.

        Experts are dequantised in that room, a weight of one layer at a time, where that is faster.
        """
        room, mixture = int(gib * GIB), [experts for _, experts in frozen_experts(self.model)]
        for experts in mixture:
            experts.room = room
        if any(experts.can_use(room) for experts in mixture):
            return cache_weights(self.model, self.dtype, 0) / GIB
        return cache_weights(self.model, self.dtype, room) / GIB

    def runs_outside_layers(self, linears: list[nn.Module]) -> bool:
        """Return True if one of these linear layers is not computed by a fused decoder layer."""
        inside = fused_projections(self.model)
        return any(linear not in inside for linear in linears)

    def read_addresses(self) -> dict[Hashable, int]:
        """Return the addresses of what passes read and another trial may replace, by place.

        They are those of the weights and codes that fused layers keep, and of INT8 scales.
        """
        found: dict[Hashable, int] = {**cached_weights(self.model)}
        for (first, *_), int8 in int8_groups(self.model):
            scales = int8.scales
            found |= {(first, "rows"): scales.row_O.data_ptr(), (first, "columns"): scales.column_D.data_ptr()}
        return found

    def head(self) -> Head:
        """Return the output embedding with the logit transforms from the model's config."""
        layer, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None) or 1.0
        divided = scaling if config.model_type == "hyperclovax" else 1.0 / scaling  # Granite and others divide by it
        scale = getattr(config, "logit_scale", None) or divided
        own = layer.own_rows if isinstance(layer, TokenHead) else None
        return Head(layer.weight, layer.bias, float(scale), getattr(config, "final_logit_softcapping", None), own)


def _boundaries(batch: Batch) -> dict[str, Any]:
    """Return where samples begin, in transformers' keywords for attention, convolutions and recurrences."""
    offsets, longest = batch.document_offsets, max(batch.document_lengths)
    positions_T = torch.arange(batch.num_tokens, device=offsets.device)
    sample_T = torch.bucketize(positions_T, offsets[1:-1], right=True).to(torch.int32)
    cuts = {f"cu_seq_lens_{side}": offsets for side in "qk"} | {f"max_length_{side}": longest for side in "qk"}
    return cuts | {"seq_idx": sample_T.unsqueeze(0)}


def rotates_by_row(config: Any, longest: int) -> bool:
    """Return True if the longest sample of a row decides how all of them are rotated."""
    for kind in _rotations(config):
        original = kind.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
        if kind.get("rope_type") in ("dynamic", "longrope") and longest > original:
            return True
    return False


def _rotations(config: Any) -> list[dict[str, Any]]:
    """Return the settings of the rotary embeddings, of each kind of layers if they differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    return list(rope.values()) if rope and all(isinstance(part, dict) for part in rope.values()) else [rope]


def _forget_longer_rows(model: nn.Module) -> None:
    """Give rotary embeddings back the frequencies that they grow from.

    The library keeps those of the longest row so far. Then a loss would depend on the rows before.
    """
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            grown, first = (getattr(module, f"{prefix}{kept}inv_freq", None) for kept in ("", "original_"))
            if first is not None:
                module.register_buffer(f"{prefix}inv_freq", first.to(grown.device), persistent=False)
                setattr(module, name, module.original_max_seq_len)


def end_tokens(base: Base) -> list[int]:
    """Return the end tokens of tokenizer and model, without repeats.

    Chat models often end a turn with a different token than a text.
    """
    own = base.model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(token for token in [base.tokenizer.eos_token_id, *ends] if token is not None))
