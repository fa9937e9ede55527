"""Write `best/`: the winning adapter, ready to load, with a model card of its measurements."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config.parsing import parse, to_json
from engine.config.permission import FLAG, METRICS_FLAG
from engine.config.trial import TRAIN_CONFIG, TrainConfig
from engine.errors import InputError
from engine.export.model_card import CAUSAL, ModelCard, class_named_in, config_rows, peft_code
from engine.system.files import write_folder
from engine.trial_report import TrialReport
from sweep.results.verdict import SweepVerdict
from sweep.text import metrics_text, number
from sweep.trials.record import TrialRecord
from sweep.trials.selection import median_speed, num_parameters

BUILTIN = "builtin:"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD_EXAMPLES, CARD_CHARS = 2, 200
EXAMPLE = ("prompt", "expected", "base", "adapter")
TOOLS = (
    "```",
    "python -m engine.chat .                                   # talk to it",
    "python -m engine.export . --to peft --out DIR             # for PEFT and vLLM",
    "python -m engine.export . --to merged --out DIR           # into the original 16-bit weights",
    "python -m engine.export . --to gguf-adapter --out DIR     # for llama.cpp; --to gguf-merged: the whole model",
    "```",
)


def write_best(best_dir: Path, verdict: SweepVerdict, sweep_name: str, examples: Sequence[dict[str, str]] = ()) -> None:
    """Assemble `best/`: the winner's adapter and tokenizer, train_config.json and a model card.

    Replaces an older `best/`. verdict: with a winner and its reevaluation. examples: see
    SweepFolder.write_examples. InputError if the trial folder holds no adapter.
    """
    record = verdict.best
    adapter = Path(record.folder) / "adapter"
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise InputError("adapter", str(adapter), f"must hold {' and '.join(missing)} of trial {record.number}")

    def fill(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (folder / TRAIN_CONFIG).write_text(to_json(parse(TrainConfig, record.config)) + "\n")
        loader = class_named_in(json.loads((adapter / "adapter_config.json").read_text()))
        card = best_card(verdict, sweep_name, _base_model(adapter), examples, loader)
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(best_dir, fill)


def best_card(
    verdict: SweepVerdict, sweep_name: str, base_model: str, examples: Sequence[dict[str, str]] = (), loader: str = CAUSAL
) -> str:
    """Return the README.md of `best/`, with front matter for the Hugging Face hub.

    It tells what was measured, how to load the adapter and how to train it again. loader: the class
    of transformers that loads the base.
    """
    record, reevaluation, rule = verdict.best, verdict.reevaluation, verdict.rule
    config = parse(TrainConfig, record.config)
    agreement = "agrees with" if reevaluation.agrees else "**does NOT agree with**"
    measured = (
        f"Measured after the sweep on {reevaluation.num_eval_target_tokens:,} target tokens of the evaluation set; this "
        f"{agreement} what the trial reported ({number(reevaluation.trial_eval_loss, '.4f')})."
    )
    said = (verdict.gain_line, verdict.contest_line, verdict.seeds_line)
    return ModelCard(
        title=f"Best adapter of the sweep `{sweep_name}`",
        base=base_model,
        library="peft",
        tags=["lora", "qlora" if config.model.quantization == "nf4" else "peft", "qlora-sweep"],
        introduction=[f"Trial {record.number}. Chosen by: {rule.text}."],
        losses=[
            ("base model", reevaluation.base_eval_loss),
            ("with this adapter", reevaluation.eval_loss),
            *((f"base model on {name}", loss) for name, loss in reevaluation.base_eval_losses.items()),
            *((f"with this adapter on {name}", loss) for name, loss in reevaluation.eval_losses.items()),
        ],
        metrics=[(name, reevaluation.base_metrics.get(name), value) for name, value in reevaluation.metrics.items()],
        of_pairs=config.learns_pairs,
        notes=[" ".join([measured, *filter(None, said)]), *_earlier_note(verdict)],
        settings=_settings(record, config),
        sections=[
            *([("What it answers", _examples(examples))] if examples else []),
            ("Try it, and take it elsewhere", _tools(config)),
            ("Load it", ["Run in this folder:", "", *peft_code(base_model, config, loader), *_builtin_note(config.model.path)]),
            ("Train it again", ["```", f"python -m engine train_config.json{_permission(config)}", "```"]),
        ],
    ).text()


def _tools(config: TrainConfig) -> list[str]:
    rows = "It has rows of tokens (`trainable_token_indices`), which PEFT takes. Other programs take the merged forms."
    noted = [rows, ""] if config.model.train_tokens else []
    tools = [line for line in TOOLS if not (noted and re.search(r"--to (peft|gguf-adapter)", line))]
    return [*noted, "Run in this folder, with qlora-sweep installed:", "", *tools]


def _permission(config: TrainConfig) -> str:
    """Return what the reader must add to let the model's own code and the user's metrics run, if there are any."""
    own = f" {METRICS_FLAG}" if config.metrics.own else ""
    return f" {FLAG}{own}" if config.model.trust_remote_code else own


def _earlier_note(verdict: SweepVerdict) -> list[str]:
    """Say that an earlier sweep has a better adapter, without its path on this machine."""
    if verdict.earlier is None:
        return []
    earlier = verdict.earlier
    known = f"{number(earlier.eval_loss, '.4f')}{metrics_text(earlier.metrics)}"
    return [f"A trial of an earlier sweep did better on the same evaluation set: {known}."]


def _examples(examples: Sequence[dict[str, str]]) -> list[str]:
    """Show the first few examples, shortened; the sweep's report.html has them in full.

    Code blocks hold them, because they may contain any text.
    """
    lines = ["Evaluation samples, greedy; each text shortened."]
    for example in examples[:CARD_EXAMPLES]:
        texts = [f"{name:<9} {_one_line(example[name])}" for name in EXAMPLE]
        lines += ["", "````text", *texts, "````"]
    return lines


def _one_line(text: str) -> str:
    """Remove line ends, which could close the code block, and shorten the text."""
    line = " ".join(text.split())
    return line if len(line) <= CARD_CHARS else f"{line[: CARD_CHARS - 1]}…"


def _settings(record: TrialRecord, config: TrainConfig) -> list[tuple[str, str]]:
    lora, last = config.lora, record.reports[-1]
    kept = record.kept
    return [
        *config_rows(config, "training data"),
        *_averaged(kept, config),
        ("tokens seen by this adapter", f"{kept.tokens_seen:,} of {last.tokens_seen:,} trained"),
        ("rank", ", ".join([str(lora.rank), *_others(lora.rank_pattern)])),
        ("lora_alpha", ", ".join([f"{lora.alpha:g}", *_others(lora.alpha_pattern)]) + (" (rsLoRA)" if lora.use_rslora else "")),
        *config_rows(config, "lora_dropout", "target_modules"),
        *_started(record, config),
        ("trainable parameters", f"{num_parameters(record):,}"),
        *config_rows(config, "learning_rate", "max_seq_length"),
        ("base weights", config.model.quantization),
        ("tokens per second", number(median_speed(record), ",.0f")),
        ("peak allocated GiB", number(record.peak_allocated_gib, ".2f")),
        ("peak predicted GiB", number(record.predicted_peak_gib, ".2f")),
        *config_rows(config, "seed"),
    ]


def _others(pattern: Mapping[str, float]) -> list[str]:
    """Return what a pattern says of some layers."""
    return [f"{name}: {value:g}" for name, value in pattern.items()]


def _started(record: TrialRecord, config: TrainConfig) -> list[tuple[str, str]]:
    """Say what adapter the trial began with, if there was one."""
    if record.warm is not None:
        return [("started from", f"the adapter of trial {record.warm.trial} of the same sweep, at {record.warm.tokens:,} tokens")]
    return [] if config.lora.start_from is None else config_rows(config, "started from")


def _averaged(kept: TrialReport, config: TrainConfig) -> list[tuple[str, str]]:
    """Say which adapter this is, if the trial had a running average."""
    if kept.ema_eval_loss is None:
        return []
    average = f"running average (horizon {config.optim.ema_horizon:g})"
    better, other = (average, "the last step's") if kept.is_average else ("the last step's", f"its {average}")
    losses = sorted([kept.raw_eval_loss, kept.ema_eval_loss])
    return [("adapter", f"{better}: {number(losses[0], '.4f')}; {other}: {number(losses[1], '.4f')}")]


def _builtin_note(path: str) -> list[str]:
    """Explain how to find a builtin model's folder on another machine.

    The card names the published model, because no other machine has this one's cache.
    """
    if not path.startswith(BUILTIN):
        return []
    folder = f"python -c \"from engine.sources.builtin import resolve_model; print(resolve_model('{path}'))\""
    return [
        f"The sweep used `{path}`: this model with weights rounded to 4 bits, and the losses above are on that one. Where the "
        f"tool is installed, `{folder}` prints its folder, to put in place of the name; no network is needed then."
    ]


def _base_model(adapter: Path) -> str:
    """Return the name that PEFT will look for: a hub id or a folder.

    For a `builtin:` model this is the name under which it is published.
    """
    try:
        name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str) or not name:
        raise InputError("adapter_config.json", str(adapter), "must be PEFT's JSON with the text base_model_name_or_path")
    return name
