"""NEFTune's noise: each sample's own bound, in training only, the same again after a stop and in recorded passes."""

from __future__ import annotations

import pytest
import torch

from engine.config.trial import TrainConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.training.recordings import Recordings
from engine.vocabulary.embedding_noise import bounds
from tests.support.fake_recorder import FakeRecorder
from tests.support.trials import build, run, run_stopped, same_numbers

ALPHA = 5.0


def noisy(tiny_config, alpha=ALPHA, graphs=False, **optim) -> TrainConfig:
    short = {"max_tokens": 512, "num_reports": 2, "micro_batch_size": 1, "cuda_graphs": graphs}
    return build(tiny_config, train={**short, "neftune_noise_alpha": alpha}, optim=optim)


def test_a_packed_sample_has_the_bound_of_its_own_length():
    offsets = torch.tensor([0, 4, 20, 20], dtype=torch.int32)  # the last is empty, as in a padded row
    found = bounds(offsets, 20, 64, torch.tensor(ALPHA))
    expected = [ALPHA / (4 * 64) ** 0.5] * 4 + [ALPHA / (16 * 64) ** 0.5] * 16
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(bounds(offsets[:2], 4, 64, torch.tensor(ALPHA)), torch.tensor(expected[:4]))


def test_training_has_the_loss_of_the_library_s_model_on_noised_embeddings_and_evaluation_has_none(tiny_config, base):
    """The noise is what transformers' own hook draws, in distribution: uniform within alpha / sqrt(L * D)."""
    view, _ = load_data(noisy(tiny_config).data, base.tokenizer)
    row, embedding = collate([view[0]]), base.model.get_input_embeddings()
    base.model.eval()
    plain = base.loss(row).item()
    before = embedding(row.input_ids_T)
    base.add_noise(torch.tensor(ALPHA), torch.tensor([123, 0]))
    assert base.loss(row).item() == plain
    base.model.train()
    noised = base.loss(row).item()
    after = embedding(row.input_ids_T)
    base.add_noise(None)
    assert base.loss(row).item() == pytest.approx(plain, rel=1e-6)
    difference, bound = after - before, ALPHA / (before.numel()) ** 0.5
    assert difference.abs().max() <= bound and difference.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    from transformers import AutoModelForCausalLM

    from engine.model.load import nf4_load_config

    model = AutoModelForCausalLM.from_pretrained(
        noisy(tiny_config).model.path, quantization_config=nf4_load_config(True, torch.float32), device_map={"": "cpu"},
        dtype=torch.float32,
    )  # fmt: skip
    logits = model(inputs_embeds=after[None], use_cache=False).logits[0].float()
    theirs = torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100).item()
    assert noised == pytest.approx(theirs, rel=1e-4) and abs(noised - plain) > 1e-3


@pytest.mark.parametrize("graphs", [False, True])
def test_a_stopped_trial_goes_on_with_the_same_noise(tiny_config, tmp_path, base, monkeypatch, graphs):
    if graphs:
        FakeRecorder(base, monkeypatch)
    config = noisy(tiny_config, graphs=graphs)
    whole = run(config, tmp_path / "whole", base)
    parts = run_stopped(config, tmp_path / "parts", base, Recordings.of(base).clear if graphs else lambda: None)
    assert same_numbers(whole, parts) and base.embedding_noise is None


def test_recorded_passes_share_the_noise_of_any_alpha_and_are_no_passes_without_it(tiny_config, tmp_path, base, monkeypatch):
    alone = [run(noisy(tiny_config, alpha), tmp_path / f"alone{alpha}", base) for alpha in (0.0, ALPHA, 15.0)]
    assert not same_numbers(alone[0], alone[1]) and not same_numbers(alone[1], alone[2])
    recorder, made = FakeRecorder(base, monkeypatch), []
    for alpha, expected in zip((0.0, ALPHA, 15.0), alone, strict=True):
        before = recorder.num_recorded
        found = run(noisy(tiny_config, alpha, graphs=True), tmp_path / f"recorded{alpha}", base)
        made.append(recorder.num_recorded - before)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.eval_loss == pytest.approx(theirs.eval_loss, abs=2e-4)
    assert made[0] > 0 and made[1] > 0 and made[2] == 0


def test_noise_is_part_of_the_trial_s_identity(tiny_config):
    assert noisy(tiny_config).fingerprint() != noisy(tiny_config, 0.0).fingerprint()
