"""Trials that multiply by the frozen base in INT8: learning, resume, recordings and refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from engine.config.matmul import AUTO_MATMUL, Matmul
from engine.errors import CheckpointError, InputError
from engine.layers.swap import int8_groups
from engine.model.load import load_base
from engine.training.loop import train
from tests.support.fake_recorder import FakeRecorder
from tests.support.trials import CPU, build, run, same_numbers

MODES = [Matmul.INT8_BACKWARD, Matmul.INT8]
RESULTS = ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors")


def small(tiny_config, mode=Matmul.BF16, **sections):
    train = {"matmul": mode.value, "max_tokens": 512, "num_reports": 2, **sections.pop("train", {})}
    return build(tiny_config, train=train, **sections)


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_learns_as_in_the_working_dtype_and_not_with_the_same_numbers(tiny_config, tmp_path, base, mode):
    plain = run(small(tiny_config), tmp_path / "plain", base)
    ours = run(small(tiny_config, mode), tmp_path / "ours", base)
    learnt = plain[0].eval_loss - plain[-1].eval_loss
    assert learnt > 0.02 and 0.0 < abs(ours[-1].eval_loss - plain[-1].eval_loss) < 0.1 * learnt
    assert same_numbers(run(small(tiny_config), tmp_path / "again", base), plain)  # the base is as it was


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_of_the_same_adapter_has_the_same_loss_in_every_mode(tiny_config, tmp_path, base, mode):
    """At a rate that changes no adapter, evaluations compare the base alone."""
    still = {"learning_rate": 1e-12}
    plain, ours = (run(small(tiny_config, one, optim=still), tmp_path / one, base)[-1] for one in (Matmul.BF16, mode))
    assert ours.eval_loss == plain.eval_loss
    assert (ours.train_loss == plain.train_loss) is (mode is Matmul.INT8_BACKWARD)


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_stopped_and_continued_is_bitwise_the_undisturbed_one(tiny_config, tmp_path, mode):
    config = small(tiny_config, mode, lora={"lora_dropout": 0.1})
    whole = run(config, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    parts = []
    for _ in range(2):
        generator = train(config, tmp_path / "parts")
        parts.append(next(generator))
        generator.close()
    assert same_numbers(whole, parts)
    for name in RESULTS:
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_trial_does_not_go_on_in_another_mode(tiny_config, tmp_path):
    generator = train(small(tiny_config, Matmul.INT8), tmp_path)
    next(generator)
    generator.close()
    with pytest.raises(CheckpointError, match="belongs to config"):
        next(train(small(tiny_config), tmp_path))


def test_recordings_serve_trials_of_their_own_mode(tiny_config, tmp_path, base, monkeypatch):
    recorder, made = FakeRecorder(base, monkeypatch), []
    loop = {"cuda_graphs": True, "micro_batch_size": 1, "weight_cache_gib": 1.0}
    for number, mode in enumerate((Matmul.BF16, Matmul.BF16, Matmul.INT8, Matmul.INT8)):
        before = recorder.num_recorded
        shared = run(small(tiny_config, mode, train=loop), tmp_path / f"shared{number}", base)
        made.append(recorder.num_recorded - before)
        alone = run(small(tiny_config, mode), tmp_path / f"alone{number}")
        assert [r.eval_loss for r in shared] == pytest.approx([r.eval_loss for r in alone], rel=1e-5)
    assert made[0] > 0 and made[2] > 0 and made[1] == made[3] == 0


@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_recordings_do_not_outlive_the_scales_that_they_read(tiny_config, tmp_path, monkeypatch, cache):
    loop = {"cuda_graphs": True, "micro_batch_size": 1, "weight_cache_gib": cache}
    base = load_base(small(tiny_config).model, CPU)
    recorder, scales = FakeRecorder(base, monkeypatch), []
    for number, mode in enumerate((Matmul.INT8, Matmul.BF16, Matmul.INT8)):
        before = recorder.num_recorded
        run(small(tiny_config, mode, train=loop), tmp_path / str(number), base)
        assert recorder.num_recorded > before
        scales += [int8.scales for _, int8 in int8_groups(base.model)]  # no later one comes to lie there


@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_is_not_packed_is_refused(tiny_config, mode):
    with pytest.raises(InputError, match=r"train\.matmul = .*int8.*must be bf16 with model\.quantization = none"):
        small(tiny_config, mode, model={"quantization": "none"})
    small(tiny_config, model={"quantization": "none"})


def test_another_word_is_refused_with_the_ones_allowed(tiny_config):
    with pytest.raises(InputError, match=r"train\.matmul = .*fp4.*'bf16', 'int8_backward', 'int8' or 'auto'"):
        build(tiny_config, train={"matmul": "fp4"})


def test_the_mode_is_in_the_fingerprint_and_the_default_leaves_older_ones_as_they_were(tiny_config):
    prints = {mode: small(tiny_config, mode).fingerprint() for mode in Matmul}
    assert len(set(prints.values())) == 3
    assert build(tiny_config, train={"matmul": "auto"}).fingerprint() == build(tiny_config).fingerprint()
    assert Matmul.of("auto") is AUTO_MATMUL is Matmul.BF16 and build(tiny_config).matmul is Matmul.BF16
