"""Which trial won, and the files that say so: leaderboard and `best/`. Plain data in, files out; no torch, optuna, mlflow."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from engine.config import TrainConfig, parse, to_json
from engine.errors import InputError
from engine.files import write_folder, write_text
from sweep.outcome import Outcome, TrialRecord

TIE = 1e-4  # nats: below what another seed or another GPU changes
RULE = (
    f"lowest eval_loss over a COMPLETE trial's reports; within {TIE:g} nats of it, the fewest trainable parameters, "
    "then the lowest trial number"
)
HEADER = ("rank", "trial", "outcome", "eval loss", "tokens seen", "parameters", "tokens/s", "peak GiB", "sampled", "error")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def select_best(records: list[TrialRecord]) -> TrialRecord | None:
    """The winner by RULE; None where no COMPLETE trial has a finite eval_loss."""
    complete = [record for record in records if record.outcome is Outcome.COMPLETE and _score(record) < math.inf]
    if not complete:
        return None
    limit = min(_score(record) for record in complete) + TIE
    return min(
        (record for record in complete if _score(record) <= limit), key=lambda record: (_parameters(record), record.number)
    )


def rank(records: list[TrialRecord]) -> list[TrialRecord]:
    """The winner, the other COMPLETE trials by score, PRUNED ones by score, then the rest by number."""
    best = select_best(records)
    group = {Outcome.COMPLETE: 1, Outcome.PRUNED: 2}

    def key(record: TrialRecord) -> tuple:
        place = 0 if record is best else group.get(record.outcome, 3)
        return (place, _score(record) if place < 3 else 0.0, _parameters(record), record.number)

    return sorted(records, key=key)


def write_leaderboard(folder: Path, records: list[TrialRecord], sweep_name: str, reevaluation: dict[str, Any] | None) -> None:
    """Write leaderboard.json and leaderboard.md, each replaced in one rename, with every trial whatever its outcome.

    Only COMPLETE trials have a rank: the loss of a pruned one was measured after fewer tokens.
    """
    best = select_best(records)
    rows = [_row(record, place) for place, record in enumerate(rank(records), start=1)]
    board = {
        "sweep": sweep_name,
        "rule": RULE,
        "best_trial": best.number if best else None,
        "reevaluation": reevaluation,
        "trials": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "leaderboard.json", json.dumps(_finite(board), indent=2, allow_nan=False) + "\n")
    write_text(folder / "leaderboard.md", _markdown(sweep_name, best, rows, reevaluation))


def write_best(best_dir: Path, record: TrialRecord, reevaluation: dict[str, Any], sweep_name: str) -> None:
    """Assemble `best/`: the trial's adapter and tokenizer, train_config.json and a model card. Replaces an older one.

    InputError where the trial folder holds no adapter.
    """
    adapter = Path(record.folder) / "adapter"
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise InputError("adapter", str(adapter), f"must hold {' and '.join(missing)} of trial {record.number}")

    def fill(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (folder / "train_config.json").write_text(to_json(parse(TrainConfig, record.config)) + "\n")
        (folder / "README.md").write_text(model_card(record, reevaluation, sweep_name, _base_model(adapter)), encoding="utf-8")

    write_folder(best_dir, fill)


def model_card(record: TrialRecord, reevaluation: dict[str, Any], sweep_name: str, base_model: str) -> str:
    """README.md of `best/`: front matter for the Hugging Face hub, what was measured, how to load it, how to train it again."""
    config = parse(TrainConfig, record.config)
    quantized = config.model.quantization == "nf4"
    tags = ["lora", "qlora" if quantized else "peft", "qlora-sweep"]
    agreement = "agrees with" if reevaluation["agrees"] else "**does NOT agree with**"
    measured = (
        f"Measured after the sweep on {reevaluation['num_eval_target_tokens']:,} target tokens of the evaluation set; this "
        f"{agreement} what the trial reported ({_number(reevaluation['trial_eval_loss'], '.4f')})."
    )
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base_model)}",
            "library_name: peft",
            "pipeline_tag: text-generation",
            f"tags: {json.dumps(tags)}",
            "---",
            "",
            f"# Best adapter of the sweep `{sweep_name}`",
            "",
            f"Trial {record.number}. Chosen by: {RULE}.",
            "",
            "| | eval loss (nats/token) | perplexity |",
            "|---|---:|---:|",
            f"| base model | {_loss_cells(reevaluation['base_eval_loss'])} |",
            f"| with this adapter | {_loss_cells(reevaluation['eval_loss'])} |",
            "",
            measured,
            "",
            *_table(("setting", "value"), _settings(record, config)),
            "",
            "## Load it",
            "",
            "Run in this folder:",
            "",
            *_load_code(base_model, config if quantized else None),
            "",
            "## Train it again",
            "",
            "```",
            "python -m engine train_config.json",
            "```",
            "",
        ]
    )


def _settings(record: TrialRecord, config: TrainConfig) -> list[tuple[str, str]]:
    lora, last = config.lora, record.reports[-1]
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    kept = min(record.reports, key=lambda report: report["eval_loss"])
    return [
        ("training data", f"`{config.data.train}`"),
        ("tokens seen by this adapter", f"{kept['tokens_seen']:,} of {last['tokens_seen']:,} trained"),
        ("rank", str(lora.rank)),
        ("lora_alpha", f"{lora.alpha:g}" + (" (rsLoRA)" if lora.use_rslora else "")),
        ("lora_dropout", f"{lora.lora_dropout:g}"),
        ("target_modules", targets),
        ("trainable parameters", f"{_parameters(record):,}"),
        ("learning_rate", f"{config.optim.learning_rate:g} ({config.optim.lr_schedule})"),
        ("max_seq_length", str(config.data.max_seq_length)),
        ("base weights", config.model.quantization),
        ("tokens per second", _number(_speed(record), ",.0f")),
        ("peak allocated GiB", _number(_peak(record), ".2f")),
        ("seed", str(config.train.seed)),
    ]


def _load_code(base_model: str, quantized: TrainConfig | None) -> list[str]:
    """Loads the base as it was in training: 4-bit where that was so, else the adapter meets other weights than it learned on."""
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantized else "")
    lines = ["```python", "import torch", "from peft import PeftModel", f"from transformers import {imports}", ""]
    if quantized:
        double = quantized.model.double_quantization
        lines += [
            'four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",',
            f"                              bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.bfloat16)",
        ]
    option = "quantization_config=four_bit" if quantized else "dtype=torch.bfloat16"
    return [
        *lines,
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base_model)}, {option})",
        'model = PeftModel.from_pretrained(base, ".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]


def _base_model(adapter: Path) -> str:
    """What PEFT will look for: a hub id or folder, also where the config said `builtin:`."""
    try:
        return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise InputError(
            "adapter_config.json", str(adapter), f"must be PEFT's JSON with base_model_name_or_path ({error!r})"
        ) from None


def _row(record: TrialRecord, place: int) -> dict[str, Any]:
    last = record.reports[-1] if record.reports else {}
    return {
        "rank": place if record.outcome is Outcome.COMPLETE else None,
        "number": record.number,
        "outcome": record.outcome.value,
        "eval_loss": record.score,
        "tokens_seen": last.get("tokens_seen"),
        "num_trainable": last.get("num_trainable"),
        "tokens_per_second": _speed(record),
        "peak_allocated_gib": _peak(record),
        "params": record.params,
        "error": record.error,
        "folder": record.folder,
    }


def _markdown(name: str, best: TrialRecord | None, rows: list[dict[str, Any]], reevaluation: dict[str, Any] | None) -> str:
    lines = [f"# Leaderboard of `{name}`", "", f"Best: {f'trial {best.number}' if best else 'none'}. Rule: {RULE}.", ""]
    if reevaluation:
        again = (
            f"Evaluated again after the sweep: base {_number(reevaluation['base_eval_loss'], '.4f')}, "
            f"best adapter {_number(reevaluation['eval_loss'], '.4f')} nats per target token "
            f"({'agrees' if reevaluation['agrees'] else 'DOES NOT agree'} with the trial's own report)."
        )
        lines += [again, ""]
    return "\n".join([*lines, *_table(HEADER, [_cells(row) for row in rows]), ""])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    sampled = ", ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in row["params"].items())
    return (
        _number(row["rank"], "d"),
        str(row["number"]),
        row["outcome"],
        _number(row["eval_loss"], ".4f"),
        _number(row["tokens_seen"], ",d"),
        _number(row["num_trainable"], ",d"),
        _number(row["tokens_per_second"], ",.0f"),
        _number(row["peak_allocated_gib"], ".2f"),
        sampled,
        row["error"] or "",
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in escaped)]


def _score(record: TrialRecord) -> float:
    """record.score, infinite where there is none or it is not finite."""
    score = record.score
    return score if score is not None and math.isfinite(score) else math.inf


def _parameters(record: TrialRecord) -> int:
    return record.reports[-1]["num_trainable"] if record.reports else 0


def _speed(record: TrialRecord) -> float | None:
    """Median tokens per second over the reports: the first one holds warm-up and compilation."""
    return statistics.median(report["tokens_per_second"] for report in record.reports) if record.reports else None


def _peak(record: TrialRecord) -> float | None:
    return max(report["peak_allocated_gib"] for report in record.reports) if record.reports else None


def _loss_cells(loss: float) -> str:
    return f"{_number(loss, '.4f')} | {_number(math.exp(min(loss, 700.0)), ',.3f')}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """The same data with NaN and infinities as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
