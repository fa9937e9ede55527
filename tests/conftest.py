"""Fixtures shared by all tests: a tiny Llama with a byte-level tokenizer, and a tiny data set. Nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.tiny_models import byte_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores: two and two wait for each
    os.environ["OMP_NUM_THREADS"] = "1"  # other longer than they compute (a test of 5 s took 54)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token caches of tests go to a folder of their own; the builtin model, slow to make, may come from the user's."""
    os.environ["QLORA_SWEEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama (hidden 64, 4 heads, 2 key/value heads) with random weights, and a tokenizer of single bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 60 short conversations, all different."""
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"}, {"role": "assistant", "content": f"It is {i + i}."}]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_config(tiny_model_dir: Path, tiny_data: Path) -> dict:
    """Plain data of a TrainConfig that trains in about a second on the CPU."""
    return {
        "model": {"path": str(tiny_model_dir)},
        "data": {"train": str(tiny_data), "max_seq_length": 128, "eval_max_seq_length": 128, "eval_fraction": 0.2},
        "lora": {"rank": 4},
        "optim": {"learning_rate": 1e-2},
        "train": {"max_tokens": 1536, "num_reports": 3, "tokens_per_step": 256, "activation_checkpointing": False},
    }
