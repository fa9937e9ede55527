"""Read what each layer has of its own in a model whose layers differ. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.shape.mixer_shape import MixerShape

GLOBAL, LINEAR = "full_attention", "linear_attention"
Keys = Literal["own", "values", "shared"]
"""What a layer does for keys: makes keys and values, makes keys that are its values too, or reads those of
an earlier layer."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer has of its own in a model whose layers differ.

    source: the layer whose keys and values it reads, itself if it stores them for others, or None.
    reads_first: True if no earlier layer reads the same.
    mixer: what it has in attention's place, or None.
    """

    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    keys: Keys
    source: int | None
    reads_first: bool
    mixer: MixerShape | None = None


class LayerSizes(Protocol):
    """The numbers of a config that hold for layers that have none of their own."""

    num_layers: int
    intermediate_size: int
    num_kv_heads: int
    head_dim: int


def gemma4_layers(values: dict[str, Any], shape: LayerSizes, number: Callable[..., int]) -> tuple[LayerShape, ...]:
    """Return what each layer of a Gemma 4 has of its own, as transformers' config class derives it.

    Global layers have wider heads. The last `num_kv_shared_layers` read keys and values of the last
    layer of their kind before them.
    """
    total, shared = shape.num_layers, values.get("num_kv_shared_layers") or 0
    kinds = list(values.get("layer_types") or [GLOBAL if (i + 1) % 6 == 0 else "sliding" for i in range(total)])[:total]
    kinds[-1:] = [GLOBAL]
    equal = bool(values.get("attention_k_eq_v"))
    overrides = {int(layer): own for layer, own in (values.get("per_layer_config") or {}).items()}
    head = number("global_head_dim", 512)
    heads = number("num_global_key_value_heads", shape.num_kv_heads) if equal else shape.num_kv_heads
    derived = {i: {"head_dim": head, "num_key_value_heads": heads} for i, kind in enumerate(kinds) if kind == GLOBAL}
    own = overrides or derived
    first, wide = total - shared, 2 if values.get("use_double_wide_mlp") else 1
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    layers = []
    for i, kind in enumerate(kinds):
        reads = i >= first
        keys: Keys = "shared" if reads else "values" if equal and kind == GLOBAL else "own"
        source = last.get(kind) if reads or (shared and last.get(kind) == i) else None
        sizes = {"head_dim": shape.head_dim, "num_key_value_heads": shape.num_kv_heads, **own.get(i, {})}
        width = shape.intermediate_size * (wide if reads else 1)
        starts = reads and kind not in kinds[first:i]
        layers.append(LayerShape(sizes["head_dim"], sizes["num_key_value_heads"], width, keys, source, starts))
    return tuple(layers)


def hybrid_layers(values: dict[str, Any], shape: LayerSizes, number: Callable[..., int]) -> tuple[LayerShape, ...]:
    """Return the layers of a Qwen3.5: three with a mixer for each one with attention, unless listed."""
    interval = number("full_attention_interval", 4)
    kinds = values.get("layer_types") or [LINEAR if (i + 1) % interval else GLOBAL for i in range(shape.num_layers)]
    mixer = MixerShape.of(number)
    sizes = shape.head_dim, shape.num_kv_heads, shape.intermediate_size
    return tuple(
        LayerShape(*sizes, "own", None, False, mixer if kind == LINEAR else None) for kind in list(kinds)[: shape.num_layers]
    )
