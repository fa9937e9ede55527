"""List the fields that no space may vary, because trials that differ in them cannot be compared."""

from __future__ import annotations

from engine.config.metrics_section import MetricsConfig

INCOMPARABLE = {
    "model.path": "base models with other tokenizers would be scored on other tokens",
    "model.revision": "base models with other tokenizers would be scored on other tokens",
    "model.train_tokens": "trials would be scored on other tokens",
    "data.train": "trials would learn from different data",
    "data.train_split": "trials would learn from different data",
    "data.train_max_samples": "trials would learn from different data",
    "data.train_name": "trials would learn from different data",
    "data.train_revision": "trials would learn from different data",
    "data.train_files": "trials would learn from different data",
    "data.bad_rows": "trials would learn from different data",
    "data.columns": "trials would learn from different data",
    "data.overlong": "trials would be scored on different target tokens",
    "data.eval_name": "trials would be scored on different data",
    "data.eval_revision": "trials would be scored on different data",
    "data.eval_files": "trials would be scored on different data",
    "data.eval": "trials would be scored on different data",
    "data.eval_weights": "trials would be scored by different means",
    "data.eval_limits": "trials would be held to different limits",
    "data.eval_split": "trials would be scored on different data",
    "data.eval_fraction": "trials would be scored on different data",
    "data.eval_max_samples": "trials would be scored on different data",
    "data.eval_max_seq_length": "trials would be scored at different lengths",
    "data.format": "trials would be scored on different target tokens",
    "data.chat_template": "trials would be scored on different target tokens",
    "data.date": "trials would be scored on different prompts",
    "data.turns": "trials would be scored on different target tokens",
    "train.max_tokens": "trials would have different budgets",
    "train.max_epochs": "trials would have different budgets",
    "train.report_at_tokens": "trials would be judged at different rungs",
    "train.num_reports": "trials would be judged at different rungs",
    "train.device": "placement decides the device",
    "preference.loss": "trials would be scored by different losses",
    "preference.eval_beta": "trials would be scored by different losses",
}
INCOMPARABLE |= {f"metrics.{name}": "trials would be scored by other answers" for name in MetricsConfig.model_fields}
UNSEARCHABLE = {path: f"{why}, so their losses do not compare" for path, why in INCOMPARABLE.items()} | {
    "train.profile_steps": "a trace does not change what a trial learns",
    "lora.start_from": "its files are recorded once, for all trials of a sweep",
    "lora.start_digest": "its files are recorded once, for all trials of a sweep",
    "model.trust_remote_code": "it is for you to decide whether a model's own code runs, not for the sampler",
}
