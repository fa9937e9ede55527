"""Compute the losses of short samples by the library alone and by a Base, token by token, and the library's gradients.

Shape letters: L tokens of one sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.adapter.lora import AnyLora
from engine.config.targets import is_expert
from engine.data.packing import Sample, collate
from engine.model.base import Base
from engine.model.pretrained import text_attention
from engine.model.route import MADE_WITH, OWN_ATTENTIONS

LENGTHS = (41, 22)
"""Tokens of the two samples. A tiny model's windows and positions are shorter than the first or the row of both."""
EXACT_LENGTHS = (24, 13)
"""In fp32 on real weights. There a fault is far above rounding at each token, so that fewer show it, and cost half."""
TEXT = (
    "The water of a river is never the same for two moments, and yet people call it by one name for a thousand years. "
    "In the morning the boats go down with flour and stone; in the evening they come back with salt, cloth and letters. "
    "A child who grew up beside it can tell the hour by the sound that it makes under the second bridge."
)


def random_samples(vocab_size: int, seed: int = 0, lengths: tuple[int, int] = LENGTHS) -> list[Sample]:
    """Return two samples of random tokens; every token but the first is a target."""
    random = np.random.default_rng(seed)
    lowest = min(8, vocab_size // 2)  # the first ids are often special
    return [as_sample(random.integers(lowest, vocab_size - 2, size=length)) for length in lengths]


def as_sample(input_ids: np.ndarray) -> Sample:
    """Return a sample whose every token is a target."""
    return Sample(input_ids.astype(np.int32), np.ones(len(input_ids), dtype=bool))


def library_losses(model: nn.Module, sample: Sample) -> Tensor:
    """Return the losses [L - 1] that the model's own forward pass gives for the sample alone."""
    ids_1L = torch.from_numpy(sample.input_ids.astype(np.int64)).unsqueeze(0).to(next(model.parameters()).device)
    logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits_LV, ids_1L[0, 1:], reduction="none")


def own_attentions(model: nn.Module) -> list[str]:
    """Return the library's attentions that the model supports, the faster one first."""
    return list(OWN_ATTENTIONS) if getattr(model, "_supports_sdpa", False) else [MADE_WITH]


@torch.no_grad()
def right_attentions(library: nn.Module, sample: Sample, losses: Tensor, allowed: float) -> tuple[str, ...]:
    """Return the library's attentions whose losses are right: those that MADE_WITH gives. The model keeps MADE_WITH.

    losses: of the sample with MADE_WITH. allowed: the largest difference in nats. For some families one of them ignores a mask.
    """
    found = []
    for name in own_attentions(library):
        try:
            library.set_attn_implementation(text_attention(library.config, name))
            is_right = name == MADE_WITH or difference([library_losses(library, sample)], [losses]) <= allowed
        except Exception:  # model code may raise anything
            is_right = False
        found += [name] * is_right
    library.set_attn_implementation(text_attention(library.config, MADE_WITH))
    return tuple(found)


def library_gradients(library: nn.Module, layers: dict[str, AnyLora], samples: list[Sample]) -> dict[str, Tensor | None]:
    """Return d loss / d B of each adapter from the weight gradients of the library's own model."""
    found = weight_gradients(library, list(layers), samples)
    return {n: None if g is None else layers[n].gradient_of_b(g) for n, g in found.items()}


def weight_gradients(library: nn.Module, names: list[str], samples: list[Sample]) -> dict[str, Tensor | None]:
    """Return the gradient of the summed losses by each layer's whole weight, None where there is none."""
    paths = {name: name if is_expert(name) else f"{name}.weight" for name in names}
    weights = {name: library.get_parameter(path).requires_grad_(True) for name, path in paths.items()}
    try:
        loss = torch.stack([library_losses(library, sample).sum() for sample in samples]).sum()
        if loss.requires_grad:
            loss.backward()
        return {name: weight.grad for name, weight in weights.items()}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False).grad = None


def our_losses(base: Base, samples: list[Sample]) -> list[Tensor]:
    """Return each sample's losses [L - 1] if all of them stand in one row."""
    batch = collate(samples).to(base.device)
    losses = base.token_losses(batch)
    ends = np.cumsum([len(s.input_ids) for s in samples])
    return [losses[end - len(s.input_ids) : end - 1] for s, end in zip(samples, ends)]


def leaked_gradient(base: Base, samples: list[Sample]) -> float:
    """Return how much the last sample's loss depends on the samples before it in one row.

    It is the largest gradient in the embeddings of the others, as a share of the largest in its own.
    A state that decays fast leaks less loss than gradient.
    """
    found: list[Tensor] = []
    embeddings = base.model.get_input_embeddings()

    def leaf(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        found.append(out.detach().requires_grad_())
        return found[-1].clone()

    hook = embeddings.register_forward_hook(leaf)
    others = [Sample(s.input_ids, np.zeros_like(s.is_target)) for s in samples[:-1]]
    try:
        with torch.enable_grad():
            loss = base.loss(collate([*others, samples[-1]]).to(base.device))
    finally:
        hook.remove()
    grad_TD = torch.autograd.grad(loss, found[0])[0].squeeze(0).abs().flatten(1)
    own = len(samples[-1].input_ids)
    return float(grad_TD[:-own].max() / grad_TD[-own:].max().clamp_min(1e-30))


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of a loss in nats; infinity if one is not finite."""
    return float(_gaps(ours, theirs).max())


def mean_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the mean absolute difference of the losses in nats; infinity if one is not finite."""
    return float(_gaps(ours, theirs).mean())


def _gaps(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Return |ours - theirs| token by token, infinity where one is not finite."""
    gaps = (torch.cat(ours).float() - torch.cat(theirs).float()).abs()
    return gaps.nan_to_num(nan=math.inf, posinf=math.inf)


def num_tokens(model: nn.Module) -> int:
    """Return how many tokens have a row in the input embedding and in the head. Some models read images' tokens only."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(table.weight.shape[0] for table in tables if table is not None)


def text_samples(tokenizer: Any, vocab_size: int, lengths: tuple[int, int] = LENGTHS) -> list[Sample]:
    """Return two samples of plain text, or random ones if the tokenizer makes too few tokens of it."""
    ids = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    if len(ids) < sum(lengths) or ids.max() >= vocab_size:
        return random_samples(vocab_size, lengths=lengths)
    return [as_sample(ids[: lengths[0]]), as_sample(ids[lengths[0] : sum(lengths)])]
