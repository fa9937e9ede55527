"""A trial with a running average trains as without, reports both adapters, and keeps the better one."""

from __future__ import annotations

import json

import pytest
import torch

from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import load_adapter
from engine.data.views import load_data
from engine.errors import CheckpointError, InputError
from engine.evaluation.eval_loss import evaluate, evaluation_batches
from engine.model.load import nf4_load_config
from engine.sample_losses import read_sample_losses
from engine.training import loop
from engine.training.loop import train
from engine.trial_report import read_reports
from tests.support.trials import build, run

AVERAGED = {"ema_horizon": 0.5, "learning_rate": 0.1, "lr_schedule": "constant"}
NEW = ("raw_eval_loss", "ema_eval_loss")


@pytest.fixture
def adapters(monkeypatch):
    """Return a list that gets the flat adapter after each step, and the step's tokens."""
    found, step = [], loop._Run._step

    def noted(self):
        result = step(self)
        found.append((self.adapter.parameter.detach().double().clone(), result[0].num_tokens))
        return result

    monkeypatch.setattr(loop._Run, "_step", noted)
    return found


def mean_of(adapters, horizon):
    """Return the average by its definition, in fp64."""
    ends = torch.tensor([tokens for _, tokens in adapters], dtype=torch.float64).cumsum(0)
    weights = torch.diff((ends / ends[-1]) ** (1 / horizon), prepend=torch.zeros(1, dtype=torch.float64))
    return sum(weight * values for weight, (values, _) in zip(weights, adapters, strict=True)).float()


@pytest.mark.parametrize("packing", [True, False])
def test_both_adapters_are_reported_and_the_better_one_is_kept(tiny_config, tmp_path, base, adapters, packing):
    data = {"packing": packing}
    plain = run(build(tiny_config, data=data, optim={**AVERAGED, "ema_horizon": None}), tmp_path / "plain", base)
    adapters.clear()
    config = build(tiny_config, data=data, optim=AVERAGED)
    reports = run(config, tmp_path / "averaged", base)
    assert [r.raw_eval_loss for r in reports] == [r.eval_loss for r in plain]  # training is the same to the bit
    assert all(getattr(r, name) is None for r in plain for name in NEW) and not any(r.is_average for r in plain)
    assert [r.eval_loss for r in reports] == [min(r.raw_eval_loss, r.ema_eval_loss) for r in reports]
    best = min(reports, key=lambda r: r.eval_loss)
    assert best.is_average and best.eval_loss == reports[-1].best_eval_loss and read_reports(tmp_path / "averaged") == reports
    # the kept adapter's file holds the average, and gives the reported loss sample by sample
    _, view = load_data(config.data, base.tokenizer)
    samples = evaluation_batches(base, view, config.data.eval_max_seq_length)
    layers = attach(base.model, base.linear_names, config.lora, 1)
    load_adapter(tmp_path / "averaged" / "adapter", layers)
    parts = [layer.lora_a for layer in layers.values()] + [layer.lora_b for layer in layers.values()]
    wanted = mean_of(adapters[: best.step], 0.5)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parts]), wanted, rtol=1e-4, atol=1e-6)
    again, kept = evaluate(base, samples), read_sample_losses(tmp_path / "averaged", best)
    detach(base.model, layers)
    assert again.mean == pytest.approx(best.eval_loss, rel=1e-6) and again.sums == pytest.approx(kept.sums, rel=1e-5)
    assert kept.evaluation_digest == samples.digest and len(kept.sums) == len(view) and kept.mean == best.eval_loss
    other = next(r for r in reports if r is not best)
    with pytest.raises(InputError, match="remove the file"):
        read_sample_losses(tmp_path / "averaged", other)


def test_peft_has_the_kept_losses_sample_by_sample(tiny_config, tmp_path, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = build(tiny_config, optim=AVERAGED)
    best = min(run(config, tmp_path, base), key=lambda r: r.eval_loss)
    quantised = nf4_load_config(True, torch.float32)
    options = {"quantization_config": quantised, "device_map": "cpu", "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(config.model.path, **options).dequantize()  # fp32 on any CPU
    model = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    _, view = load_data(config.data, base.tokenizer)
    sums = []
    for i in range(len(view)):
        ids, is_target = torch.tensor(view[i].input_ids, dtype=torch.long), torch.tensor(view[i].is_target[1:])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[is_target].sum().item())
    kept = read_sample_losses(tmp_path, best)
    assert best.is_average and kept.sums == pytest.approx(sums, rel=1e-4)
    assert kept.mean == best.eval_loss == pytest.approx(sum(sums) / sum(kept.num_targets), rel=1e-4)


def test_the_last_adapter_is_kept_where_it_is_better(tiny_config, tmp_path, base):
    reports = run(build(tiny_config, optim={"ema_horizon": 1.0, "learning_rate": 2e-3}), tmp_path, base)
    assert all(r.eval_loss == r.raw_eval_loss < r.ema_eval_loss for r in reports) and not any(r.is_average for r in reports)
    assert read_sample_losses(tmp_path, reports[-1]).mean == reports[-1].raw_eval_loss


def test_a_checkpoint_goes_on_under_its_own_setting_alone(tiny_config, tmp_path, base):
    averaged, plain = build(tiny_config, optim=AVERAGED), build(tiny_config, optim={**AVERAGED, "ema_horizon": None})
    for number, (first, second) in enumerate([(averaged, plain), (plain, averaged)]):
        folder = tmp_path / str(number)
        reports = train(first, folder, base=base)
        next(reports)
        reports.close()
        with pytest.raises(CheckpointError, match="belongs to config"):
            next(train(second, folder, base=base))
        optimizer = folder / "checkpoint" / "optimizer.pt"
        assert ("average" in torch.load(optimizer, weights_only=True)) is (first is averaged)
        state = folder / "checkpoint" / "state.json"  # a file that says it is the other config's
        state.write_text(json.dumps({**json.loads(state.read_text()), "fingerprint": second.fingerprint()}))
        with pytest.raises(CheckpointError, match="its running average has another shape"):
            next(train(second, folder, base=base))
