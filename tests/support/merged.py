"""Measure an adapter on the base that it was trained on, and the model that it is merged into."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import export_adapter
from engine.adapter.portable import read_adapter
from engine.config.trial import DataConfig, LoopConfig, LoraConfig, ModelConfig, TrainConfig
from engine.export.merge import write_merged
from engine.model import skeleton
from engine.model.comparison import difference, library_losses, our_losses, random_samples
from engine.model.load import load_base
from engine.model.pretrained import model_factory
from engine.quant.frozen_experts import frozen_experts
from engine.quant.frozen_linear import FrozenLinear
from tests.support.model_families import config_of
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU

SAMPLES = random_samples(skeleton.VOCABULARY)


def given(folder: Path) -> ModelConfig:
    """Return the config of a base whose NF4 weights, quantised again, are the same numbers."""
    return ModelConfig(path=str(folder), dtype="float32", double_quantization=False)


def save_base(model_type: str, folder: Path) -> Path:
    """Save a small model whose weights NF4 holds exactly, in 32 bits, with a tokenizer."""
    config = config_of(model_type)
    factory = model_factory(config)
    library = skeleton.build(
        config, lambda small: factory.from_config(small, attn_implementation="eager"), lambda m: library_losses(m, SAMPLES[0])
    )
    for place in (folder / "first", folder / "base"):
        library.save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        if place.name == "first":
            _take_over(library, place)
    return folder / "base"


@torch.no_grad()
def _take_over(library: torch.nn.Module, folder: Path) -> None:
    """Give a library's model the values that its weights have in NF4."""
    base = load_base(given(folder), CPU)
    for name, module in base.model.named_modules():
        if isinstance(module, FrozenLinear) and module.is_packed:
            library.get_submodule(name).weight.copy_(module.dequantized(torch.float32))
    for name, module in frozen_experts(base.model):
        for weight, (number, *_) in module.shapes.items():
            rows = [module.dequantized(weight, i, torch.float32) for i in range(number)]
            library.get_parameter(f"{name}.{weight}").copy_(torch.stack(rows))


def merged_difference(folder: Path, lora: LoraConfig, out: Path, std: float = 0.2) -> tuple[float, float]:
    """Write a random adapter on `folder` and the merged model to `out`.

    Return by how many nats transformers' losses of the merged model differ from ours of base and adapter, and ours
    without the adapter from ours with it.
    """
    config = TrainConfig(model=given(folder), data=DataConfig(train="none"), lora=lora, train=LoopConfig(max_tokens=100))
    base = load_base(config.model, CPU)
    before = our_losses(base, SAMPLES)
    layers = attach(base.model, base.linear_names, lora, seed=0)
    torch.manual_seed(1)
    for layer in layers.values():
        layer.lora_b.data.normal_(std=std)
    ours = our_losses(base, SAMPLES)
    export_adapter(out / "adapter", config, layers, base.model, base.tokenizer)
    detach(base.model, layers)
    (out / "merged").mkdir()
    write_merged(read_adapter(out / "adapter"), folder, out / "merged", config.model)
    merged = model_factory(base.model.config).from_pretrained(out / "merged", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = [library_losses(merged.eval(), sample) for sample in SAMPLES]
    return difference(ours, theirs), difference(ours, before)
