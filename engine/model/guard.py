"""Compare a model's losses and gradients with the library's own, and choose how it is computed.

`choose_route` works on a tiny model made from the checkpoint's own config, before anything is paid
for. It takes the fastest route whose losses and gradients are the library's own, sample by sample.
Samples share a row only if that changes no loss. `loaded_check.py` compares the losses again on the
real weights.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapter.lora import attach
from engine.config.lora_section import ALL_LINEAR
from engine.config.targets import EXPERTS
from engine.config.trial import LoraConfig, ModelConfig
from engine.data.packing import Sample, collate
from engine.errors import InputError, first_line
from engine.layers import attention
from engine.layers.swap import SwapReport, fuse_layers, survey
from engine.model.base import Base
from engine.model.comparison import (
    difference,
    leaked_gradient,
    library_gradients,
    library_losses,
    our_losses,
    own_attentions,
    random_samples,
    right_attentions,
    weight_gradients,
)
from engine.model.pretrained import text_attention
from engine.model.route import MADE_WITH, ModelVerdict, Route, pattern_of, routes
from engine.model.skeleton import VOCABULARY, build, layers_alike
from engine.quant.bnb import quantize_nf4
from engine.quant.frozen_experts import freeze_experts, pack_values, packable_experts
from engine.quant.frozen_linear import FrozenLinear, freeze_linears, is_known_linear

ALLOWED = 2e-3  # nats, in fp32; what is wrong differs by much more
GRADIENT_ALLOWED = 2e-2  # of the largest value in the gradient
LEAK_ALLOWED = 1e-6  # of the largest gradient in a sample's own tokens
NO_LINEAR = "must have at least one plain linear layer for the adapter"
LORA = LoraConfig(rank=2, lora_alpha=2.0)
LORA_ON_EXPERTS = LoraConfig(rank=2, lora_alpha=2.0, target_modules=(ALL_LINEAR, EXPERTS))
CPU = torch.device("cpu")
UNTRIED = Route(False, "eager", head_loss=False, shares_rows=False)  # as near to the library as it goes
Alike = dict[int, list[int]]
"""Layer of the tiny model -> those of the large one that it stands for."""
Make = Callable[[Any, str], nn.Module]
"""Makes a new model from a config and the name of an attention in transformers' registry."""


@torch.enable_grad()
def choose_route(config: Any, given: ModelConfig, make: Make, device: torch.device = CPU) -> ModelVerdict:
    """Return the verdict for a transformers config. Raises InputError if every route is wrong.

    It computes gradients, also for a caller that does not. device: where the tiny model computes.
    """
    samples = random_samples(VOCABULARY)
    try:
        library = build(config, lambda small: make(small, MADE_WITH), lambda model: library_losses(model, samples[0]))
    except Exception as error:  # what cannot be made small is checked on the real weights only
        if given.layers != "original":
            allowed = "cannot be tried on a tiny model, so nothing shows that its losses would be right"
            way_out = "model.layers=original trains it if its real weights have the losses of transformers"
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError("model.path", given.path, f"{allowed} ({why}); {way_out}") from None
        return ModelVerdict(UNTRIED, faults=(f"{type(error).__name__}: {first_line(error)}",), checked=False)
    tried = library.to(device), given, samples, layers_alike(config)
    if given.quantization == "nf4" and packable_experts(library):
        with suppress(Exception):  # what is wrong with packed experts leaves them in 16 bits, which a note says
            return _Trial(copy.deepcopy(tried[0]), *tried[1:], experts=True).verdict()
    try:
        return _Trial(*tried).verdict()
    except InputError:
        read = _read_weights(library, samples[0]) if given.quantization == "nf4" else ()
        if not read:
            raise
        return _Trial(*tried, *read).verdict()  # packed weights are no use to code that reads them


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that can be quantised and adapted, by name, without the output head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if is_known_linear(m) and m is not head}


class _Trial:
    """Try the routes on a tiny model, whose own losses and gradients are the measure."""

    def __init__(
        self, library: nn.Module, given: ModelConfig, samples: list[Sample], alike: Alike, *kept: str, experts: bool = False
    ) -> None:
        self.library, self.given, self.samples, self.alike = library, given, samples, alike
        self.linears = plain_linears(library)
        if not self.linears:
            raise InputError("model.path", given.path, NO_LINEAR)
        self.read_directly = tuple(sorted({*_read_directly(library, self.linears, samples[0]), *kept}))
        self.linears = {n: m for n, m in self.linears.items() if pattern_of(n) not in self.read_directly}
        self.packed = _quantise(self.linears) if given.quantization == "nf4" else {}
        self.experts = pack_values(library) if experts else {}
        with torch.no_grad():
            self.theirs = [library_losses(library, sample) for sample in samples]
        _require_causal(library, samples[0], self.theirs[0], given.path)

    def verdict(self) -> ModelVerdict:
        faults: list[str] = []
        for route in self._routes():
            try:
                base = self._base(route)
                alone = [our_losses(base, [sample])[0] for sample in self.samples]
                if (gap := difference(alone, self.theirs)) > ALLOWED:
                    raise _Differs(f"a loss differs by {gap:.2g} nats")
                base, row_faults = self._with_rows(base)
                dead = self._train_a_step(base)
            except Exception as error:  # model code may raise anything
                faults.append(f"{_name(route)}: {_fault(error)}")
                continue
            found = ModelVerdict(base.route, dead, self.read_directly, faults=(*faults, *row_faults), experts=bool(self.experts))
            return replace(found, measures=right_attentions(self.library, self.samples[0], self.theirs[0], ALLOWED))
        allowed = "is a model that cannot be trained here with the losses that transformers gives it"
        raise InputError("model.path", self.given.path, f"{allowed} ({'; '.join(dict.fromkeys(faults))})")

    def _routes(self) -> list[Route]:
        can_fuse = self.given.layers != "original" and bool(survey(self.library, packs_experts=bool(self.experts)).fused)
        found = routes(can_fuse, own_attentions(self.library))
        return found[:1] if self.given.layers == "strict" and can_fuse else found

    def _base(self, route: Route) -> Base:
        model = copy.deepcopy(self.library)
        attention.register()
        model.set_attn_implementation(text_attention(model.config, route.attention))
        for name, weight in self.packed.items():
            model.get_submodule(name).weight = copy.copy(weight)
        for name, experts in self.experts.items():
            model.set_submodule(name, experts.again())
        kept = [m for n, m in model.named_modules() if pattern_of(n) in self.read_directly]
        names = freeze_linears(model, skip=[model.get_output_embeddings(), *kept]) + freeze_experts(model)
        report = fuse_layers(model) if route.fused else SwapReport((), {"all": "not tried"})
        return Base(model, None, self.given, next(model.parameters()).device, torch.float32, names, report, route)

    def _with_rows(self, base: Base) -> tuple[Base, list[str]]:
        """Return the base with the rows that samples may share without changing a loss, and what was wrong with others."""
        if not base.route.shares_rows:
            return base, []
        faults: list[str] = []
        for route in (base.route, replace(base.route, boundaries=True)):
            fault = self._row_fault(replace(base, route=route))
            if fault is None:
                return replace(base, route=route), faults
            faults.append(f"told where samples begin: {fault}" if route.boundaries else fault)
        return replace(base, route=replace(base.route, shares_rows=False)), faults

    def _row_fault(self, base: Base) -> str | None:
        """Return what is wrong if the samples share a row, in either order, or None."""
        try:
            gap = 0.0
            for order in ((0, 1), (1, 0), (0,)):
                row = our_losses(base, [self.samples[i] for i in order])
                gap = max(gap, difference(row, [self.theirs[i] for i in order]))
            leak = leaked_gradient(base, self.samples)
        except Exception as error:
            return f"a shared row: {_fault(error)}"
        if gap > ALLOWED:
            return f"a shared row changes a loss by {gap:.2g} nats"
        return None if leak <= LEAK_ALLOWED else f"in a shared row a loss has a gradient in the sample before it ({leak:.2g})"

    def _train_a_step(self, base: Base) -> tuple[str, ...]:
        """Compare adapter gradients with the library's; return the layers whose adapter gets none."""
        samples = self.samples if base.route.shares_rows else self.samples[:1]
        batch = collate(samples).to(base.device)
        layers = attach(base.model, base.linear_names, LORA_ON_EXPERTS if self.experts else LORA, seed=0)
        base.model.train()
        base.loss(batch).backward()  # dropout and its like are asked for in training only
        for layer in layers.values():
            layer.lora_b.grad = None
        base.model.eval()
        base.loss(batch).backward()
        wanted = library_gradients(self.library, layers, samples)
        alive = {name for name, layer in layers.items() if _has_values(layer.lora_b.grad)}
        if not alive:
            raise _Differs("no adapter gets a gradient")
        for name in layers:
            if name not in alive and _has_values(wanted[name]):
                raise _Differs(f"{name} is computed without its adapter")
        worst = max(alive, key=lambda name: _gap(layers[name].lora_b.grad, wanted[name]))
        if (gap := _gap(layers[worst].lora_b.grad, wanted[worst])) > GRADIENT_ALLOWED:
            raise _Differs(f"the gradient of {worst} {f'differs by {gap:.0%}' if math.isfinite(gap) else 'is not finite'}")
        return _kinds_of_dead(layers, alive, self.alike)


class _Differs(Exception):
    """Say in one line what is wrong on a route."""


def _fault(error: Exception) -> str:
    return str(error) if isinstance(error, _Differs | ValueError) else f"{type(error).__name__}: {first_line(error)}"


def _name(route: Route) -> str:
    return "fused" if route.fused else replace(route, shares_rows=True).describe() or "the model's own layers"


def _require_causal(library: nn.Module, sample: Sample, losses: Tensor, path: str) -> None:
    half = len(sample.input_ids) // 2
    start = Sample(sample.input_ids[:half], sample.is_target[:half])
    with torch.no_grad():
        gap = difference([losses[: half - 1]], [library_losses(library, start)])
    if gap > ALLOWED:
        allowed = f"must be a causal language model; later tokens change earlier losses by {gap:.2g} nats"
        raise InputError("model.path", path, allowed)


@torch.no_grad()
def _quantise(linears: dict[str, nn.Linear]) -> dict[str, nn.Parameter]:
    """Give the layers the values of NF4 weights; return the packed weights by layer name."""
    packed = {}
    for name, module in linears.items():
        packed[name] = module.weight = quantize_nf4(module.weight.data.clone(), double_quantization=False)
        module.weight = nn.Parameter(FrozenLinear(module).dequantized(torch.float32), requires_grad=False)
    return packed


def _read_directly(library: nn.Module, linears: dict[str, nn.Linear], sample: Sample) -> tuple[str, ...]:
    """Return the layers that are never called, though their weight decides the loss."""
    called: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, name=n: called.add(name)) for n, m in linears.items()]
    try:
        gradients = weight_gradients(library, list(linears), [sample])
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(sorted({pattern_of(n) for n, grad in gradients.items() if n not in called and _has_values(grad)}))


class _Watched(nn.Linear):
    """Note when other code than its own reads a layer's weight."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.__dict__.get("is_computing"):
            self.__dict__["was_read"] = True
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["is_computing"] = True
        try:
            return super().forward(x)
        finally:
            self.__dict__["is_computing"] = False


def _read_weights(library: nn.Module, sample: Sample) -> tuple[str, ...]:
    """Return the layers whose weight the model's code reads, though it calls them too."""
    linears = plain_linears(library)
    for module in linears.values():
        module.__class__ = _Watched
    try:
        library.train()
        with torch.no_grad():
            library_losses(library, sample)
        return tuple(sorted({pattern_of(name) for name, module in linears.items() if module.__dict__.get("was_read")}))
    except Exception:  # training may ask for what only a real batch has
        return ()
    finally:
        library.eval()
        for module in linears.values():
            module.__class__ = nn.Linear


def _kinds_of_dead(names: Iterable[str], alive: set[str], alike: Alike) -> tuple[str, ...]:
    """Return the layers without a gradient: with `*` if all of their name are so, else each of the large model."""
    living = {pattern_of(name) for name in alive}
    found: set[str] = set()
    for name in set(names) - alive:
        if pattern_of(name) not in living:
            found.add(pattern_of(name))
        elif number := re.search(r"\.(\d+)\.", name):
            before, after = name[: number.start(1)], name[number.end(1) :]
            found |= {f"{before}{layer}{after}" for layer in alike.get(int(number[1]), [])}
    return tuple(sorted(found))


def _has_values(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad.any())


def _gap(ours: Tensor, theirs: Tensor | None) -> float:
    """Return the largest difference as a share of the largest value; infinity if one is no number."""
    gap = torch.ones(()) if theirs is None else (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    return float(gap.nan_to_num(nan=math.inf))
