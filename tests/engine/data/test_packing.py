"""Rows hold whole samples, each once per epoch, and a cursor can continue anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packing import Cursor, Sample, collate, padded, plan_epoch, plan_once
from engine.kernels.ops import IGNORE


def test_no_label_crosses_the_border_between_samples():
    one = Sample(np.array([1, 2, 3]), np.array([False, True, True]))
    two = Sample(np.array([4, 5]), np.array([True, True]))
    batch = collate([one, two])
    assert batch.labels_T.tolist() == [2, 3, IGNORE, 5, IGNORE]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.document_offsets.tolist() == [0, 3, 5]
    assert batch.num_targets == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_sample_once_and_no_row_overflows(lengths, epoch, packing):
    lengths = np.array(lengths)
    bins = plan_epoch(lengths, 64, packing, seed=1, epoch=epoch)
    assert sorted(i for one_bin in bins for i in one_bin) == list(range(len(lengths)))
    assert all(lengths[one_bin].sum() <= 64 for one_bin in bins)
    assert bins == plan_epoch(lengths, 64, packing, seed=1, epoch=epoch)
    assert [i for row in plan_once(lengths, 64) for i in row] == list(range(len(lengths)))


def test_packing_fills_rows_well():
    lengths = np.random.default_rng(0).integers(10, 300, 2000)
    bins = plan_epoch(lengths, 512, True, seed=0, epoch=0)
    assert lengths.sum() / (512 * len(bins)) > 0.95


def test_a_cursor_goes_on_where_another_stopped():
    lengths = np.full(10, 8)
    whole = Cursor(lengths, 16, True, seed=3)
    places, expected = [], []
    for _ in range(12):
        places.append((whole.epoch, whole.position))
        expected.append(whole.take(2))
    for i in (0, 3, 7, 11):
        again = Cursor(lengths, 16, True, seed=3)
        again.seek(*places[i])
        assert [again.take(2) for _ in expected[i:]] == expected[i:]


def test_a_step_has_all_its_bins_also_where_an_epoch_ends():
    lengths = np.full(10, 8)  # five bins of two
    whole, parts = Cursor(lengths, 16, True, seed=3), Cursor(lengths, 16, True, seed=3)
    assert [len(whole.take(3)) for _ in range(4)] == [3, 3, 3, 3]
    whole.seek(0, 0)
    assert whole.take(12) == [one for _ in range(12) for one in parts.take(1)]
    assert (whole.epoch, whole.position) == (parts.epoch, parts.position) == (2, 2)


def test_filler_has_no_targets_and_no_sample_changes_its_place():
    samples = [Sample(np.arange(n) + 5, np.arange(n) > 2) for n in (7, 4)]
    row = collate(samples)
    whole = padded(row, num_tokens=32, num_targets=9, num_documents=8, longest=8)
    assert whole.document_lengths == (7, 4, 8, 8, 5)
    assert whole.document_offsets.tolist() == [0, 7, 11, 19, 27, 32, 32, 32, 32]
    assert whole.num_tokens == 32 and whole.num_targets == 9
    assert whole.input_ids_T[:11].equal(row.input_ids_T) and whole.target_rows[: row.num_targets].equal(row.target_rows)
    assert (whole.labels_T[11:] == IGNORE).all() and whole.position_ids_T[11:20].tolist() == [*range(8), 0]
    assert len(set(whole.target_rows.tolist())) == 9
    for numbers in ((10, 9, 8), (32, 4, 8), (32, 40, 8), (32, 9, 4)):
        with pytest.raises(ValueError, match="can only be padded"):
            padded(row, *numbers, longest=8)
