"""Write README.md of an adapter or model: its form, its losses and how to load it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.trial import TrainConfig
from engine.errors import printable
from engine.sources.locate import known_config
from engine.sources.packed_weights import unpacking_class
from engine.system.user_path import user_path
from engine.units import perplexity

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank accepts
CAUSAL = "AutoModelForCausalLM"
SHOWN = ("git.commit", "version.torch", "version.transformers")


@dataclass(frozen=True)
class ModelCard:
    """Hold the parts of a card, in order.

    losses: pairs of a name and mean nats per target token. sections: pairs of a heading and lines. of_pairs:
    losses are means over pairs of answers, and have no perplexity.
    metrics: name, score of the base model or None, and score with the adapter.
    """

    title: str
    base: str
    library: str
    tags: list[str]
    introduction: list[str]
    losses: list[tuple[str, float]]
    notes: list[str]
    settings: list[tuple[str, str]]
    sections: list[tuple[str, list[str]]]
    metrics: list[tuple[str, float | None, float]] = field(default_factory=list)
    of_pairs: bool = False

    def text(self) -> str:
        """Return the card: front matter for the Hugging Face hub, losses, settings, sections."""
        published = [] if is_local(self.base) else [f"base_model: {json.dumps(self.base)}"]  # the hub takes ids only
        lines = ["---", *published, f"library_name: {self.library}"]
        lines += ["pipeline_tag: text-generation", f"tags: {json.dumps(self.tags)}", "---", "", f"# {self.title}", ""]
        lines += [*self.introduction, ""] if self.introduction else []
        if self.losses and self.of_pairs:
            rows = [f"| {name} | {_finite(loss, '.4f')} |" for name, loss in self.losses]
            lines += ["| | preference loss (nats/pair) |", "|---|---:|", *rows, ""]
        elif self.losses:
            lines += ["| | eval loss (nats/token) | perplexity |", "|---|---:|---:|"]
            cells = [(name, _finite(loss, ".4f"), _finite(perplexity(loss), ",.3f")) for name, loss in self.losses]
            lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
        if self.metrics:
            rows = [(name, "-" if b is None else f"{b:.4f}", f"{score:.4f}") for name, b, score in self.metrics]
            lines += [*table(("task metric", "base model", "with this adapter"), rows), ""]
        lines += [*self.notes, "", *table(("setting", "value"), self.settings), ""]
        for heading, content in self.sections:
            lines += [f"## {heading}", "", *content, ""]
        return "\n".join(lines)


def class_named_in(values: Mapping[str, Any]) -> str:
    """Return the class on which an adapter_config.json is to be loaded: the one it names, or AutoModelForCausalLM."""
    named = values.get("auto_mapping")
    name = named.get("base_model_class") if isinstance(named, dict) else None
    known = isinstance(name, str) and name.isidentifier() and named.get("parent_library") == "transformers"
    return name if known else CAUSAL


def is_local(name: str) -> bool:
    """Return whether the name of a model or data set is a path of this machine."""
    return user_path(name).is_absolute()


def public_name(name: str) -> str:
    """Return a name unchanged, but of a path of this machine only the last part."""
    return Path(name).name if is_local(name) else name


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table. Cells are escaped, so no text can break it."""
    escaped = [[printable(" ".join(cell.split())).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in escaped)]


def config_rows(config: TrainConfig, *names: str) -> list[tuple[str, str]]:
    """Return the named settings of a config as rows of a card, in the order of the names."""
    targets = config.lora.target_modules
    texts = {
        "target_modules": targets if isinstance(targets, str) else ", ".join(targets),
        "lora_dropout": f"{config.lora.lora_dropout:g}",
        "started from": f"the adapter `{public_name(config.lora.start_from or '')}`",
        "learning_rate": f"{config.optim.learning_rate:g} ({config.optim.lr_schedule})",
        "max_seq_length": str(config.data.max_seq_length),
        "max_tokens": f"{config.train.max_tokens:,}",
        "seed": str(config.train.seed),
        "training data": f"`{config.data.describe_train(public_name)}`",
    }
    return [(name, texts[name]) for name in names]


def _finite(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"


@dataclass(frozen=True)
class Measured:
    """Hold losses in mean nats per target token of the config's evaluation set.

    merged: None if the form has no merged model.
    """

    base: float
    adapter: float
    merged: float | None
    num_targets: int
    training_digest: str
    evaluation_digest: str


@dataclass(frozen=True)
class ExportFacts:
    """Hold the facts that the card of an export states.

    form: peft, merged, gguf-adapter or gguf-merged. base: folder or hub id. dtype: of merged
    weights. loader: the class of transformers that loads the base. notes: what else is to be known, one line each.
    """

    form: str
    base: str
    rank: int
    lora_alpha: float
    num_layers: int
    dtype: str | None
    config: TrainConfig | None
    measured: Measured | None
    tags: dict[str, str]
    loader: str = CAUSAL
    notes: tuple[str, ...] = ()


TITLES = {
    "peft": "LoRA adapter",
    "merged": "Base model with the adapter merged in",
    "gguf-adapter": "LoRA adapter for llama.cpp",
    "gguf-merged": "Base model with the adapter merged in, for llama.cpp",
}


def export_card(facts: ExportFacts) -> str:
    """Return the card of an exported adapter or model."""
    makers = {"peft": _peft, "merged": _merged, "gguf-adapter": _gguf_adapter, "gguf-merged": _gguf_merged}
    return ModelCard(
        title=TITLES[facts.form],
        base=facts.base,
        library={"peft": "peft", "merged": "transformers"}.get(facts.form, "llama.cpp"),
        tags=["lora", "qlora-sweep", *(["gguf"] if facts.form.startswith("gguf") else [])],
        introduction=[],
        losses=_losses(facts),
        of_pairs=facts.config is not None and facts.config.learns_pairs,
        notes=_notes(facts),
        settings=_settings(facts),
        sections=[("Load it", ["Run in this folder:", "", *makers[facts.form](facts)])],
    ).text()


def _losses(facts: ExportFacts) -> list[tuple[str, float]]:
    measured = facts.measured
    if measured is None:
        return []
    held = _held(facts)
    rows = [(f"base model ({held})", measured.base), (f"base model and adapter, as trained ({held})", measured.adapter)]
    return rows if measured.merged is None else [*rows, (f"merged model ({facts.dtype})", measured.merged)]


def _notes(facts: ExportFacts) -> list[str]:
    measured = facts.measured
    if measured is None:
        return ["No loss was measured for this export.", *facts.notes]
    lines = [f"Measured at export on {measured.num_targets:,} target tokens of the evaluation set."]
    if measured.merged is not None:
        lines.append(
            f"The adapter was added to the base model's original weights, not to those it was trained on ({_held(facts)}): "
            f"the loss changed by {measured.merged - measured.adapter:+.4f}."
        )
    if facts.form == "gguf-merged":
        lines.append("The GGUF file holds the merged model measured here; llama.cpp's own arithmetic was not measured.")
    return [*lines, *facts.notes]


def _held(facts: ExportFacts) -> str:
    return "NF4" if facts.config.model.quantization == "nf4" else "not quantised"


def _settings(facts: ExportFacts) -> list[tuple[str, str]]:
    rows = [("base model", f"`{public_name(facts.base)}`"), ("rank", str(facts.rank)), ("lora_alpha", f"{facts.lora_alpha:g}")]
    rows.append(("adapted layers", str(facts.num_layers)))
    if facts.config is not None:
        config = facts.config
        names = ("target_modules", "lora_dropout", "learning_rate", "max_seq_length", "max_tokens", "seed", "training data")
        rows += [
            ("trained on", f"`{public_name(config.model.path)}`, {config.model.quantization}"),
            ("trained with", "rsLoRA, folded in here" if config.lora.use_rslora else "plain LoRA"),
            *config_rows(config, *names, *(["started from"] if config.lora.start_from else [])),
            ("config fingerprint", f"`{config.fingerprint()}`"),
        ]
    if facts.measured is not None:
        rows.append(("digest of the training samples", f"`{facts.measured.training_digest}`"))
        rows.append(("digest of the evaluation samples", f"`{facts.measured.evaluation_digest}`"))
    return rows + [(name.removeprefix("version."), value) for name, value in sorted(facts.tags.items()) if name in SHOWN]


def _peft(facts: ExportFacts) -> list[str]:
    rank, base = next((r for r in VLLM_RANKS if r >= facts.rank), facts.rank), "BASE" if is_local(facts.base) else facts.base
    return [
        *peft_code(facts.base, facts.config, facts.loader),
        "vLLM:",
        "```",
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=.",
        "```",
        *([f"BASE: the folder of `{public_name(facts.base)}`."] if is_local(facts.base) else []),
        "llama.cpp takes the form `gguf-adapter`: `python -m engine.export . --to gguf-adapter --out DIR`.",
    ]


def peft_code(base: str, config: TrainConfig | None, loader: str = CAUSAL) -> list[str]:
    """Return code that loads the adapter of this folder on the base as in training.

    loader: as in ExportFacts. The base is 4-bit if it was in training: an adapter fits the weights it learned on.
    An FP8 or MXFP4 base is unpacked, because transformers does not quantise one to NF4.
    """
    quantized, local = config is not None and config.model.quantization == "nf4", is_local(base)
    made_by = (unpacking_class(known_config(config.model)) or "BitsAndBytesConfig") if quantized else None
    imports = ", ".join(sorted([loader, "AutoTokenizer", *([made_by] if made_by else [])]))
    peft = "PeftConfig, PeftModel" if local else "PeftModel"
    lines = ["```python", "import torch", f"from peft import {peft}", f"from transformers import {imports}", ""]
    option = "quantization_config=four_bit" if quantized else "dtype=torch.bfloat16"
    if quantized and made_by != "BitsAndBytesConfig":
        lines.append(f"unpacked = {made_by}(dequantize=True)  # to 16 bits; the adapter learned on NF4 of these weights")
        option = "quantization_config=unpacked, dtype=torch.bfloat16"
    elif quantized:
        double = config.model.double_quantization
        lines.append('four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",')
        lines.append(f"                              bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.bfloat16)")
    if local:
        lines.append(f"# the folder of {' '.join(public_name(base).split())}; on another machine, put its place there in quotes")
        lines.append('folder = PeftConfig.from_pretrained(".").base_model_name_or_path')
    return [
        *lines,
        f"base = {loader}.from_pretrained({'folder' if local else json.dumps(base)}, {option})",
        'model = PeftModel.from_pretrained(base, ".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]


def _merged(facts: ExportFacts) -> list[str]:
    return [
        "```python",
        f"from transformers import {', '.join(sorted([facts.loader, 'AutoTokenizer']))}",
        "",
        f'model = {facts.loader}.from_pretrained(".", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
        "vLLM: `vllm serve .`. PEFT is not needed any more.",
    ]


def _gguf_adapter(facts: ExportFacts) -> list[str]:
    return [
        "```",
        "llama-cli -m BASE.gguf --lora adapter.gguf",
        "```",
        f"BASE.gguf: the base model `{public_name(facts.base)}` as GGUF, in any quantisation. The losses above were",
        "measured on the base model as in training.",
    ]


def _gguf_merged(facts: ExportFacts) -> list[str]:
    return [
        "```",
        "llama-cli -m model.gguf",
        "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M    # smaller",
        "```",
    ]
