"""Write an adapter in one of the forms of `python -m engine.export`.

A form is written whole or not at all. Its model card states the losses on the evaluation set,
measured during the export.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.adapter.lora import attach, detach, load_adapter_state
from engine.adapter.made_start import on_original_weights
from engine.adapter.origin import read_origin
from engine.adapter.peft_files import CONFIG, PREFIX, TRAIN_CONFIG, WEIGHTS
from engine.adapter.portable import Adapter, read_adapter
from engine.config.parsing import to_json
from engine.config.trial import ModelConfig, TrainConfig
from engine.data.views import load_data
from engine.errors import InputError
from engine.evaluation.eval_loss import EvaluationSet, evaluate, evaluation_batches
from engine.export.gguf_model import write_adapter, write_model
from engine.export.gguf_settings import known_differences
from engine.export.merge import base_folder, write_merged
from engine.export.model_card import ExportFacts, Measured, class_named_in, export_card
from engine.model.base import Base
from engine.model.device import free, pick_device
from engine.model.inspect import load_tokenizer, model_config
from engine.model.load import load_base
from engine.preference.trial_pairs import judged
from engine.sample_losses import SampleLosses
from engine.sources.locate import locate
from engine.system.command_line import tell
from engine.system.files import write_folder
from engine.system.provenance import provenance

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")


def export(
    folder: Path,
    form: str,
    out: Path,
    *,
    config: TrainConfig | None = None,
    measure: bool = True,
    trust_remote_code: bool = False,
    rename_base: Callable[[str], str] = lambda base: base,
) -> Measured | None:
    """Write `folder`'s adapter in `form` to `out`, whole or not at all, and return the losses.

    config: the train config; None takes the one in or above `folder`. measure: False measures no
    loss. trust_remote_code: allow the model's own code to run. rename_base: returns the name that
    the files give to the base model, from its folder or hub id; may raise. InputError for an `out`
    that is not empty and for a model or tokenizer that the form cannot hold.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("--out", str(out), "must be a new or empty folder")
    adapter = read_adapter(folder, takes_rows=form in ("merged", "gguf-merged"))
    model, config = read_origin(folder, adapter, config=config, trust_remote_code=trust_remote_code)
    if adapter.magnitudes and form == "gguf-adapter":
        raise InputError("adapter", form, "llama.cpp loads plain LoRA alone, and this is DoRA; or: gguf-merged, merged, peft")
    name = rename_base(adapter.base)
    adapter = replace(adapter, base=name, peft_config=adapter.peft_config | {"base_model_name_or_path": name})
    # what llama.cpp does not compute is refused before any long work
    notes = known_differences(model_config(model)) if form.startswith("gguf") else ()
    results: list[Measured | None] = []

    def fill(target: Path) -> None:
        written = adapter if form == "peft" else on_original_weights(adapter, config)
        dtype = WRITERS[form](written, model, folder, target)
        merged = target / "merged" if form == "gguf-merged" else target if form == "merged" else None
        tell("measuring losses of base model and adapter")
        measured = _measure(config, adapter, merged) if measure and config else None
        results.append(measured)
        if form == "gguf-merged":
            shutil.rmtree(target / "merged")
        facts = ExportFacts(
            form, adapter.base, written.rank, written.lora_alpha, len(adapter.layers), dtype, config, measured, provenance(),
            class_named_in(adapter.peft_config), notes,
        )  # fmt: skip
        (target / "README.md").write_text(export_card(facts), encoding="utf-8")
        if config:
            (target / TRAIN_CONFIG).write_text(to_json(config) + "\n")

    write_folder(out, fill)
    return results[0]


def _write_peft(adapter: Adapter, model: ModelConfig, folder: Path, target: Path) -> None:
    state = {PREFIX + name: tensor.contiguous() for name, tensor in adapter.state().items()}
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(adapter.peft_config, indent=2, sort_keys=True) + "\n")
    _write_tokenizer(model, folder, target)


def _write_merged(adapter: Adapter, model: ModelConfig, folder: Path, target: Path) -> str:
    write_merged(adapter, base_folder(adapter, locate(model)), target, model)
    _write_tokenizer(model, folder, target)
    return json.loads((target / "config.json").read_text())["dtype"]


def _write_gguf_adapter(adapter: Adapter, model: ModelConfig, folder: Path, target: Path) -> None:
    write_adapter(adapter, model_config(model), target / "adapter.gguf")


def _write_gguf_merged(adapter: Adapter, model: ModelConfig, folder: Path, target: Path) -> str:
    (target / "merged").mkdir()
    dtype = _write_merged(adapter, model, folder, target / "merged")
    config = model_config(model) | {"dtype": dtype}
    write_model(target / "merged", config, target / "model.gguf", Path(adapter.base).name)
    return dtype


WRITERS: dict[str, Callable[[Adapter, ModelConfig, Path, Path], Any]] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "gguf-adapter": _write_gguf_adapter,
    "gguf-merged": _write_gguf_merged,
}


def _write_tokenizer(model: ModelConfig, folder: Path, target: Path) -> None:
    """Copy the tokenizer files of the adapter's folder, or else write the base model's."""
    files = [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()]
    for file in files:
        shutil.copy(file, target / file.name)
    if not (target / "tokenizer.json").is_file():
        load_tokenizer(model).save_pretrained(target)


def _measure(config: TrainConfig, adapter: Adapter, merged: Path | None) -> Measured:
    """Measure the losses with each model as it will be used.

    The base is loaded as in training, and after it the merged model, unquantised.
    """
    device = pick_device("cpu" if config.train.device == "cpu" else "auto")
    base = load_base(config.model, device)
    training, evaluation = load_data(config.data, base.tokenizer)
    samples = evaluation_batches(base, evaluation, config.data.eval_max_seq_length)
    judge = judged(config, base, evaluation)
    base_loss, adapter_loss = judge(evaluate(base, samples)).mean, judge(_adapter_losses(base, adapter, samples)).mean
    del base
    free(device)
    merged_loss = None
    if merged is not None:
        plain = config.model.model_copy(update={"path": str(merged), "revision": None, "quantization": "none"})
        merged_loss = judge(evaluate(load_base(plain, device), samples)).mean
        free(device)
    targets = samples.num_targets
    return Measured(base_loss, adapter_loss, merged_loss, targets, training.digest(), evaluation.digest())


@torch.no_grad()
def _adapter_losses(base: Base, adapter: Adapter, samples: EvaluationSet) -> SampleLosses:
    layers = attach(base.model, base.linear_names, adapter.lora_config(), seed=0)
    try:
        load_adapter_state(layers, adapter.state(), "adapter")
        return evaluate(base, samples)
    finally:
        detach(base.model, layers)
