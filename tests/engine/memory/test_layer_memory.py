"""Compare the predicted memory of fused layers with the storages that their code allocates.

The layers run on the meta device, where tensors have sizes but no memory. The test counts every
storage from creation to release.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.adapter.expert_lora import LoraExperts
from engine.adapter.lora import LoraLinear
from engine.config.targets import target_rule
from engine.config.trial import LoraConfig, TrainConfig
from engine.kernels import ops
from engine.kernels.eight_bit import int8_ops
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.layers import attention, attention_half
from engine.layers import decoder_layer as fused
from engine.layers import projection_group as projection
from engine.layers.attention import AttentionOptions, Documents
from engine.layers.host_stash import HostStash
from engine.layers.library.experts_half import ExpertsBlock
from engine.layers.projection_group import ProjectionGroup
from engine.layers.structure import AttentionSpec, Call, ExpertsSpec, LayerSpec, MixerSpec, MlpSpec, Norm, TailSpec
from engine.memory.layer_memory import Pass
from engine.memory.layer_walk import attention_name
from engine.memory.live_bytes import HostStack, LiveBytes
from engine.memory.tensor_sizes import Sizes
from engine.model.library_layers import Storages
from engine.quant.expert_quantizer import place_experts
from engine.quant.frozen_experts import freeze_experts, frozen_experts
from engine.quant.frozen_linear import FrozenLinear
from engine.quant.int8_weight import Int8Group
from engine.shape.compute_limits import FLASH_HEAD, heads_with_stored_scores, score_cells
from engine.shape.experts_shape import SHARED, SHARED_GATE
from engine.shape.families import HalfNorms
from engine.shape.layer_plan import adapted_outside, kept_name, plan_layers
from engine.shape.mixer_shape import MIXER
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER
from tests.support.mixers import mixer_on

LLAMA = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip
GEMMA4 = {"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 64, "global_head_dim": 128,
          "layer_types": ["sliding_attention", "full_attention"] * 3}  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "one head of keys": {**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 40, "hidden_size": 328},
    "qwen2": {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 8},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 128},
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 128},
    "gemma2 with wide heads": {**LLAMA, "model_type": "gemma2", "head_dim": 256},
    "gemma3": {**LLAMA, "model_type": "gemma3_text", "head_dim": 128},
    "granite": {**LLAMA, "model_type": "granite"},
    "olmo3": {**LLAMA, "model_type": "olmo3"},
    "phi3": {**LLAMA, "model_type": "phi3"},
    "glm4": {**LLAMA, "model_type": "glm4", "head_dim": 64},
    "hyperclovax": {**LLAMA, "model_type": "hyperclovax"},
    "exaone4": {**LLAMA, "model_type": "exaone4", "head_dim": 64},
    "qwen3_5": {**LLAMA, "model_type": "qwen3_5_text", "head_dim": 128, "layer_types": ["full_attention"] * 3},
    "gemma4": {**LLAMA, **GEMMA4, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 128, "use_double_wide_mlp": True},
    "gemma4 with wide heads": {
        **LLAMA, **GEMMA4, "global_head_dim": 512, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 128},
    "gemma4 with one wide head of keys": {
        **LLAMA, **GEMMA4, "global_head_dim": 512, "num_key_value_heads": 1, "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 128},
    "gemma4 with k = v": {
        **LLAMA, **GEMMA4, "num_attention_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
}  # fmt: skip
POLICIES = tuple(policy.value for policy in LADDER)
LENGTH = 1024


class Stash(HostStash):
    """Replace the stash: copy nothing, and only count the sizes of storages."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: Storages | None = None
        self.stored = 0

    def flush(self) -> None:
        self.stored = sum(entry.num_bytes for entry in self._entries)
        super().flush()

    def _copy(self, entry: Any, out: bool) -> None:
        pass

    def _resize(self, storage: torch.UntypedStorage, size: int) -> None:
        self.storages.resize(storage, size)


class Attention(torch.autograd.Function):
    """Allocate like flash attention, without computing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device="meta")
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], device="meta"))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, logsumexp = ctx.saved_tensors
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (q, k, v))
        workspace = [torch.empty(q.shape, device="meta"), torch.empty_like(logsumexp)]
        if q.shape != k.shape:
            workspace += [torch.empty(q.shape, dtype=q.dtype, device="meta") for _ in "kv"]
        return grads


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, options: AttentionOptions, sinks: Any = None) -> Tensor:
    """Choose as engine/layers/attention.py does on CUDA."""
    if options.softcap is None and q.shape[-1] <= FLASH_HEAD:
        return Attention.apply(q, k, v)
    return attention._Tiled.apply(q, k, v, None, documents, options)


def attention_backward(dout: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Allocate like engine/kernels/attention: the gradients, and scores, or a value a token and head."""
    grads, (q, k), longest = tuple(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in given[:3]), given[:2], given[-1]
    if heads := heads_with_stored_scores(q.shape[0], longest, q.shape[1], k.shape[1], q.shape[2], q.element_size()):
        _scores = torch.empty(2, heads, score_cells(q.shape[0], longest), dtype=q.dtype, device="meta")
    else:
        _delta = torch.empty(dout.shape[:2], device="meta")
    return grads


class Loss(torch.autograd.Function):
    """Keep nothing for the backward pass, and return a new tensor as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture
def device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocate as on CUDA: the reference kernels would make more temporaries."""

    def rows(x: Tensor) -> Tensor:
        return torch.empty(x.shape[0], dtype=torch.float32, device="meta")

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    def dequantized(self: FrozenLinear, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta") if out is None else out

    def codes(num_rows: int, width: int) -> Int8Rows:
        return Int8Rows(torch.empty(num_rows, width, dtype=torch.int8, device="meta"), torch.empty(0))

    def int8_matmul(a: Int8Rows, b: Int8Rows, dtype: torch.dtype, *_: Any) -> Tensor:
        return torch.empty(len(a.codes_NK), len(b.codes_NK), dtype=dtype, device="meta")

    def dropout(x: Tensor, noise: Tensor, stream: int, in_place: bool = False) -> Tensor:
        return x if in_place else like(x)

    monkeypatch.setattr(ops, "rms_norm", lambda x, *_: (like(x), rows(x)))
    monkeypatch.setattr(ops, "add_rms_norm", lambda x, *_: (like(x), like(x), rows(x)))
    monkeypatch.setattr(ops, "rms_norm_backward", lambda dy, x, *_: like(x))
    monkeypatch.setattr(ops, "rope_", lambda *_, **__: None)
    monkeypatch.setattr(ops, "glu", lambda gate, *_: like(gate))
    monkeypatch.setattr(ops, "glu_backward_", lambda *_: None)
    monkeypatch.setattr(ops, "document_spans", lambda _, tokens, *__: torch.empty(2, tokens, dtype=torch.int32, device="meta"))
    monkeypatch.setattr(ops, "attention", lambda q, *_: (like(q), torch.empty(q.shape[1::-1], device="meta")))
    monkeypatch.setattr(ops, "attention_backward", attention_backward)
    monkeypatch.setattr(attention_half, "attend", attend)
    monkeypatch.setattr(FrozenLinear, "is_packed", property(lambda self: True))
    monkeypatch.setattr(FrozenLinear, "dequantized", dequantized)
    monkeypatch.setattr(FrozenLinear, "scaled", lambda self, _, dtype, out=None: dequantized(self, dtype, out))
    monkeypatch.setattr(ops, "dropout", dropout)
    monkeypatch.setattr(ops, "row_dots", lambda *_: None)
    monkeypatch.setattr(ops, "row_lengths", lambda _, a_RD, b_OR, *__: torch.empty(b_OR.shape[0], device="meta"))
    monkeypatch.setattr(FrozenLinear, "operand", lambda self: None)  # packed: nothing new
    monkeypatch.setattr(FrozenLinear, "nf4", property(lambda self: (self.out_features, self.in_features)))
    monkeypatch.setattr(int8_ops, "weight_scales", lambda *_: None)
    monkeypatch.setattr(int8_ops, "unpack_rows", lambda shapes, _: codes(sum(o for o, _ in shapes), shapes[0][1]))
    monkeypatch.setattr(int8_ops, "unpack_columns", lambda shapes, _: codes(shapes[0][1], sum(o for o, _ in shapes)))
    monkeypatch.setattr(int8_ops, "quantize_rows", lambda x, **_: codes(*x.shape))
    monkeypatch.setattr(int8_ops, "glu_backward_codes_", lambda dh, gate_up, _: codes(*gate_up.shape))
    monkeypatch.setattr(int8_ops, "matmul", int8_matmul)
    monkeypatch.setattr(projection, "product", lambda a, b: torch.empty(a.shape[0], b.shape[1], device="meta"))


@dataclass
class Layer:
    """Hold a decoder layer on the meta device: its call and its adapters' parameters."""

    call: Call
    adapters: list[Tensor]
    source: int | None
    inputs: Tensor


def build(config: TrainConfig, shape: ModelShape, tokens: int) -> list[Layer]:
    layers, stash = [], Stash()
    inputs = torch.empty(tokens, shape.num_layers, shape.input_width, dtype=torch.bfloat16, device="meta")
    inputs.requires_grad_(bool(adapted_outside(config, shape)))
    documents = Documents((LENGTH,) * (tokens // LENGTH), torch.empty(1))
    for i, (plan, one) in enumerate(zip(plan_layers(config, shape), shape.each)):
        mixer = one.mixer and mixer_on("meta", one.hidden_size, one.mixer, config.lora)
        spec, table = spec_of(one, one.source == i), torch.empty(tokens, one.head_dim, dtype=torch.bfloat16, device="meta")
        ours = [name for group, names in one.groups.items() if group not in (MIXER, SHARED) for name in names]
        modules = {name: _linear(*one.projections()[name], config.lora) for name in ours}
        groups = {}
        for group, names in one.groups.items():
            if group in (MIXER, SHARED):
                continue
            size = (sum(one.projections()[n][0] for n in names), one.projections()[names[0]][1])
            cached = torch.empty(size, dtype=torch.bfloat16, device="meta") if group in plan.cached else None
            if (int8 := Int8Group.of([modules[name].base for name in names], plan.matmul)) is not None:
                int8.keep(*(one for one in ("forward", "backward") if kept_name(group, one) in plan.cached))
            groups[group] = ProjectionGroup.of([modules[name] for name in names], torch.bfloat16, cached, int8)
        adapters = [] if mixer is None else mixer.adapters
        adapters += [p for module in modules.values() for p in module.parameters_of()]
        block = one.experts and ExpertsBlock(mixture(one, config.lora))
        adapters += [] if block is None else block.adapters
        call = Call(spec, plan.policy, groups, table, table, documents, stash, mixer=mixer, block=block)
        layers.append(Layer(call, adapters, one.source, inputs))
    return layers


def spec_of(shape: ModelShape, stores: bool) -> LayerSpec:
    """Return the spec of a layer, as engine/layers/layer_spec.py reads it from a loaded one."""
    family, heads = shape.layer, (shape.num_heads, shape.num_kv_heads)

    def norm(width: int) -> Norm:
        return Norm(torch.empty(width, device="meta"), 1e-5, 0.0)

    def frame(half: HalfNorms) -> dict[str, Any]:
        norms = {place: norm(shape.hidden_size) if getattr(half, place) else None for place in ("before", "after")}
        return {**norms, "multiplier": 0.5 if family.multiplier else None}

    if shape.mixer is not None:
        half = MixerSpec(**frame(family.attention), name=family.mixer)
        if shape.experts is not None:
            return LayerSpec(half, ExpertsSpec(**frame(family.mlp), name="mlp"), {})
        return LayerSpec(half, MlpSpec(**frame(family.mlp), activation="silu"), {})
    widths = {"none": None, "head": (1, 1), "whole": heads}[family.qk_norm]
    q_norm, k_norm = (None, None) if widths is None else (norm(n * shape.head_dim) for n in widths)
    q, k = (number * shape.head_dim for number in heads)
    q *= 2 if family.output_gate else 1
    made = {"own": (q, k, k), "values": (q, k, 0), "shared": (q, 0, 0)}[shape.keys]
    v_norm = norm(shape.head_dim) if family.normalises_values and made[1] else None
    scalar = torch.empty(1, device="meta", dtype=torch.bfloat16)
    tail = TailSpec(norm(shape.hidden_size) if shape.input_width else None, "silu", scalar)
    spec = AttentionSpec(
        **frame(family.attention),
        head_dim=shape.head_dim,
        features=made,
        options=AttentionOptions(softcap=50.0 if shape.attention_softcap else None),
        q_norm=q_norm,
        k_norm=k_norm if made[1] else None,
        v_norm=v_norm,
        stores=stores,
        output_gate=family.output_gate,
    )
    if shape.experts is not None:
        return LayerSpec(spec, ExpertsSpec(**frame(family.mlp), name="mlp"), {})
    return LayerSpec(spec, MlpSpec(**frame(family.mlp), activation="silu"), family.paths, tail if family.scalar else None)


def mixture(shape: ModelShape, lora: LoraConfig) -> nn.Module:
    """Return Qwen3-MoE's router and packed experts, or Qwen3.5-MoE's with its shared expert; the targeted experts are adapted."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock, Qwen3_5MoeTextConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    with torch.device("meta"):
        if shape.experts.shared:
            block = Qwen3_5MoeSparseMoeBlock(Qwen3_5MoeTextConfig(**SHARING))
        else:
            block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**MIXTURE))
        block.to(torch.bfloat16).requires_grad_(False)
        place_experts(block, double_quantization=True)
    freeze_experts(block)
    for path in [f"{SHARED}.{name}" if name != SHARED_GATE else name for name in shape.experts.groups.get(SHARED, ())]:
        linear = block.get_submodule(path)
        block.set_submodule(path, _linear(linear.out_features, linear.in_features, lora))
    for _, experts in frozen_experts(block):
        for weight in filter(lambda name: target_rule(lora.target_modules)(f"mlp.experts.{name}"), experts.shapes):
            with torch.device("cpu"):
                layer = LoraExperts(experts, weight, lora, torch.Generator().manual_seed(0), 0, lora.rank)
            for p in layer.parameters_of():
                p.grad = torch.empty_like(p)
            experts.adapters[weight] = layer
    return block


def _linear(out_features: int, in_features: int, config: LoraConfig) -> LoraLinear:
    base = FrozenLinear(nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.bfloat16))
    with torch.device("cpu"):
        lora = LoraLinear(base, config, torch.Generator().manual_seed(0))
    # FlatAdapter keeps such a copy
    lora.casts = tuple(p.detach().to(torch.bfloat16) for p in (lora.lora_a, lora.lora_b))
    lora.noise = torch.zeros(2, dtype=torch.int64)
    if config.use_dora:
        lora.gain = lora.norm = torch.empty(out_features, device="meta")
    for p in lora.parameters_of():
        p.grad = torch.empty_like(p)
    return lora.train()


def counted(layers: list[Layer], shape: ModelShape, tokens: int) -> int:
    """Return the peak bytes of forward and backward through the layers."""
    with Storages() as storages:
        for one in layers:
            storages.ignore(*one.adapters, *(p.grad for p in one.adapters if p.grad is not None), one.call.cos_TR)
            for called in filter(None, (one.call.mixer, one.call.block)):
                storages.ignore(*called.module.parameters())
            storages.ignore(one.inputs)
            groups = one.call.groups.values()
            storages.ignore(*(t for g in groups for pair in g.adapters for t in pair))
            storages.ignore(*(one.gain for g in groups for one in g.dora if one is not None))
            storages.ignore(*(g.cached for g in groups if g.cached is not None))
            storages.ignore(*(kept.codes_NK for g in groups if g.int8 for kept in g.int8.kept.values()))
        stash = layers[0].call.stash
        stash.storages = storages
        x = torch.empty(tokens, shape.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=False)
        stored: dict[int, tuple[Tensor, ...]] = {}
        for i, one in enumerate(layers):
            one.call.shared = stored[one.source] if one.call.spec.attention.reads else ()
            one.call.input_TP = one.inputs[:, i] if shape.input_width else None
            x, *stored[i] = fused.decoder_layer(x, one.call, one.adapters)
        stash.flush()
        loss = Loss.apply(x)
        del x
        stored.clear()
        ignored = [(one.call.groups, one.call.cos_TR) for one in layers]
        for one in layers:
            one.call = None  # the graph alone holds the call now, as in training
        loss.backward()
        del ignored  # until here, because a storage at the place of one that is left out would not count
        return storages.highest


def walked(config: TrainConfig, shape: ModelShape, tokens: int) -> tuple[int, int]:
    """Return the predicted peaks of device and host memory in bytes."""
    live, plans = LiveBytes(), plan_layers(config, shape)
    sizes = [Sizes.of(one, tokens, LENGTH, 2, packed=True) for one in shape.each]
    host_stack, dropout = HostStack(live), config.lora.lora_dropout > 0
    parts = zip(range(len(plans)), plans, shape.each, sizes)
    passes = [Pass(*part, attention_name(part[2], 2, "flash"), dropout, live, host_stack) for part in parts]
    live.hold("0.x", sizes[0].x)
    for one in passes:
        one.forward(trains=True)
    host_stack.flush()
    live.drop(f"{len(passes)}.x")
    live.hold("dy", sizes[0].x)
    for one in reversed(passes):
        one.backward()
    return live.highest, host_stack.highest


def config_of(policy: str, **changes: Any) -> TrainConfig:
    train = {"max_tokens": 8, "micro_batch_size": 1, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0}
    train |= changes.pop("train", {})
    return TrainConfig.model_validate({
        "model": {"path": "x"}, "data": {"train": "x", "max_seq_length": LENGTH}, "lora": {"rank": 8, **changes},
        "train": {"activation_checkpointing": policy, **train},
    })  # fmt: skip


CASES = [
    *[(family, policy, 4096, {}) for family in FAMILIES for policy in POLICIES],
    *[("llama", policy, 4096, {"lora_dropout": 0.1}) for policy in POLICIES],
    *[("llama", policy, 4096, {"rank": 64, "train": {"keep_layers": 1}}) for policy in POLICIES],
    *[(family, policy, 20480, {}) for family in ("llama", "gemma3") for policy in POLICIES],
    ("llama", "recompute", 20480, {"lora_dropout": 0.1}),
    ("llama", "offload", 4096, {"train": {"weight_cache_gib": 0.005}}),
    *[(family, "offload", tokens, {"train": {"host_layers": 3}}) for family in FAMILIES for tokens in (4096, 20480)],
    ("llama", "recompute", 4096, {"train": {"host_layers": 1, "keep_layers": 1}}),
    *[("llama", policy, 20480, {"rank": 256}) for policy in ("recompute", "selective")],  # adapters as wide as half a layer
    *[("one head of keys", policy, 4096, {"rank": 128, "lora_dropout": 0.1}) for policy in POLICIES],
]
INT8_CASES = [
    *[("llama", policy, tokens, {}) for policy in POLICIES for tokens in (4096, 20480)],
    *[(family, "recompute", tokens, {}) for family in ("gemma3", "gemma4", "phi3", "qwen3_5") for tokens in (4096, 20480)],
    *[("llama", "keep", 4096, more) for more in ({"lora_dropout": 0.1}, {"rank": 64}, {"train": {"weight_cache_gib": 0.005}})],
    *[("llama", "offload", tokens, {"train": {"host_layers": 3}}) for tokens in (4096, 20480)],
]
CASES += [
    (family, policy, tokens, {**changes, "train": {**changes.get("train", {}), "matmul": mode}})
    for mode in ("int8_backward", "int8")
    for family, policy, tokens, changes in INT8_CASES
]


@pytest.mark.parametrize(("family", "policy", "tokens", "changes"), CASES)
@pytest.mark.usefixtures("device_kernels")
def test_the_walk_counts_what_the_fused_layers_allocate(family: str, policy: str, tokens: int, changes: dict[str, Any]) -> None:
    """They agree within 0.3 %: the prediction leaves out one value per token and norm."""
    shape = ModelShape.of(FAMILIES[family], family)
    config = config_of(policy, **changes)
    layers = build(config, shape, tokens)
    stash = layers[0].call.stash
    measured = counted(layers, shape, tokens)
    predicted, on_host = walked(config, shape, tokens)
    assert math.isclose(predicted, measured, rel_tol=0.003), (predicted / 2**20, measured / 2**20)
    assert math.isclose(on_host, stash.stored, rel_tol=0.003), (on_host / 2**20, stash.stored / 2**20)


MIXTURE = {**LLAMA, "model_type": "qwen3_moe", "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 16,
           "num_experts_per_tok": 4}  # fmt: skip
SHARING = {**MIXTURE, "model_type": "qwen3_5_moe_text", "head_dim": 128, "shared_expert_intermediate_size": 256,
           "layer_types": ["full_attention"] * 3}  # fmt: skip


@pytest.mark.parametrize("content", [MIXTURE, SHARING], ids=["alone", "with a shared expert"])
@pytest.mark.parametrize(("policy", "changes"), [
    *[(policy, {}) for policy in POLICIES], ("recompute", {"rank": 64}), ("offload", {"train": {"host_layers": 2}}),
    ("recompute", {"train": {"keep_layers": 1}}), ("recompute", {"target_modules": ["all-linear", "experts.down_proj"]}),
    ("recompute", {"target_modules": ["all-linear", "experts.gate_up_proj"]}),
    ("keep", {"target_modules": ["all-linear"], "use_dora": True}),
])  # fmt: skip
@pytest.mark.usefixtures("device_kernels")
def test_the_walk_around_experts_is_an_upper_estimate(content: dict[str, Any], policy: str, changes: dict[str, Any]) -> None:
    shape = ModelShape.of(content, "mixture")
    config = config_of(policy, **{"target_modules": ["all-linear", "experts"], **changes})
    layers = build(config, shape, 4096)
    stash = layers[0].call.stash
    measured, (predicted, on_host) = counted(layers, shape, 4096), walked(config, shape, 4096)
    assert 0.997 * measured <= predicted <= 1.1 * measured, (predicted / 2**20, measured / 2**20)
    assert math.isclose(on_host, stash.stored, rel_tol=0.003)


HYBRID = {**LLAMA, "model_type": "qwen3_5_text", "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
          "linear_key_head_dim": 64, "linear_value_head_dim": 64}  # fmt: skip


@pytest.mark.parametrize(("policy", "changes"), [
    *[(policy, {}) for policy in POLICIES if policy != "selective"], ("keep", {"lora_dropout": 0.1}),
    ("recompute", {"train": {"host_layers": 2}}), ("recompute", {"target_modules": ["down_proj"]}),
    ("recompute", {"target_modules": r".*layers\.2\..*"}), ("keep", {"use_dora": True}), ("recompute", {"use_dora": True}),
    ("keep", {"use_dora": True, "lora_dropout": 0.1}),
])  # fmt: skip
@pytest.mark.usefixtures("device_kernels")
def test_the_walk_around_a_library_s_mixer_is_an_upper_estimate(policy: str, changes: dict[str, Any]) -> None:
    shape = ModelShape.of({**HYBRID, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}, "hybrid")
    config = config_of(policy, **changes)
    measured = counted(build(config, shape, 4096), shape, 4096)
    assert 0.997 * measured <= walked(config, shape, 4096)[0] <= 1.15 * measured


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "selective"])
@pytest.mark.usefixtures("device_kernels")
def test_the_walk_around_a_mixer_and_experts_is_an_upper_estimate(policy: str) -> None:
    mixed = {**HYBRID, **SHARING, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    shape = ModelShape.of(mixed, "hybrid mixture")
    config = config_of(policy, target_modules=["all-linear", "experts"])
    measured = counted(build(config, shape, 4096), shape, 4096)
    assert 0.997 * measured <= walked(config, shape, 4096)[0] <= 1.1 * measured


DORA = [
    *[(family, policy, 4096, {}) for family in ("llama", "gemma3") for policy in POLICIES],
    ("llama", "recompute", 20480, {}), ("llama", "keep", 4096, {"lora_dropout": 0.1}),
    ("llama", "recompute", 20480, {"lora_dropout": 0.1}),
    ("llama", "keep", 4096, {"train": {"weight_cache_gib": 0.005}}), ("llama", "offload", 4096, {"train": {"host_layers": 3}}),
]  # fmt: skip


@pytest.mark.usefixtures("device_kernels")
def test_the_walk_with_dora_of_wide_layers_is_what_they_allocate() -> None:
    shape = ModelShape.of({**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}, "wide")
    for policy in ("keep", "recompute"):
        config = config_of(policy, use_dora=True)
        measured = counted(build(config, shape, 2048), shape, 2048)
        assert 0.997 * measured <= walked(config, shape, 2048)[0] <= 1.01 * measured


@pytest.mark.parametrize(("family", "policy", "tokens", "changes"), DORA)
@pytest.mark.usefixtures("device_kernels")
def test_the_walk_with_dora_is_an_upper_estimate(family: str, policy: str, tokens: int, changes: dict[str, Any]) -> None:
    shape = ModelShape.of(FAMILIES[family], family)
    config = config_of(policy, use_dora=True, **changes)
    measured = counted(build(config, shape, tokens), shape, tokens)
    assert 0.997 * measured <= walked(config, shape, tokens)[0] <= 1.25 * measured


@pytest.mark.usefixtures("device_kernels")
def test_the_walk_of_another_policy_does_not_count_the_same() -> None:
    shape = ModelShape.of(LLAMA, "llama")
    sums = {policy: walked(config_of(policy), shape, 4096)[0] for policy in POLICIES}
    measured = counted(build(config_of("selective"), shape, 4096), shape, 4096)
    assert [policy for policy, size in sums.items() if math.isclose(size, measured, rel_tol=0.003)] == ["selective"]
