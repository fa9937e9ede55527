"""Find from the headers of a folder in bitsandbytes NF4 which of its weights are packed, and how. No torch.

A packed weight is bytes, and the tensors behind its name say what they mean: a state in JSON, the
scales of its blocks, and the 16 values of the code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.sources.weight_files import FIELD, opened_files

STATE = ".quant_state.bitsandbytes__"  # behind a packed weight's name, before the kind: JSON with the shape it had
Shapes = Mapping[str, tuple[int, ...]]


def packed_shapes(folder: Path, shapes: Shapes, given: str) -> dict[str, tuple[int, ...]]:
    """Return the shape [O, D] that each packed weight had before, by its name.

    shapes: of all tensors of the folder. Raises InputError if none is packed, if one is not NF4, or
    if a part of one is not there or of another size.
    """
    found: dict[str, tuple[int, ...]] = {}
    for _, opened, names in opened_files(folder, given):
        for name in names:
            weight, mark, kind = name.partition(STATE)
            if mark and kind != "nf4":
                raise InputError(FIELD, given, f"{weight} is bitsandbytes {kind}; allowed: NF4: take the 16-bit model")
            if mark:
                found[weight] = _checked(weight, _state(opened.get_tensor(name).tobytes(), name, given), shapes, given)
    if not found:
        raise InputError(FIELD, given, "holds no packed weight, though config.json says NF4: remove its quantization_config")
    return found


def unpacked(shapes: Shapes, packed: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes with those that packed weights had before, and without what belongs to them."""
    parts = tuple(f"{name}." for name in packed)
    return {name: packed.get(name, shape) for name, shape in shapes.items() if not (parts and name.startswith(parts))}


def _state(content: bytes, name: str, given: str) -> dict[str, Any]:
    """Return shape, block size and whether scales are nested."""
    try:
        values = json.loads(content)
        shape = tuple(int(width) for width in values["shape"])
        return {"shape": shape, "block": int(values["blocksize"]), "nested": int(values.get("nested_blocksize") or 0)}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(FIELD, given, f"{name} must be JSON with the weight's shape and block size") from None


def _checked(weight: str, state: dict[str, Any], shapes: Shapes, given: str) -> tuple[int, ...]:
    """Return the shape. Raises InputError if the tensors of the weight do not fit it."""
    numel, block, nested = math.prod(state["shape"]), state["block"], state["nested"]
    if block < 8 or block & (block - 1):
        raise InputError(FIELD, given, f"{weight} has blocks of {block}; allowed: a power of two from 8 on")
    blocks = -(-numel // block)
    sizes = {weight: -(-numel // 2), f"{weight}.absmax": blocks, f"{weight}.quant_map": 16}
    if nested:
        sizes |= {f"{weight}.nested_absmax": -(-blocks // nested), f"{weight}.nested_quant_map": 256}
    for name, size in sizes.items():
        if name not in shapes:
            raise InputError(FIELD, given, f"lacks {name}, a part of a packed weight: download it again")
        if math.prod(shapes[name]) != size:
            held = math.prod(shapes[name])
            raise InputError(FIELD, given, f"{name} has {held:,} values, and its weight needs {size:,}: download it again")
    return state["shape"]
