"""EleutherAI's lm-eval, with the line of docs/using-the-adapter.md, judges an exported folder as PEFT does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.export.__main__ import main
from tests.support.export_models import save_adapter, save_model

TASK = """task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {samples}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [("Capital of France?", [" Paris", " Rome"], 0), ("Capital of Italy?", [" Paris", " Rome"], 1)]


def judged(arguments: str, task: Path, out: Path) -> list[float]:
    """Run the documented line and return the log-likelihoods of all questions' choices, in nats."""
    line = ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", str(task)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    options = ["--device", "cpu", "--output_path", str(out), "--log_samples"]
    subprocess.run([sys.executable, "-m", *line, *options], check=True, env=environment, capture_output=True, timeout=300)
    rows = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    found = sorted((json.loads(row) for row in rows), key=lambda row: row["doc_id"])
    return [float(resp[0][0]) for row in found for resp in row["resps"]]


@torch.no_grad()
def by_peft(base: Path, adapter: Path | None) -> list[float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        model.resize_token_embeddings(len(tokenizer))  # as lm-eval does: rows without a token lose their probability
        model = PeftModel.from_pretrained(model, adapter).eval()

    def nats(question: str, choice: str) -> float:
        begin = len(tokenizer(question)["input_ids"])
        ids = torch.tensor(tokenizer(question + choice)["input_ids"])
        scores = model(ids[None]).logits[0, begin - 1 : -1].log_softmax(-1)
        return scores.gather(1, ids[begin:, None]).sum().item()

    return [nats(question, choice) for question, choices, _ in QUESTIONS for choice in choices]


@pytest.mark.faults
def test_lm_eval_gives_the_exported_adapter_the_likelihoods_of_peft(tmp_path):
    """Needs lm-eval (the extra of that name; skipped without it)."""
    pytest.importorskip("lm_eval")
    base = save_model(tmp_path / "base", dtype=torch.float32)
    given = save_adapter(tmp_path / "given", base, use_rslora=True)
    assert main([str(given), "--to", "peft", "--out", str(tmp_path / "out"), "--no-losses"]) == 0
    samples, task = tmp_path / "samples.jsonl", tmp_path / "task.yaml"
    keys = ("question", "choices", "answer")
    samples.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in QUESTIONS))
    task.write_text(TASK.format(samples=samples))
    found = judged(f"pretrained={base},peft={tmp_path / 'out'},dtype=float32", task, tmp_path / "adapted")
    assert found == pytest.approx(by_peft(base, given), abs=1e-3)
    plain = judged(f"pretrained={base},dtype=float32", task, tmp_path / "plain")  # twin: the base model alone
    assert all(abs(a - b) > 0.1 for a, b in zip(found, plain, strict=True))
    assert plain == pytest.approx(by_peft(base, None), abs=1e-3)
