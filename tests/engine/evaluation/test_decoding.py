"""Answers generated in batches are those of each prompt alone, and of transformers' generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.adapter.lora import attach, detach
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import Sample, collate
from engine.evaluation import decoding
from engine.evaluation.decoding import Decoding, generate, original_layers
from engine.evaluation.eval_loss import EvaluationSet, evaluate
from engine.layers.swap import FusedLayer
from engine.model.guard import own_attentions
from engine.model.load import load_base
from engine.quant.frozen_linear import FrozenLinear
from tests.support.export_models import SIZES, save_model
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU, build

LENGTHS = (9, 3, 30, 17, 3, 24, 12)
STOPS = [257, *range(0, 250, 12)]  # random models say any of them


def save_family(folder, family):
    """Save a random model: Llama and Qwen 3 attend to everything, Gemma 3 through windows; LFM 2 has convolutions.

    gpt-oss has windows, sinks and experts.
    """
    if family in ("llama", "qwen3"):
        return save_model(folder, family, torch.float32)
    import transformers

    extra = {
        "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "gpt_oss": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
                    "num_local_experts": 4, "num_experts_per_tok": 2},
    }[family]  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**SIZES, **extra, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text", "lfm2", "gpt_oss"])
def adapted(request, tmp_path_factory):
    """Return a base in NF4 with an adapter that changes its answers."""
    folder = save_family(tmp_path_factory.mktemp(request.param) / "model", request.param)
    values = {"model": {"path": str(folder)}, "data": {"train": "unused"}, "lora": {"rank": 4}, "train": {"max_tokens": 8}}
    config = build({"optim": {}, **values}, train={"num_reports": 1})
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.normal_(std=0.1)
    base.model.train()
    return base, layers


@pytest.fixture
def prompts():
    random = np.random.default_rng(0)
    return [random.integers(0, 250, length).astype(np.int32) for length in LENGTHS]


def keeps_weights(base):
    fused = [layer for layer in base.model.modules() if isinstance(layer, FusedLayer)]
    plain = [layer._plain for layer in base.model.modules() if isinstance(layer, FrozenLinear)]
    return any(layer.weight_cache for layer in fused) or any(weight is not None for weight in plain)


def by_library(base, prompt, max_new_tokens):
    """Return what transformers' generate answers to one prompt, on the same layers."""
    base.model.eval()
    base.model.set_attn_implementation(own_attentions(base.model)[0])
    with original_layers(base.model), torch.no_grad():
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": STOPS, "pad_token_id": 257}
        out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    base.model.set_attn_implementation(base.route.attention)
    base.model.train()
    answer = out[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in STOPS else answer


def test_batches_give_the_answers_of_each_alone_and_of_the_library(adapted, prompts):
    base, layers = adapted
    theirs = [by_library(base, prompt, 16) for prompt in prompts]
    assert len({len(answer) for answer in theirs}) > 1, "no row ends early, so none leaves its batch"
    assert generate(base, prompts, STOPS, Decoding(16)) == theirs
    assert generate(base, prompts, STOPS, Decoding(16, batch_size=1)) == theirs
    assert generate(base, prompts, STOPS, Decoding(16, batch_size=3)) == theirs
    with torch.no_grad():  # twin
        for layer in layers.values():
            layer.lora_b.neg_()
    try:
        assert generate(base, prompts, STOPS, Decoding(16)) != theirs
    finally:
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_b.neg_()


def test_the_librarys_layers_give_the_same_answers_and_padding_that_is_not_masked_would_not(adapted, prompts, monkeypatch):
    base, _ = adapted
    if base.swaps.unfused or decoding.has_mixers_below(base):
        pytest.skip("such rows are never padded")
    by_fused = generate(base, prompts, STOPS, Decoding(16, batch_size=3))
    monkeypatch.setattr(decoding, "can_decode", lambda *_: False)
    right = generate(base, prompts, STOPS, Decoding(16, batch_size=3))
    assert right == by_fused
    monkeypatch.setattr(decoding, "PaddedSteps", None)  # twin: these answers came from there
    with pytest.raises(TypeError):
        generate(base, prompts, STOPS, Decoding(16))
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "can_decode", lambda *_: False)
    monkeypatch.setattr(torch, "zeros_like", torch.ones_like)
    assert generate(base, prompts, STOPS, Decoding(16)) != right


class Recorded:
    """Stand for a CUDA graph: what a replay computes lands in the tensor of the recording."""

    def __init__(self, breaks=False):
        self.made, self.replays, self.breaks = 0, 0, breaks

    def __call__(self, compute):
        if self.breaks:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.made += 1
        result = torch.full_like(compute(), torch.nan)

        def replay():
            self.replays += 1
            result.copy_(compute())

        return result, replay


@pytest.mark.parametrize("adapted", ["llama", "gemma3_text"], indirect=True)
def test_a_pass_is_recorded_once_for_a_batch_and_read_again_from_the_same_places(adapted, prompts, monkeypatch):
    base, _ = adapted
    right = generate(base, prompts, STOPS, Decoding(24))
    recorded, broken = Recorded(), Recorded(breaks=True)
    monkeypatch.setattr(decoding, "recorder", lambda base: recorded)
    assert generate(base, prompts, STOPS, Decoding(24)) == right
    assert 0 < recorded.made < recorded.replays
    monkeypatch.setattr(decoding, "recorder", lambda base: broken)  # a model whose code waits for the device
    assert generate(base, prompts, STOPS, Decoding(24)) == right


@pytest.mark.gpu
def test_a_recorded_pass_gives_the_answers_of_one_that_is_not_and_leaves_no_memory(tmp_path, prompts, monkeypatch):
    folder, card = save_family(tmp_path / "model", "gemma3_text"), torch.device("cuda")
    values = {"model": {"path": str(folder)}, "data": {"train": "unused"}, "lora": {"rank": 4}, "train": {"max_tokens": 8}}
    config = parse(TrainConfig, {**values, "train": {"max_tokens": 8, "num_reports": 1}})
    base, made = load_base(config.model, card), []
    attach(base.model, base.linear_names, config.lora, 0)
    generate(base, prompts, STOPS, Decoding(24))
    before = torch.cuda.memory_allocated()
    recorder = decoding.recorder
    monkeypatch.setattr(decoding, "recorder", lambda base: lambda compute: made.append(1) or recorder(base)(compute))
    recorded = generate(base, prompts, STOPS, Decoding(24))
    assert made and torch.cuda.memory_allocated() == before
    monkeypatch.setattr(decoding, "recorder", lambda base: None)
    assert generate(base, prompts, STOPS, Decoding(24)) == recorded


@pytest.mark.parametrize("adapted", ["llama", "lfm2"], indirect=True)
def test_draws_belong_to_a_prompt_whatever_its_batch(adapted, prompts):
    base, _ = adapted
    one = generate(base, prompts, STOPS, Decoding(12, temperature=1.0, seed=3))
    assert generate(base, prompts, STOPS, Decoding(12, batch_size=2, temperature=1.0, seed=3)) == one
    assert generate(base, prompts, STOPS, Decoding(12, temperature=1.0, seed=4)) != one
    almost_greedy = generate(base, prompts, STOPS, Decoding(12, temperature=1e-4, seed=4))
    assert almost_greedy == generate(base, prompts, STOPS, Decoding(12))


def test_model_mode_random_numbers_and_losses_stay(adapted, prompts):
    base, _ = adapted
    random = np.random.default_rng(1)
    rows = [collate([Sample(random.integers(0, 250, n), np.arange(n) > 3) for n in (9, 20)])]
    samples, state = EvaluationSet.of(rows), torch.get_rng_state()
    before = evaluate(base, samples)
    kinds = [type(module) for module in base.model.modules()]
    generate(base, prompts, STOPS, Decoding(8, temperature=1.0))
    assert evaluate(base, samples) == before and torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in base.model.modules()] == kinds and base.model.training
    assert not keeps_weights(base)
    if not base.swaps.unfused:
        assert FusedLayer in kinds


@pytest.mark.parametrize("adapted", ["llama"], indirect=True)
@pytest.mark.parametrize("fails_at", [0, 3])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(adapted, prompts, fails_at):
    base, _ = adapted
    kinds, calls = [type(module) for module in base.model.modules()], []

    def stop():
        calls.append(None)
        if len(calls) > fails_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(base, prompts, STOPS, Decoding(8), stop)
    assert [type(module) for module in base.model.modules()] == kinds and base.model.training and not keeps_weights(base)


@pytest.mark.parametrize("adapted", ["llama"], indirect=True)
def test_fewer_answers_at_once_where_memory_runs_out(adapted, prompts, monkeypatch):
    base, _ = adapted
    right, sizes = generate(base, prompts, STOPS, Decoding(8)), []
    answer = decoding._Generation._answer

    def short(self, rows):
        sizes.append(len(rows))
        answer(self, rows)
        if len(rows) > 1:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(decoding._Generation, "_answer", short)
    assert generate(base, prompts, STOPS, Decoding(8)) == right
    assert max(sizes) > 1 and sizes[-1] == 1 and len(sizes) >= len(prompts)


@pytest.mark.parametrize("adapted", ["llama"], indirect=True)
def test_an_adapter_can_be_detached_afterwards(adapted, prompts):
    base, layers = adapted
    with_adapter = generate(base, prompts, STOPS, Decoding(8))
    detach(base.model, layers)
    try:
        assert generate(base, prompts, STOPS, Decoding(8)) != with_adapter
    finally:
        for name, layer in layers.items():
            base.model.set_submodule(name, layer)


@pytest.mark.parametrize("adapted", ["llama", "lfm2"], indirect=True)
def test_a_token_of_each_answer_is_computed_on_one_thread(adapted, prompts):
    base, _ = adapted
    before, threads = torch.get_num_threads(), []
    torch.set_num_threads(2)
    hook = base.model.get_decoder().register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    try:
        generate(base, prompts[:1], [], Decoding(4))
        assert len(threads) == 4 and threads[1:] == [1, 1, 1] and torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)
