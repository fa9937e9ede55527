"""A trial's rows, and an evaluation's, come in few sizes whatever the data, and all are recorded before the first step."""

import json

import numpy as np
import pytest

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.data.packing import Cursor, Sample, collate
from engine.data.row_sizes import MOST_SIZES, FewSizes, Size
from engine.evaluation import eval_loss
from engine.training import cuda_graphs
from engine.training.loop import train
from engine.training.recordings import Recordings
from tests.support.fake_recorder import FakeRecorder
from tests.support.trials import build, run, same_numbers

LONGEST = 1024


def one_sample(length, random):
    return collate([Sample(np.ones(length, int), random.random(length) < random.random())])


def test_rows_of_any_distribution_get_at_most_as_many_sizes_as_are_recorded():
    random = np.random.default_rng(0)
    rows = [row for row in (one_sample(n, random) for n in random.integers(2, LONGEST + 1, 1500)) if row.num_targets]
    own = [Size.of(row, LONGEST, LONGEST) for row in rows]
    few = FewSizes.of(own[:1000])
    chosen = [few.size_of(row, size, LONGEST) for row, size in zip(rows, own)]
    assert len(set(own)) > 25 and len(set(chosen)) <= MOST_SIZES  # those that were not looked at, too
    filled = [size.pad(row, LONGEST) for row, size in zip(rows, chosen)]  # raises if a size is too small
    assert sum(row.num_tokens for row in filled) < 1.1 * sum(size.num_tokens for size in own)
    assert all(size == before for size, before in zip(chosen, own) if before in few.sizes)
    assert FewSizes.of(own[:3]).sizes == tuple(sorted(set(own[:3]))) and FewSizes().size_of(rows[0], own[0], 9) == own[0]


def test_a_size_of_whole_samples_holds_no_other_row():
    row, whole = one_sample(512, np.random.default_rng(0)), Size(1024, 1024, 8, 1024)
    assert not whole.holds(row, 1024) and Size(1024, 1024, 8).holds(row, 1024) and not Size(1024, 1024, 1).holds(row, 512)


def test_a_cursor_begins_again_without_moving():
    cursor = Cursor(np.full(5, 8), 8, True, 0)
    expected = [cursor.take(3) for _ in range(4)]
    other = cursor.from_start()
    assert [other.take(3) for _ in range(4)] == expected and (cursor.epoch, cursor.position) == (2, 2)


@pytest.fixture
def ragged(tiny_config, tmp_path, monkeypatch):
    """Return a config whose rows come in many sizes, more than are recorded."""
    monkeypatch.setattr(cuda_graphs, "MAX_OF_A_KIND", 4)
    monkeypatch.setattr("engine.data.row_sizes.MOST_SIZES", 4)
    monkeypatch.setattr("engine.data.row_sizes.MIN_TOKENS", 8)
    monkeypatch.setattr("engine.data.row_sizes.PARTS", 16)
    random = np.random.default_rng(0)
    samples = [("a" * random.integers(1, 30), "b" * random.integers(1, 70)) for _ in range(40)]
    file = tmp_path / "ragged.jsonl"
    file.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in samples))
    graphs = {"cuda_graphs": True, "micro_batch_size": 1, "tokens_per_step": 512, "max_tokens": 3500, "num_reports": 3}
    return build(tiny_config, data={"train": str(file), "packing": False, "format": "auto"}, train=graphs)


def test_rows_that_are_not_packed_are_recorded_before_the_first_step_alone(ragged, tmp_path, base, monkeypatch):
    recorder = FakeRecorder(base, monkeypatch)
    reports = train(ragged, tmp_path / "trial", base=base)
    whole = [next(reports)]
    before = recorder.num_recorded
    whole += list(reports)
    assert recorder.num_recorded == before and len(whole) == 3 and whole[-1].epoch > 1
    Recordings.of(base).clear()
    first = train(ragged, tmp_path / "parts", base=base)
    parts = [next(first), next(first)]
    first.close()
    Recordings.of(base).clear()
    before = recorder.num_recorded
    parts += train(ragged, tmp_path / "parts", base=base)
    assert same_numbers(whole, parts)  # a process that goes on with a trial gives its rows the same filler
    assert recorder.num_recorded - before <= 2 * 4


def test_a_step_of_more_bins_than_an_epoch_has_is_foreseen(ragged, tmp_path, base, monkeypatch):
    recorder = FakeRecorder(base, monkeypatch)
    values = {"train": {"micro_batch_size": 16, "tokens_per_step": 16 * 128}}
    config = build(ragged.model_dump(mode="json"), data={"train_max_samples": 9}, **values)
    reports = train(config, tmp_path / "trial", base=base)
    next(reports)
    before = recorder.num_recorded
    assert len(list(reports)) == 2 and recorder.num_recorded == before


def test_recordings_of_other_data_make_way_for_those_that_a_trial_will_need(ragged, tmp_path, base, monkeypatch):
    recorder = FakeRecorder(base, monkeypatch)
    ragged = build(ragged.model_dump(mode="json"), train={"max_tokens": 1500, "num_reports": 2})
    run(ragged, tmp_path / "first", base)
    texts = "".join(json.dumps({"prompt": "c", "completion": "d" * n}) + "\n" for n in (2, 5, 70, 80, 90, 95) * 8)
    (tmp_path / "other.jsonl").write_text(texts)
    other = build(ragged.model_dump(mode="json"), data={"train": str(tmp_path / "other.jsonl")})
    reports = train(other, tmp_path / "other", base=base)
    next(reports)
    before = recorder.num_recorded
    list(reports)
    assert recorder.num_recorded == before


def test_after_all_were_dropped_the_largest_size_is_recorded_first_again(tiny_config, base, monkeypatch):
    """In the order in which rows come, the pool of recordings would take more memory than was planned."""
    recorder = FakeRecorder(base, monkeypatch)
    layers = attach(base.model, base.linear_names, build(tiny_config).lora, 0)
    graphs = cuda_graphs.make_graphs(base, FlatAdapter(layers, base.dtype).memory, "kind", 512, 128)
    row, larger = (collate([Sample(np.ones(n, int), np.ones(n, bool))] * count) for n, count in ((60, 1), (128, 4)))
    graphs.few = FewSizes.of(Size.of(one, 512, 128) for one in (row, larger))
    base.model.train()
    graphs.backward(row, 1)
    assert list(graphs._kind.rows) == sorted(graphs.few.sizes, reverse=True) and recorder.num_recorded == 2
    detach(base.model, layers)


def test_evaluation_rows_are_of_at_most_as_many_sizes_as_are_recorded():
    random = np.random.default_rng(0)
    rows = [row for row in (one_sample(n, random) for n in random.integers(2, 4097, 800)) if row.num_targets]
    padded = eval_loss._padded(rows, 4096, 4096)
    assert len({Size.padded(row) for row in padded}) <= MOST_SIZES < len({Size.of(row, 4096, 4096, coarse=True) for row in rows})
    assert [int((row.labels_T >= 0).sum()) for row in padded] == [row.num_targets for row in rows]
