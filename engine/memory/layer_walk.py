"""Hold what all parts of a walk through one fused decoder layer need: names and projections. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.memory.live_bytes import LOW, TRANSIENT, WEIGHTS, HostStack, LiveBytes
from engine.memory.tensor_sizes import Sizes
from engine.shape.compute_limits import FLASH_HEAD, MAGNITUDE_ROWS
from engine.shape.families import HalfNorms
from engine.shape.layer_plan import LayerPlan, kept_name
from engine.shape.model_shape import ModelShape

HalfName = Literal["attention", "mlp"]
AttentionName = Literal["flash", "cudnn", "tiled", "eager"]
"""flash and cudnn are torch's; tiled are our kernels, and eager is plain matrix operations."""


def attention_name(shape: ModelShape, element: int, preferred: AttentionName) -> AttentionName:
    """Return what computes a layer's attention; `element` are the bytes of a value."""
    if element == 2 and (shape.attention_softcap or shape.head_dim > FLASH_HEAD):
        return "tiled"
    return "eager" if shape.attention_softcap else preferred


@dataclass(frozen=True)
class LayerWalk:
    """What all parts of a walk through layer `i` need: its tensors' names, and its projections."""

    i: int
    plan: LayerPlan
    shape: ModelShape
    sizes: Sizes
    attention: AttentionName
    dropout: bool
    live: LiveBytes
    host_stack: HostStack

    def _names(self) -> list[str]:
        """Return the names of the layer's tensors that are alive."""
        prefix = self._own("")
        return [name for name in self.live.alive if name.startswith(prefix)]

    def _own(self, tensor: str) -> str:
        return f"{self.i}.{tensor}"

    def _project(self, group: str, input_size: int, output: str, output_size: int, component: str = TRANSIENT) -> None:
        self._low(group, input_size)
        with self.live.holding(self._forward_needs(group, input_size), WEIGHTS):
            self.live.hold(output, output_size, component)

    def _low(self, group: str, input_size: int) -> None:
        name, rank = self._own(f"low.{group}"), self.plan.ranks[group]
        if rank and name not in self.live.alive:
            self._dropped(group, input_size)
            self.live.hold(name, rank * self.sizes.low, LOW)

    def _dropped(self, group: str, input_size: int) -> None:
        """Make the masked input for a moment."""
        self.live.briefly(self._masked(group, input_size))

    def _masked(self, group: str, input_size: int) -> int:
        """Return the bytes of the masked input: 0 without dropout or adapters."""
        return input_size if self.dropout and self.plan.ranks[group] else 0

    def _adapter_gradients(self, group: str, input_size: int) -> None:
        """Make the gradients of a group's adapters, beside its masked input."""
        with self.live.holding(self._masked(group, input_size)):
            self._along_weights(group)
            self.live.hold(f"grads.{group}", 4 * self.plan.adapter[group])

    def _weights(self, group: str) -> int:
        """Return the bytes of dequantised weights. DoRA makes its own, under dropout beside them."""
        size = self.sizes.weights[group]
        if self.plan.has_gains(group):
            return self._parameter_bytes(group) + (size if self.dropout and group not in self.plan.cached else 0)
        return 0 if group in self.plan.cached else size

    def _parameter_bytes(self, group: str) -> int:
        return self.sizes.element * self.shape.weights_of_groups[group]

    def _along_weights(self, group: str) -> None:
        """Walk DoRA's gradient of the magnitudes: beside the gradient of A, a block of a weight's own gradient in fp32.

        A kernel multiplies it by the packed weight. Then B is multiplied by its gradient.
        """
        if self.plan.has_gains(group):
            features = [self.shape.projections()[name] for name in self.shape.groups[group]]
            most, width = max(out for out, _ in features), features[0][1]
            with self.live.holding(4 * self.plan.ranks[group] * width):
                self.live.briefly(4 * min(MAGNITUDE_ROWS, most) * width)
                self.live.briefly(2 * 4 * most * self.plan.ranks[group])

    def _forward_needs(self, group: str, input_size: int) -> int:
        """Return the bytes that x W^T needs for a moment: dequantised weights, or the codes of both operands."""
        is_int8 = self.plan.matmul.is_int8_forward
        return self._codes(group, "forward", input_size) if is_int8 else self._weights(group)

    def _backward_needs(self, group: str, output_size: int) -> int:
        """Return the bytes that dy W needs for a moment."""
        is_int8 = self.plan.matmul.is_int8_backward
        return self._codes(group, "backward", output_size) if is_int8 else self._weights(group)

    def _codes(self, group: str, direction: str, rows_size: int = 0) -> int:
        """Return the bytes of INT8 codes: of the weights, unless they are kept, and of a tensor of `rows_size` bytes."""
        weights = 0 if kept_name(group, direction) in self.plan.cached else self.sizes.weights[group]
        return (weights + rows_size) // self.sizes.element

    def _group_backward(
        self, group: str, input_size: int, output_size: int, dx: str, weights_are_there: bool = False
    ) -> None:
        with self.live.holding(self.plan.ranks[group] * self.sizes.low):
            self._adapter_gradients(group, input_size)
            with self.live.holding(0 if weights_are_there else self._backward_needs(group, output_size), WEIGHTS):
                self.live.hold(dx, input_size)
            self._dropped(group, input_size)

    def _normed(self, half: HalfName) -> int:
        """Return the bytes of a half's normalised input: 0 if no norm stands before the half."""
        return self.sizes.x if self._norms(half).before else 0

    def _norms(self, half: HalfName) -> HalfNorms:
        return self.shape.layer.attention if half == "attention" else self.shape.layer.mlp

    def _hold_branch_gradient(self, name: str, half: HalfName) -> None:
        """Make the gradient of what norm and multiplier after a half received, if there is one."""
        if self._norms(half).after or self.shape.layer.multiplier:
            self.live.hold(name, self.sizes.x)

    def _hold_input_gradient(self, name: str, half: HalfName) -> None:
        """Make the gradient of a half's input; without a norm before it, in place of `dnormed`."""
        if self._norms(half).before:
            self.live.hold(name, self.sizes.x)
        else:
            self.live.rename("dnormed", name)
