"""README.md of an exported adapter or model: what it is, what was measured, how to load it. Plain data in, text out."""

from __future__ import annotations

import json
from dataclasses import dataclass

from engine.config.trial import TrainConfig
from engine.units import perplexity

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Measured:
    """Mean nats per target token of the config's evaluation set. merged: None where no merged model was made."""

    base: float
    adapter: float
    merged: float | None
    num_targets: int
    training_digest: str
    evaluation_digest: str


@dataclass(frozen=True)
class CardFacts:
    """form: peft, merged, gguf-adapter or gguf-merged; base: folder or hub id; dtype: of merged weights."""

    form: str
    base: str
    rank: int
    lora_alpha: float
    num_layers: int
    dtype: str | None
    config: TrainConfig | None
    measured: Measured | None
    tags: dict[str, str]


TITLES = {
    "peft": "LoRA adapter",
    "merged": "Base model with the adapter merged in",
    "gguf-adapter": "LoRA adapter for llama.cpp",
    "gguf-merged": "Base model with the adapter merged in, for llama.cpp",
}


def model_card(card: CardFacts) -> str:
    """The whole text."""
    return "\n".join([*_front_matter(card), f"# {TITLES[card.form]}", "", *_losses(card), *_settings(card), *_loading(card)])


def _front_matter(card: CardFacts) -> list[str]:
    library = {"peft": "peft", "merged": "transformers"}.get(card.form, "llama.cpp")
    tags = json.dumps(["lora", "qlora-sweep", *(["gguf"] if card.form.startswith("gguf") else [])])
    lines = ["---", f"base_model: {json.dumps(card.base)}", f"library_name: {library}", "pipeline_tag: text-generation"]
    return [*lines, f"tags: {tags}", "---", ""]


def _losses(card: CardFacts) -> list[str]:
    measured = card.measured
    if measured is None:
        return ["No loss was measured for this export.", ""]
    held = "NF4" if card.config.model.quantization == "nf4" else "not quantised"
    rows = [(f"base model ({held})", measured.base), (f"base model and adapter, as trained ({held})", measured.adapter)]
    if measured.merged is not None:
        rows.append((f"merged model ({card.dtype})", measured.merged))
    lines = ["| | eval loss (nats/token) | perplexity |", "|---|---:|---:|"]
    lines += [f"| {name} | {loss:.4f} | {perplexity(loss):,.3f} |" for name, loss in rows]
    lines += ["", f"Measured at export on {measured.num_targets:,} target tokens of the evaluation set."]
    if measured.merged is not None:
        lines.append(
            f"The adapter was added to the base model's original weights, not to those it was trained on ({held}): "
            f"the loss changed by {measured.merged - measured.adapter:+.4f}."
        )
    if card.form == "gguf-merged":
        lines.append("The GGUF file holds the weights of the merged model measured here; llama.cpp's own arithmetic was not.")
    return [*lines, ""]


def _settings(card: CardFacts) -> list[str]:
    rows = [("base model", f"`{card.base}`"), ("rank", str(card.rank)), ("lora_alpha", f"{card.lora_alpha:g}")]
    rows.append(("adapted layers", str(card.num_layers)))
    if card.config is not None:
        config = card.config
        targets = config.lora.target_modules
        rows += [
            ("trained on", f"`{config.model.path}`, {config.model.quantization}"),
            ("trained with", "rsLoRA, folded in here" if config.lora.use_rslora else "plain LoRA"),
            ("target_modules", targets if isinstance(targets, str) else ", ".join(targets)),
            ("lora_dropout", f"{config.lora.lora_dropout:g}"),
            ("learning_rate", f"{config.optim.learning_rate:g} ({config.optim.lr_schedule})"),
            ("max_seq_length", str(config.data.max_seq_length)),
            ("max_tokens", f"{config.train.max_tokens:,}"),
            ("seed", str(config.train.seed)),
            ("training data", f"`{config.data.train}`"),
            ("config fingerprint", f"`{config.fingerprint()}`"),
        ]
    if card.measured is not None:
        rows.append(("digest of the training samples", f"`{card.measured.training_digest}`"))
        rows.append(("digest of the evaluation samples", f"`{card.measured.evaluation_digest}`"))
    rows += [(name.removeprefix("version."), value) for name, value in sorted(card.tags.items()) if name in SHOWN]
    lines = ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    return lines


SHOWN = ("git.commit", "version.torch", "version.transformers")


def _loading(card: CardFacts) -> list[str]:
    makers = {"peft": _peft, "merged": _merged, "gguf-adapter": _gguf_adapter, "gguf-merged": _gguf_merged}
    return ["## Load it", "", "Run in this folder:", "", *makers[card.form](card), ""]


def _peft(card: CardFacts) -> list[str]:
    rank = next((r for r in VLLM_RANKS if r >= card.rank), card.rank)
    return [
        *peft_code(card.base, card.config),
        "vLLM:",
        "```",
        f"vllm serve {card.base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=.",
        "```",
        "llama.cpp takes the form `gguf-adapter`: `python -m engine.export . --to gguf-adapter --out DIR`.",
    ]


def peft_code(base: str, config: TrainConfig | None) -> list[str]:
    """Loads the adapter of this folder on the base as it was in training: 4-bit where that was so, else the adapter meets other
    weights than it learned on."""
    quantized = config is not None and config.model.quantization == "nf4"
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantized else "")
    lines = ["```python", "import torch", "from peft import PeftModel", f"from transformers import {imports}", ""]
    if quantized:
        double = config.model.double_quantization
        lines.append('four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",')
        lines.append(f"                              bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.bfloat16)")
    option = "quantization_config=four_bit" if quantized else "dtype=torch.bfloat16"
    return [
        *lines,
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, {option})",
        'model = PeftModel.from_pretrained(base, ".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]


def _merged(card: CardFacts) -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
        "vLLM: `vllm serve .`. PEFT is not needed any more.",
    ]


def _gguf_adapter(card: CardFacts) -> list[str]:
    return [
        "```",
        "llama-cli -m BASE.gguf --lora adapter.gguf",
        "```",
        f"BASE.gguf: the base model `{card.base}` as GGUF, in any quantisation; the losses above are",
        "those on the base model as it was in training.",
    ]


def _gguf_merged(card: CardFacts) -> list[str]:
    return [
        "```",
        "llama-cli -m model.gguf",
        "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M    # smaller",
        "```",
    ]
