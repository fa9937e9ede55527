"""Walk through decoder layers that are alike only once. No torch.

A layer's walk depends on its plan, its sizes and the tensors that it finds. If an earlier layer began
with the same, its effect is applied again: how far the bytes rise, what is alive afterwards. A search
for a plan predicts the memory of a hundred candidates, and most of their layers are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace

from engine.memory.layer_memory import Pass
from engine.memory.live_bytes import HostStack, LiveBytes
from engine.shape.layer_plan import LayerPlan

Tensors = dict[str, tuple[str, int]]  # name -> component, bytes
Step = Callable[[Pass], None]


@dataclass(frozen=True)
class _Effect:
    """The effect of one layer's walk, relative to the bytes that were alive before it.

    rise: of the highest sum; at_peak: by component, when it was reached. change: by component, at the
    end. own, common: the layer's tensors, without its number, and those of no layer. following: the next
    layer's x, if it was made.
    """

    rise: int
    at_peak: dict[str, int]
    change: dict[str, int]
    own: Tensors
    common: Tensors
    following: tuple[str, int] | None


class RepeatedLayers:
    """The walks through the layers of one pass over a model.

    The tensors of a layer that stores none on the host are not in `live.alive` until its backward pass,
    which keeps that short; the sums hold them all the time.
    """

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self._effects: dict[Hashable, _Effect] = {}
        self._own: dict[int, Tensors] = {}
        self._plans: dict[int, Hashable] = {}

    def has_input(self, number: int) -> bool:
        """Return True if a layer's x is alive."""
        return f"{number}.x" in self.live.alive or "x" in self._own.get(number, ())

    def forward(self, layer: Pass, trains: bool) -> None:
        self._walk(("forward", trains), layer, lambda one: one.on_device(trains))
        if trains:
            layer.to_host()

    def backward(self, layer: Pass) -> None:
        layer.from_host()
        self._walk(("backward",), layer, Pass.on_device_backward)

    def _walk(self, kind: tuple[Hashable, ...], layer: Pass, step: Step) -> None:
        own, common = self._tensors(layer)
        if layer.shape.source is None:  # keys that layers share have the layers' numbers in their names
            key = (*kind, self._facts(layer), *own.items(), None, *common.items())
            if key not in self._effects:
                self._effects[key] = _effect(layer, own, common, step)
            effect = self._effects[key]
        else:
            effect = _effect(layer, own, common, step)
        self._apply(layer, effect)

    def _tensors(self, layer: Pass) -> tuple[Tensors, Tensors]:
        """Take the tensors of the layer, without its number, and those of no layer, out of `live.alive`."""
        prefix, own, common = f"{layer.i}.", self._own.pop(layer.i, {}), {}
        for name in list(self.live.alive):
            if name.startswith(prefix):
                own[name[len(prefix) :]] = self.live.alive.pop(name)
            elif not name[0].isdigit():
                common[name] = self.live.alive.pop(name)
        return own, common

    def _apply(self, layer: Pass, effect: _Effect) -> None:
        live = self.live
        live.rise(effect.rise, effect.at_peak)
        live.change(effect.change)
        live.alive.update(effect.common)
        if effect.following is not None:
            live.alive[f"{layer.i + 1}.x"] = effect.following
        if layer.plan.policy.is_on_host:
            live.alive.update({f"{layer.i}.{name}": tensor for name, tensor in effect.own.items()})
        else:
            self._own[layer.i] = dict(effect.own)

    def _facts(self, layer: Pass) -> Hashable:
        """Return what the walk reads of the layer. Layers of one shape share their sizes."""
        if layer.i not in self._plans:
            self._plans[layer.i] = _content(layer.plan)
        return self._plans[layer.i], id(layer.sizes), layer.attention, layer.dropout


class EachLayer:
    """The walks through the layers of one pass, each layer by itself: what places tensors must see them all."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live

    def has_input(self, number: int) -> bool:
        """Return True if a layer's x is alive."""
        return f"{number}.x" in self.live.alive

    def forward(self, layer: Pass, trains: bool) -> None:
        layer.forward(trains)

    def backward(self, layer: Pass) -> None:
        layer.backward()


def _content(plan: LayerPlan) -> Hashable:
    values = (getattr(plan, one.name) for one in fields(plan))
    return tuple(tuple(value.items()) if isinstance(value, dict) else value for value in values)


def _effect(layer: Pass, own: Tensors, common: Tensors, step: Step) -> _Effect:
    """Walk through the layer alone, with sums that begin at 0."""
    prefix, following = f"{layer.i}.", f"{layer.i + 1}.x"
    live = LiveBytes({**{prefix + name: tensor for name, tensor in own.items()}, **common}, peaks={"": 0}, highest=0)
    step(replace(layer, live=live, host_stack=HostStack(live)))
    after = live.alive.pop(following, None)
    left = {name[len(prefix) :]: tensor for name, tensor in live.alive.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in live.alive.items() if not name.startswith(prefix)}
    return _Effect(live.highest, live.highest_components, dict(live.components), left, others, after)
