"""Count the bytes that are alive during a computation, by component, and their peak. No torch.

`HostStack` does to them what `HostStash` (engine/layers/host_stash.py) does to tensors. `Sizes` are
the bytes of one layer's tensors.

Shape letters: T tokens, D hidden, F MLP hidden, H query heads, G key/value heads, K head dim, L
tokens of one sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from engine.planning.compute_limits import HOST_IN_FLIGHT, HOST_LAG, MLP_TILE_TOKENS
from engine.planning.families import Family
from engine.planning.layer_plan import LayerPlan, group_parameters
from engine.planning.model_shape import ModelShape

KEPT, TRANSIENT, WEIGHTS, ATTENTION, BOUNDARY, LOW = (
    "kept activations", "transients", "dequantised weights", "attention workspace", "layer boundaries", "low-rank hidden",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The bytes of one layer's tensors: x [T, D], q [T, H, K], k [T, G, K], f [T, F], low [T, 1], p [T, P].

    qkv is what the layer projects of queries, keys and values. inputs are the p of all layers.

    heads [T, H] is fp32. scores [H, T, L] and one sample's [H, L, L] count one byte a value.
    weights maps each group to its dequantised weights, 0 if not packed. tile is for one tile of the
    MLP.
    """

    x: int
    q: int
    k: int
    qkv: int
    f: int
    p: int
    inputs: int
    low: int
    heads: int
    scores: int
    sample_scores: int
    weights: dict[str, int]
    packed: bool
    element: int
    tile: Sizes | None = None

    @classmethod
    def of(cls, shape: ModelShape, tokens: int, sample_tokens: int, element: int, packed: bool) -> Sizes:
        """Return the sizes for `tokens` in samples of `sample_tokens`, `element` bytes a value."""
        length = min(tokens, sample_tokens)
        return cls(
            x=element * tokens * shape.hidden_size,
            q=element * tokens * shape.num_heads * shape.head_dim,
            k=element * tokens * shape.num_kv_heads * shape.head_dim,
            qkv=element * tokens * sum(shape.projections()[name][0] for name in shape.groups["qkv"]),
            f=element * tokens * shape.intermediate_size,
            p=element * tokens * shape.input_width,
            inputs=element * tokens * shape.input_width * shape.num_layers,
            low=element * tokens,
            heads=4 * tokens * shape.num_heads,
            scores=shape.num_heads * tokens * length,
            sample_scores=shape.num_heads * length * length,
            weights={group: packed * element * number for group, number in group_parameters(shape).items()},
            packed=packed,
            element=element,
            tile=cls.of(shape, MLP_TILE_TOKENS, sample_tokens, element, packed) if tokens > MLP_TILE_TOKENS else None,
        )

    @property
    def eager_graph(self) -> int:
        """Return the bytes that autograd keeps of eager attention.

        They are tanh and softmax in fp32, the rounded weights, and keys and values repeated for all
        heads.
        """
        return (8 + self.element) * self.scores + self._repeated

    @property
    def eager_workspace(self) -> int:
        """Return the bytes of a sample's gradients of scores, and of those of q and the repeated k and v."""
        return 12 * self.sample_scores + 6 * self.q

    @property
    def flash_workspace(self) -> int:
        """Return the workspace of attention's backward pass: flash, cuDNN or memory-efficient.

        It is dq in fp32, dk and dv of each query head, and dout * out summed over K.
        """
        return 4 * self.q // self.element + self._repeated + self.heads

    def unfused_graph(self, layer: Family, eager_scores: int, dropout: bool) -> int:
        """Return the bytes that autograd keeps of one of transformers' own layers, without its input.

        They are fp32 copies in the norms and inputs of adapted matmuls. Attention adds its queries,
        keys, values and output; the MLP adds gate, its activation, up and their product. Dropout
        adds each projection's masked input and mask.
        """
        norms = (layer.attention.number + layer.mlp.number) * self.x + (self.q + self.k if layer.qk_norm != "none" else 0)
        kept = 4 * norms // self.element + 2 * self.x + self.qkv + self.q + self.heads + 4 * self.f + 10 * eager_scores
        return kept + (3 * (5 * self.x + self.q + self.f) // 2 if dropout else 0)

    @property
    def _repeated(self) -> int:
        return 2 * self.q if self.q != self.k else 0


@dataclass
class LiveBytes:
    """The tensors that are alive, their sum by component, and the peaks.

    `peaks` holds the highest sum of each phase. `highest`, `highest_phase` and `highest_components`
    describe the highest of all.
    """

    alive: dict[str, tuple[str, int]] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: int = 0
    phase: str = ""
    peaks: dict[str, int] = field(default_factory=dict)
    highest: int = -1
    highest_phase: str = ""
    highest_components: dict[str, int] = field(default_factory=dict)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self._note()

    def hold(self, name: str, size: int, component: str = TRANSIENT) -> None:
        """Make a tensor; free one of the same name only after that."""
        self._add(component, size)
        self.drop(name)
        self.alive[name] = (component, size)

    def drop(self, *names: str) -> None:
        """Free tensors; ignore names that are not alive."""
        for name in names:
            component, size = self.alive.pop(name, ("", 0))
            self.components[component] -= size
            self.total -= size

    def rename(self, old: str, new: str) -> None:
        """Free the tensor `new`, and give its name to `old`."""
        self.drop(new)
        if old in self.alive:
            self.alive[new] = self.alive.pop(old)

    @contextmanager
    def holding(self, size: int, component: str = TRANSIENT) -> Iterator[None]:
        """Keep an unnamed tensor alive for the length of the block."""
        self._add(component, size)
        yield
        self.components[component] -= size
        self.total -= size

    def briefly(self, size: int, component: str = TRANSIENT) -> None:
        with self.holding(size, component):
            pass

    def _add(self, component: str, size: int) -> None:
        self.components[component] += size
        self.total += size
        self._note()

    def _note(self) -> None:
        if self.total > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.total
            if self.total > self.highest:
                self.highest, self.highest_phase = self.total, self.phase
                self.highest_components = dict(self.components)


@dataclass
class _Held:
    names: list[str]
    sizes: dict[str, tuple[str, int]] = field(default_factory=dict)
    age: int = 0
    is_here: bool = True


@dataclass
class HostStack:
    """The tensors that layers store on the host, as a stack.

    `num_bytes` are on the host now; `highest` is the most so far.
    """

    live: LiveBytes
    entries: list[_Held] = field(default_factory=list)
    num_bytes: int = 0
    highest: int = 0

    def push(self, names: list[str]) -> None:
        entry = _Held(names, {name: self.live.alive[name] for name in names})
        self.entries.append(entry)
        self.num_bytes += _bytes(entry)
        self.highest = max(self.highest, self.num_bytes)

    def advance(self) -> None:
        """Note that a layer has run, and release device memory as `HostStash.advance` does."""
        leaving = [entry for entry in self.entries if entry.is_here]
        in_flight = sum(map(_bytes, leaving))
        for entry in leaving:
            entry.age += 1
            if entry.age >= HOST_LAG or in_flight > HOST_IN_FLIGHT:
                self._let_go(entry)
                in_flight -= _bytes(entry)

    def flush(self) -> None:
        """Release the device memory of all entries: the forward pass is over."""
        for entry in self.entries:
            if entry.is_here:
                self._let_go(entry)

    def pop(self) -> None:
        """Bring back the last entry, and start to fetch the one before it."""
        entry = self.entries.pop()
        self._fetch(entry)
        self.num_bytes -= _bytes(entry)
        if self.entries:
            self._fetch(self.entries[-1])

    def _let_go(self, entry: _Held) -> None:
        self.live.drop(*entry.names)
        entry.is_here = False

    def _fetch(self, entry: _Held) -> None:
        if not entry.is_here:
            entry.is_here = True
            for name, (component, size) in entry.sizes.items():
                self.live.hold(name, size, component)


def _bytes(entry: _Held) -> int:
    return sum(size for _, size in entry.sizes.values())


AttentionName = Literal["flash", "cudnn", "eager"]


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
        with self.live.holding(self._weights(group), WEIGHTS):
            self.live.hold(output, output_size, component)

    def _low(self, group: str, input_size: int) -> None:
        name, rank = self._own(f"low.{group}"), self.plan.ranks[group]
        if rank and name not in self.live.alive:
            self._dropped(group, input_size)
            self.live.hold(name, rank * self.sizes.low, LOW)

    def _dropped(self, group: str, input_size: int) -> None:
        """Make the dropout mask and the masked input for a moment."""
        if self.dropout and self.plan.ranks[group]:
            self.live.briefly(2 * input_size)

    def _weights(self, group: str) -> int:
        return 0 if group in self.plan.cached else self.sizes.weights[group]

    def _group_backward(self, group: str, input_size: int, dx: str, weights_are_there: bool = False) -> None:
        with self.live.holding(self.plan.ranks[group] * self.sizes.low):
            self._dropped(group, input_size)
            self.live.hold(f"grads.{group}", 4 * self.plan.adapter[group])
            with self.live.holding(0 if weights_are_there else self._weights(group), WEIGHTS):
                self.live.hold(dx, input_size)
            self._dropped(group, input_size)
