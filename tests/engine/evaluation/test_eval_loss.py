"""The losses of samples are those of each sample alone, whatever row it is in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import Sample, collate
from engine.data.row_sizes import Size
from engine.evaluation.eval_loss import EvaluationSet, evaluate
from engine.shape.compute_limits import EVALUATION_ROW_TOKENS, MOST_WIDE_ROWS, evaluation_row_tokens
from engine.shape.layer_plan import evaluation_width
from engine.shape.model_shape import ModelShape


def samples(count=9, seed=0):
    """Return samples of which one has no target, and one only a target that nothing predicts."""
    random = np.random.default_rng(seed)
    found = [Sample(random.integers(1, 100, n), random.random(n) < 0.6) for n in random.integers(5, 40, count)]
    found[2].is_target[:] = False
    found[5].is_target[:] = np.arange(len(found[5].is_target)) == 0
    found[7].is_target[:] = True
    return found


def in_rows(parts):
    return EvaluationSet.of([collate(part) for part in parts])


@pytest.mark.parametrize("sizes", [[9], [4, 3, 2], [8, 1]])
def test_samples_in_shared_rows_have_their_own_losses(base, sizes):
    alone = samples()
    ends = np.cumsum(sizes)
    shared = [alone[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    ours, theirs = evaluate(base, in_rows(shared)), evaluate(base, in_rows([[one] for one in alone]))
    assert ours.evaluation_digest == theirs.evaluation_digest and ours.num_targets == theirs.num_targets
    assert ours.num_targets == tuple(int(one.is_target[1:].sum()) for one in alone)
    assert ours.num_targets[2] == ours.num_targets[5] == 0
    assert ours.sums == pytest.approx(theirs.sums, rel=1e-5) and ours.sums[2] == ours.sums[5] == 0.0
    assert ours.mean == pytest.approx(sum(base.loss(collate([one])).item() for one in alone) / sum(ours.num_targets), rel=1e-5)
    swapped = [1, 0, *range(2, 9)]  # twin
    assert [ours.sums[i] for i in swapped] != pytest.approx(theirs.sums, rel=1e-5)


def test_filler_changes_no_sample_even_where_every_position_is_a_target_row(base):
    rows = [collate(samples()[:4]), collate(samples()[4:])]
    plain = EvaluationSet.of(rows)
    for num_targets in (rows[0].num_targets + 3, 256):
        padded = [Size(256, max(num_targets, row.num_targets), 32).pad(row, 40) for row in rows]
        found = evaluate(base, EvaluationSet(padded, plain.targets_N, plain.row_targets, plain.digest))
        assert found.sums == pytest.approx(evaluate(base, plain).sums, rel=1e-5)


def test_a_set_is_known_by_its_tokens_targets_and_borders():
    def digest(change=lambda made: None):
        made = samples()
        change(made)
        return in_rows([made]).digest

    def moved_border(made):
        ids, targets = (np.concatenate([getattr(one, name) for one in made[:2]]) for name in ("input_ids", "is_target"))
        border = len(made[0].input_ids) - 1
        targets[border : border + 2] = False  # else it would change the labels too
        made[:2] = [Sample(ids[:border], targets[:border]), Sample(ids[border:], targets[border:])]

    def unmoved_border(made):
        made[0].is_target[-1] = made[1].is_target[0] = False

    changes = [
        lambda made: made[3].input_ids.__setitem__(0, 0), lambda made: made[2].is_target.__setitem__(2, True),
        lambda made: made.reverse(), lambda made: made.pop(), moved_border, unmoved_border,
    ]  # fmt: skip
    assert digest() == digest()
    assert digest(moved_border) != digest(unmoved_border)
    assert all(digest(change) != digest() for change in changes[:4])


@pytest.mark.parametrize("trains", [True, False])
def test_the_model_keeps_its_mode(base, trains):
    base.model.train(trains)
    evaluate(base, in_rows([samples()]), before_each=lambda: None)
    assert base.model.training is trains
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(base, in_rows([samples()]), before_each=lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert base.model.training is trains


def test_memory_and_speed_are_predicted_for_the_rows_that_a_narrow_model_evaluates(base, tiny_config):
    """On a card; the CPU, and layers as the library has them, keep rows of EVALUATION_ROW_TOKENS."""
    shape = ModelShape.of(base.model.config.to_dict(), "tiny")
    on_card = replace(base, device=torch.device("cuda"))
    for longest in (64, 100_000):
        predicted = evaluation_row_tokens(longest, evaluation_width(parse(TrainConfig, tiny_config), shape))
        assert on_card.evaluation_row_tokens(longest) == predicted
    assert on_card.evaluation_row_tokens(64) == MOST_WIDE_ROWS * EVALUATION_ROW_TOKENS
    assert base.evaluation_row_tokens(64) == EVALUATION_ROW_TOKENS
    original = parse(TrainConfig, {**tiny_config, "model": {**tiny_config["model"], "layers": "original"}})
    assert evaluation_row_tokens(64, evaluation_width(original, shape)) == EVALUATION_ROW_TOKENS
    assert [evaluation_row_tokens(64, width) for width in (576, 1024, 1536, 2048, 8192)] == [12_288, 8192, 4096, 4096, 4096]
