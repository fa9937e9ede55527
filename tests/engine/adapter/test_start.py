"""A trial starts from a trained adapter with that adapter's own losses, and learns on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.adapter.start import start_from
from engine.config.trial import LoraConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import InputError, InputsChanged
from engine.prepare import prepare
from engine.training.loop import train
from tests.support.export_models import save_adapter
from tests.support.trials import build, run, same_numbers

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save_adapter(tmp_path_factory.mktemp("start") / "adapter", tiny_model_dir, target_modules=TARGETS, use_rslora=True)


def starting(tiny_config, folder, **lora):
    return build(tiny_config, lora={"rank": 4, "target_modules": TARGETS, "start_from": str(folder), **lora})


def products(layers):
    return {name: layer.scaling * (layer.lora_b @ layer.lora_a).detach() for name, layer in layers.items()}


@pytest.mark.parametrize("lora", [{}, {"lora_alpha": 3.0}, {"rank": 8}, {"rank": 8, "use_rslora": True}])
def test_the_product_is_the_adapter_s_whatever_rank_and_scaling(tiny_config, folder, base, lora):
    config = starting(tiny_config, folder, **lora)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    drawn = {name: layer.lora_a.detach().clone() for name, layer in layers.items()}
    start_from(layers, config.lora)
    found, rank = products(layers), config.lora.rank
    detach(base.model, layers)
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    for name, product in found.items():
        a, b = (saved[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
        torch.testing.assert_close(product, 8 / 4**0.5 * (b @ a), rtol=1e-5, atol=1e-6)
        assert torch.equal(layers[name].lora_a[4:], drawn[name][4:]) and not layers[name].lora_b[:, 4:].any()
        assert layers[name].lora_b.shape[1] == rank


def test_a_smaller_rank_of_one_layer_is_filled_up_with_rows_that_can_learn(tiny_config, tmp_path, tiny_model_dir, base):
    given = save_adapter(tmp_path / "a", tiny_model_dir, target_modules=TARGETS, rank_pattern={"v_proj": 2})
    config = starting(tiny_config, given)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    start_from(layers, config.lora)
    for name, layer in layers.items():
        assert layer.lora_a.any(dim=1).all()
        assert int(layer.lora_b.any(dim=0).sum()) == (2 if name.endswith("v_proj") else 4)
    detach(base.model, layers)


def test_training_on_has_the_losses_of_peft(tiny_config, folder, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = starting(tiny_config, folder, use_rslora=True, lora_alpha=8.0)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    start_from(layers, config.lora)
    adapter = FlatAdapter(layers, base.dtype)
    view, _ = load_data(config.data, base.tokenizer)
    from engine.model.load import nf4_load_config

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=nf4_load_config(True, torch.float32), device_map={"": "cpu"}, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    ours, theirs = (torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0) for p in (
        [adapter.parameter], [p for p in model.parameters() if p.requires_grad]))  # fmt: skip
    base.model.train()
    model.train()
    losses = []
    for step in range(8):
        row = collate([view[step % len(view)]])
        loss = base.loss(row.to(base.device)) / row.num_targets
        logits = model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float()
        other = torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100) / row.num_targets
        losses.append((loss.item(), other.item()))
        for one, optimizer in ((loss, ours), (other, theirs)):
            one.backward()
            optimizer.step()
        adapter.refresh()
        adapter.zero_grad()
        theirs.zero_grad()
    detach(base.model, layers)
    mine, peft = torch.tensor(losses).T
    torch.testing.assert_close(mine, peft, rtol=2e-4, atol=2e-4)


def test_a_second_stage_goes_on_where_the_first_ended(tiny_config, tmp_path, base):
    first = run(build(tiny_config), tmp_path / "first", base)
    config = build(tiny_config, lora={"start_from": str(tmp_path / "first/adapter"), "rank": 8}, optim={"learning_rate": 1e-9})
    again = run(config, tmp_path / "second", base)
    assert again[0].eval_loss == pytest.approx(min(report.eval_loss for report in first), abs=1e-5)
    learning = config.model_copy(update={"optim": build(tiny_config).optim})
    assert run(learning, tmp_path / "third", base)[-1].eval_loss < again[-1].eval_loss - 0.01
    assert config.fingerprint() != build(tiny_config, lora={"rank": 8}, optim={"learning_rate": 1e-9}).fingerprint()


def test_a_resume_has_the_same_numbers_and_another_adapter_is_refused(tiny_config, tmp_path, folder, base, tiny_model_dir):
    config = starting(tiny_config, folder)
    digests = prepare([config]).data
    whole = list(train(config, tmp_path, base=base, inputs=digests))
    assert "adapter" in digests and same_numbers(run(config, tmp_path / "other", base), whole)
    other = save_adapter(tmp_path / "b", tiny_model_dir, target_modules=TARGETS, lora_alpha=4)
    changed = {**digests, "adapter": prepare([starting(tiny_config, other)]).data["adapter"]}
    with pytest.raises(InputsChanged, match=r"lora\.start_from = .*the adapter that trials start from changed"):
        list(train(config, tmp_path / "new", base=base, inputs=changed))


def test_a_digest_stands_for_the_files_wherever_they_lie_and_refuses_others(tiny_config, tmp_path, folder, base):
    digest = prepare([starting(tiny_config, folder)]).data["adapter"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    there, here = (starting(tiny_config, place, start_digest=digest) for place in (folder, copy))
    assert there.fingerprint() == here.fingerprint() != starting(tiny_config, folder).fingerprint()
    whole, steps = run(there, tmp_path / "whole", base), iter(train(there, tmp_path / "moved", base=base))
    next(steps)
    steps.close()
    sweep_s = {"adapter": "0" * 16}  # what the sweep's other trials start from
    assert same_numbers(list(train(here, tmp_path / "moved", base=base, inputs=sweep_s))[-1:], whole[-1:])
    (copy / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    with pytest.raises(InputError, match=f"must be the adapter of lora.start_digest = {digest}, and has files of digest"):
        list(train(here, tmp_path / "new", base=base))
    shutil.rmtree(copy)
    with pytest.raises(InputError, match="holds no adapter any more; put the former back"):
        prepare([here])
    with pytest.raises(InputError, match=r"lora\.start_digest = .*: needs lora\.start_from"):
        build(tiny_config, lora={"start_digest": digest})
    with pytest.raises(InputError, match=r"lora\.start_digest = 'abc': must be 16 hexadecimal digits"):
        build(tiny_config, lora={"start_from": str(folder), "start_digest": "abc"})


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"rank": 2}, "has rank 4 in .*, above lora.rank = 2: take"),
        ({"target_modules": [*TARGETS, "o_proj"]}, r"o_proj is one that it does not adapt; .*\[down_proj,q_proj,v_proj\]"),
        ({"target_modules": ["q_proj"]}, "is one that it adapts too"),
        ({"start_from": "nowhere"}, "adapter_config.json is not in it"),
    ],
)
def test_what_does_not_fit_is_one_line_before_a_trial(tiny_config, folder, lora, why):
    with pytest.raises(InputError, match=why) as caught:
        prepare([starting(tiny_config, folder, **lora)])
    assert caught.value.field == "lora.start_from" and "\n" not in str(caught.value)


def test_dora_and_another_model_are_refused_and_another_name_is_told(tiny_config, tmp_path, folder):
    values = json.loads((folder / "adapter_config.json").read_text())
    for name, change in {"dora": {"use_dora": True}, "moved": {"base_model_name_or_path": "org/elsewhere"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=r"lora\.start_from = .*use_dora"):
        prepare([starting(tiny_config, tmp_path / "dora")])
    assert any("'org/elsewhere'" in note for note in prepare([starting(tiny_config, tmp_path / "moved")]).model_notes)
    assert not any("lora.start_from" in note for note in prepare([starting(tiny_config, folder)]).model_notes)


def test_a_larger_model_s_adapter_is_refused_by_its_first_layer(base):
    from engine.adapter.portable import Adapter
    from engine.adapter.start import check_start

    name = base.linear_names[0]
    odd = Adapter({name: (torch.zeros(2, 7), torch.zeros(9, 2))}, 2, 4.0, "m", None, {})
    with pytest.raises(InputError, match=r"of \(out, in\) features \(9, 7\), and this model's is \(8, 7\): take its own base"):
        check_start(odd, LoraConfig(start_from="x"), [name], {name: (8, 7)})
