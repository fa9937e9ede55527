"""Layers whose products are too far from exact in INT8 are found once for each base, named, and left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.config.matmul import Matmul
from engine.evaluation import matmul_check
from engine.evaluation.matmul_check import exempt_layers
from engine.layers.swap import int8_groups
from engine.model import loaded_check
from engine.model.load import load_base
from engine.model.loaded_check import CHECKS
from engine.quant.bnb import quantize_nf4
from engine.quant.int8_weight import Int8Group, ProbedGroup
from engine.training import loop
from engine.training.loop import train
from tests.support.odd_families import save_odd_family
from tests.support.trials import CPU, build, run, same_numbers

ODD = "model.layers.1.mlp.down_proj"


def give_outlier(base, name: str = ODD) -> None:
    """Make a whole row of the weight tower over the others, so that its product's small values drown."""
    layer = base.model.get_submodule(name)
    weight_OD = layer.dequantized(torch.float32)
    weight_OD[:, 5] *= 3000.0
    layer.weight, layer._nf4 = quantize_nf4(weight_OD, True), None
    base.lasting[CHECKS] = None  # no file has this weight


@pytest.mark.parametrize("mode", [Matmul.INT8_BACKWARD, Matmul.INT8])
def test_no_layer_of_an_ordinary_base_is_exempt_and_the_base_is_left_as_it_was(base, mode, recwarn):
    assert exempt_layers(base, mode) == () and exempt_layers(base, Matmul.BF16) == ()
    assert int8_groups(base.model) == [] and not base.model.training
    assert not [w for w in recwarn if "train.matmul" in str(w.message)]


def test_layers_beside_the_text_decoder_are_neither_named_nor_exempt(tiny_config, tmp_path, recwarn):
    save_odd_family(tmp_path / "model", "mistral3")
    base = load_base(build(tiny_config, model={"path": str(tmp_path / "model")}).model, CPU)
    for mode in (Matmul.INT8_BACKWARD, Matmul.INT8):
        assert exempt_layers(base, mode) == ()
    assert not [w for w in recwarn if "train.matmul" in str(w.message)]
    assert base.set_matmul(Matmul.INT8) == [] and int8_groups(base.model)


def test_errors_are_of_the_mode_s_directions_and_near_those_of_int8(base):
    for mode, directions in ((Matmul.INT8_BACKWARD, {"backward"}), (Matmul.INT8, {"forward", "backward"})):
        base.set_matmul(mode, kind=ProbedGroup)
        errors = matmul_check._errors(base)
        assert set(errors) == set(base.linear_names)
        for found in errors.values():
            assert set(found) == directions and all(0.001 < error < 0.05 for error in found.values())


def test_probing_computes_the_exact_products(base, monkeypatch):
    losses = []
    for mode, kind in ((Matmul.BF16, Int8Group), (Matmul.INT8, ProbedGroup), (Matmul.INT8, Int8Group)):
        base.set_matmul(mode, kind=kind)
        base.model.train()
        (row,) = matmul_check._rows(base)
        losses.append(float(base.loss(matmul_check.collate(row))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] != pytest.approx(losses[0], rel=1e-6)


def test_a_layer_that_is_far_off_is_exempt_named_and_found_once(base, monkeypatch):
    give_outlier(base)
    with pytest.warns(UserWarning, match=rf"train\.matmul = int8: stay in torch\.float32: {ODD} \(forward \d+% off") as told:
        assert exempt_layers(base, Matmul.INT8) == (ODD,)
    assert len(told) == 1
    monkeypatch.setattr(matmul_check, "_reasons", lambda *_: pytest.fail("asked again"))
    assert exempt_layers(base, Matmul.INT8) == (ODD,)


def test_another_process_finds_and_names_what_the_first_one_found(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(matmul_check, "_reasons", lambda _, mode: asked.append(mode) or {ODD: "forward 9% off"})
    for _ in range(2):  # each loads the base
        base = load_base(build(tiny_config).model, CPU)
        with pytest.warns(UserWarning, match=rf"{ODD} \(forward 9% off\)"):
            assert exempt_layers(base, Matmul.INT8) == (ODD,)
    assert asked == [Matmul.INT8]
    with pytest.warns(UserWarning):
        exempt_layers(base, Matmul.INT8_BACKWARD)
    assert asked == [Matmul.INT8, Matmul.INT8_BACKWARD]


def test_what_was_found_is_not_taken_for_another_card_or_other_versions(base, monkeypatch):
    def name(card: str, libraries: dict[str, str]) -> str | None:
        monkeypatch.setattr(loaded_check, "computed_by", lambda: libraries)
        monkeypatch.setattr(loaded_check.platform, "machine", lambda: card)
        return loaded_check.KnownChecks(folder, {}, CPU, False).name("matmul", mode="int8")

    folder = Path(base.config.path)
    names = {name(card, {"torch": torch_version}) for card in "ab" for torch_version in "12"}
    assert len(names) == 4 and name("a", {"torch": "1"}) in names


def test_a_trial_keeps_its_exempt_layers_when_it_goes_on(tiny_config, tmp_path, monkeypatch):
    config = build(tiny_config, train={"matmul": "int8", "max_tokens": 512, "num_reports": 2})
    monkeypatch.setattr(loop, "exempt_layers", lambda *_: (ODD,))
    whole = run(config, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    generator = train(config, tmp_path / "parts")
    parts = [next(generator)]
    generator.close()
    state = json.loads((tmp_path / "parts" / "checkpoint" / "state.json").read_text())
    assert ODD in json.dumps(state)
    monkeypatch.setattr(loop, "exempt_layers", lambda *_: ())  # another card, say
    parts += train(config, tmp_path / "parts")
    assert same_numbers(whole, parts)
    assert not same_numbers(whole, run(config, tmp_path / "none"))
