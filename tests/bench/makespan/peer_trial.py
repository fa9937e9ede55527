"""Train one trial in this process with Unsloth or PEFT, and TRL's SFTTrainer, as their documentation does.

`python tests/bench/makespan/peer_trial.py TASK` is run by tests/bench/makespan/peers.py, for each
trial anew. TASK is a JSON file. After every rung a line of JSON goes to the task's `reports`, and
a line from standard input says `go` or `stop`. This file imports nothing of ours: the libraries may
be installed in another place than ours.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "datasets", "peft", "trl", "unsloth", "flash-attn")
SPARE_STEPS = 1.25  # rows are not quite full, and the last step of a pass may be small


def main(task: dict[str, Any]) -> None:
    began_s = time.perf_counter()
    model, tokenizer, more = BUILDERS[task["system"]](task)
    trainer = make_trainer(task, model, tokenizer, more)
    rungs = watch(trainer, task, began_s)
    _report(task, {"versions": _versions(), "setup_s": time.perf_counter() - began_s})
    trainer.train()
    if not rungs.ended:
        raise RuntimeError(f"the trainer ended after {rungs.tokens():,} tokens, before rung {rungs.next + 1}")
    trainer.model.save_pretrained(task["adapter"])
    _report(task, {"ended": True, "peak_gib": _peak_gib()})


def _unsloth(task: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from unsloth import FastLanguageModel  # must be imported before transformers, trl and peft

    limit_memory(task)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=task["model"], max_seq_length=task["length"], dtype=None, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=task["rank"],
        target_modules=task["modules"],
        lora_alpha=2 * task["rank"],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=task["seed"],
    )
    return model, tokenizer, {}


def _peft(task: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    limit_memory(task)
    place: dict[str, Any] = {"device_map": {"": 0}, "dtype": torch.bfloat16} if task["on_card"] else {"dtype": torch.float32}
    if importlib.util.find_spec("flash_attn") and task["on_card"]:
        place["attn_implementation"] = "flash_attention_2"  # without it, TRL warns about packing
    model = AutoModelForCausalLM.from_pretrained(task["model"], **place)
    lora = LoraConfig(
        r=task["rank"], lora_alpha=2 * task["rank"], lora_dropout=0.0, target_modules=task["modules"], task_type="CAUSAL_LM"
    )
    return model, AutoTokenizer.from_pretrained(task["model"]), {"peft_config": lora}


BUILDERS = {"unsloth": _unsloth, "peft-trl": _peft}


def make_trainer(task: dict[str, Any], model: Any, tokenizer: Any, more: dict[str, Any]) -> Any:
    """Return the trainer: packing on, 8-bit AdamW, linear schedule, the documentation's two rows at once."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    steps = math.ceil(SPARE_STEPS * task["report_at"][-1] / (task["length"] * task["rows_per_step"])) + 2
    values = {
        "output_dir": task["folder"], "dataset_text_field": "text", "packing": True, "eval_packing": True, "report_to": "none",
        "per_device_train_batch_size": task["rows_at_once"], "per_device_eval_batch_size": task["rows_at_once"],
        "gradient_accumulation_steps": task["rows_per_step"] // task["rows_at_once"], "max_steps": steps, "warmup_steps": 5,
        "learning_rate": task["learning_rate"], "optim": "adamw_8bit" if task["on_card"] else "adamw_torch",
        "weight_decay": 0.001, "lr_scheduler_type": "linear", "seed": task["seed"], "logging_steps": 10,
        "save_strategy": "no", "eval_strategy": "no", "include_num_input_tokens_seen": "non_padding",
        "bf16": task["on_card"], "use_cpu": not task["on_card"],
    }  # fmt: skip
    known = inspect.signature(SFTConfig).parameters
    values |= {name: task["length"] for name in ("max_length", "max_seq_length") if name in known}  # Unsloth's has both
    left_out = [] if any(one.kind == one.VAR_KEYWORD for one in known.values()) else sorted(set(values) - set(known))
    _report(task, {"settings_left_out": left_out})  # of another version of TRL
    values = {name: value for name, value in values.items() if name not in left_out}
    files = {"train": task["train"], "held_out": task["held_out"]}
    data = load_dataset("json", data_files=files, cache_dir=task["cache"])
    return SFTTrainer(
        model=model, args=SFTConfig(**values), train_dataset=data["train"], eval_dataset=data["held_out"],
        processing_class=tokenizer, **more,
    )  # fmt: skip


def watch(trainer: Any, task: dict[str, Any], began_s: float) -> Any:
    """Let the trainer evaluate at each rung, report, and wait for the verdict; return the callback."""
    from transformers import TrainerCallback

    class Rungs(TrainerCallback):
        next, ended, mean_row = 0, False, None

        def tokens(self) -> int:
            """Return the tokens seen; from the rows' mean length if the trainer, as another library patched it, counts none."""
            return int(trainer.state.num_input_tokens_seen or trainer.state.global_step * task["rows_per_step"] * self.row())

        def row(self) -> float:
            if self.mean_row is None:
                self.mean_row = sum(map(len, trainer.train_dataset["input_ids"])) / len(trainer.train_dataset)
                _report(task, {"tokens_counted": "rows times their mean length"})
            return self.mean_row

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate = not self.ended and self.tokens() >= task["report_at"][self.next]

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            while self.next < len(task["report_at"]) and self.tokens() >= task["report_at"][self.next]:
                self.next += 1  # a step may pass several rungs; the last one counts
            report = {"rung": self.next, "tokens": self.tokens(), "eval_loss": metrics["eval_loss"], "step": state.global_step}
            _report(task, {**report, "elapsed_s": time.perf_counter() - began_s})
            go = sys.stdin.readline().strip() == "go"
            if not go or self.next == len(task["report_at"]):
                self.ended = control.should_training_stop = True

    rungs = Rungs()
    trainer.add_callback(rungs)
    return rungs


def limit_memory(task: dict[str, Any]) -> None:
    """Emulate a smaller card."""
    import torch

    if task["cap_gib"] and task["on_card"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, task["cap_gib"] * 2**30 / total))


def _peak_gib() -> float | None:
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _report(task: dict[str, Any], line: dict[str, Any]) -> None:
    with open(task["reports"], "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    # the script's own folder must not shadow a library's module
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(os.path.abspath(__file__))]
    main(json.loads(Path(sys.argv[1]).read_text()))
