"""Fixtures for all tests: a tiny Llama with a byte-level tokenizer, and a tiny data set.

The tests download nothing.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_models import byte_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread a process, because the processes share the cores. Two processes of two threads wait for
# each other longer than they compute: a test of 5 s took 54 s.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def has_card() -> bool:
    """Return True if torch can use a GPU; torch is loaded only where the system shows one."""
    if not any(path.name.startswith(("nvidia", "dxg", "kfd")) for path in Path("/dev").iterdir()):
        return False
    import torch

    return torch.cuda.is_available()


HAS_CARD = has_card()
# Without a card the kernels run in Triton's interpreter. Triton reads this when it is first imported.
if not HAS_CARD:
    os.environ["TRITON_INTERPRET"] = "1"

BEGUN: set[Path] = set()  # files of which a test has run

# Tests of up to half a minute. They begin first, so that at the end no process waits for one of them.
LONGEST = ("tests/sweep/test_sweep",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:
        if "gpu" in item.keywords and not HAS_CARD:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure() -> None:
    gc.disable()  # what is loaded before the first test is no garbage


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """After the first test of a file, have garbage collections leave out what was loaded by then.

    The engine collects several times a trial. Through all tests and libraries, a million objects,
    each would take 0.3 s: a third of a small trial.
    """
    yield
    if item.path not in BEGUN:
        BEGUN.add(item.path)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give the tests a separate folder for token caches.

    The builtin model, which is slow to make, may come from the user's cache.
    """
    os.environ["QLORA_SWEEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def builtin_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for builtin model and data, which take 8 s to make: the processes of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "builtin"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a 2-layer Llama with random weights and a tokenizer of single bytes.

    It has hidden size 64, 4 heads and 2 key/value heads.
    """
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
def tiny_mixture_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a 2-layer Qwen3-MoE with 4 experts, 2 of them a token, and the same tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny-mixture"
    tokenizer = byte_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a JSONL file of 60 short conversations, all different."""
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"}, {"role": "assistant", "content": f"It is {i + i}."}]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_config(tiny_model_dir: Path, tiny_data: Path) -> dict:
    """Return plain data of a TrainConfig that trains in about a second on the CPU."""
    return {
        "model": {"path": str(tiny_model_dir)},
        "data": {"train": str(tiny_data), "max_seq_length": 128, "eval_max_seq_length": 128, "eval_fraction": 0.2},
        "lora": {"rank": 4},
        "optim": {"learning_rate": 1e-2},
        "train": {"max_tokens": 1536, "num_reports": 3, "tokens_per_step": 256, "activation_checkpointing": False},
    }
