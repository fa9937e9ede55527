"""Recordings serve trial after trial, change no number, and make way when memory is short."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.adapter.flat import AdapterMemory, FlatAdapter
from engine.adapter.lora import LoraLinear, attach, detach
from engine.config.trial import LoraConfig
from engine.data.packing import Sample, collate
from engine.layers.swap import FusedLayer
from engine.model.base import Base
from engine.model.load import load_base
from engine.training import cuda_graphs, passes, recordings
from engine.training.loop import train
from engine.training.recordings import MAX_OF_ALL, RecordedRow, Recordings
from tests.support.fake_recorder import FakeRecorder
from tests.support.trials import CPU, build, run, same_numbers


def small(tiny_config, rank=4, rate=1e-2, **lora):
    return build(
        tiny_config, lora={"rank": rank, **lora}, optim={"learning_rate": rate},
        train={"cuda_graphs": True, "micro_batch_size": 1, "max_tokens": 512, "num_reports": 2},
    )  # fmt: skip


@pytest.fixture
def recorder(base, monkeypatch):
    return FakeRecorder(base, monkeypatch)


def test_trials_share_recordings_and_have_the_numbers_of_trials_alone(tiny_config, tmp_path, base, recorder):
    trials = [
        small(tiny_config, lora_alpha=8),
        small(tiny_config, lora_alpha=32, rate=3e-3),
        small(tiny_config, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]),
        small(tiny_config, lora_alpha=3, rate=2e-2),
        small(tiny_config, rank=8, lora_dropout=0.1),
        small(tiny_config, rank=8, lora_dropout=0.4),
    ]
    made, alone = [], load_base(trials[0].model, CPU)
    for number, config in enumerate(trials):
        before = recorder.num_recorded
        shared = run(config, tmp_path / f"shared{number}", base)
        made.append(recorder.num_recorded - before)
        assert same_numbers(shared, run(config, tmp_path / f"alone{number}", alone)) and not len(Recordings.of(alone))
    # other values, scaling, rate and dropout rate find recordings; other targets or ranks do not
    assert made[0] > 0 and made[2] > 0 and made[4] > 0 and made[1] == made[3] == made[5] == 0
    assert recorder.num_replayed > recorder.num_recorded


def test_a_rare_size_is_recorded_in_the_place_of_another_and_changes_no_number(tiny_config, base, recorder, monkeypatch):
    """Beside the recordings' pool, a row that is not recorded would take its activations again."""
    monkeypatch.setattr(cuda_graphs, "MAX_OF_A_KIND", 2)
    config = small(tiny_config)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter = FlatAdapter(layers, base.dtype)
    base.model.train()
    graphs = cuda_graphs.make_graphs(base, adapter.memory, "kind", 512, 128)
    random = np.random.default_rng(0)
    rows = [collate([Sample(random.integers(1, 100, 60), np.ones(60, bool)) for _ in range(n)]) for n in (8, 1, 4, 8, 4, 1)]
    losses = [graphs.backward(row, 1).item() for row in rows]
    assert recorder.num_replayed == len(rows) and len(Recordings.of(base)) == 2
    assert losses == pytest.approx([base.loss(row).item() for row in rows], rel=1e-5)
    detach(base.model, layers)


def test_nothing_is_recorded_after_the_first_step(tiny_config, tmp_path, base, recorder):
    reports = train(small(tiny_config), tmp_path, base=base)
    next(reports)
    before = recorder.num_recorded
    list(reports)
    assert recorder.num_recorded == before > 1


@pytest.mark.parametrize("graphs", [False, True])
def test_a_trial_with_dropout_goes_on_with_the_same_numbers(tiny_config, tmp_path, base, recorder, graphs):
    config = small(tiny_config, lora_dropout=0.2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graphs": graphs})})
    whole = run(config, tmp_path / "whole", base)
    first = train(config, tmp_path / "parts", base=base)
    (tmp_path / "parts").mkdir()
    parts = [next(first)]
    first.close()
    if graphs:
        Recordings.of(base).clear()
    parts += train(config, tmp_path / "parts", base=base)
    assert same_numbers(whole, parts)
    other = run(small(tiny_config, lora_dropout=0.0), tmp_path / "other", base)
    assert not same_numbers(whole[:1], other[:1])


@pytest.mark.parametrize(("dropout", "is_older", "is_told"), [(0.2, True, True), (0.2, False, False), (0.0, True, False)])
def test_a_trial_goes_on_with_masks_other_than_an_older_version_s_and_says_so(
    tiny_config, tmp_path, base, capsys, dropout, is_older, is_told
):
    reports = train(small(tiny_config, lora_dropout=dropout), tmp_path, base=base)
    next(reports)
    reports.close()
    state = tmp_path / "checkpoint" / "state.json"
    values = json.loads(state.read_text())
    assert values.pop("masks")
    if is_older:
        state.write_text(json.dumps(values))
    assert len(list(train(small(tiny_config, lora_dropout=dropout), tmp_path, base=base))) == 1
    assert ("older version" in capsys.readouterr().err) == is_told


def test_masks_depend_on_seed_step_and_micro_batch_alone(base):
    layers = attach(base.model, base.linear_names, LoraConfig(rank=4, lora_dropout=0.5), 0)
    adapter = FlatAdapter(layers, base.dtype)
    with torch.no_grad():
        adapter.parameter += 0.1
    adapter.refresh()
    base.model.train()
    row = collate([Sample(np.arange(60), np.arange(60) > 3)])

    def loss(*place):
        adapter.draw_masks(*place)
        return base.loss(row).item()

    one = loss(0, 0, 0)
    assert len({one, loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)}) == 4
    torch.manual_seed(7)
    assert loss(0, 0, 0) == one
    detach(base.model, layers)


def test_what_a_recording_must_read_from_the_device_is_there(base):
    layers = attach(base.model, base.linear_names, LoraConfig(rank=4, lora_dropout=0.5), 0)
    adapter = FlatAdapter(layers, base.dtype)
    base.model.train()
    groups = []
    from engine.layers.projection_group import ProjectionGroup

    for layer in (module for module in base.model.modules() if isinstance(module, FusedLayer)):
        groups += [ProjectionGroup.of(members, base.dtype) for members in layer.projections().values()]
    adapted = [group for group in groups if group.is_adapted]
    assert adapted and all(g.noise is adapter.memory.noise for g in adapted)
    read = [scaling for g in adapted for scaling, pair in zip(g.scalings, g.adapters, strict=True) if pair is not None]
    own = adapter.memory.scalings.untyped_storage().data_ptr()
    assert len(read) == len(layers) and {scaling.untyped_storage().data_ptr() for scaling in read} == {own}
    assert len({scaling.data_ptr() for scaling in read}) == len(read)
    assert len({g.stream for g in adapted}) == len(adapted)
    detach(base.model, layers)


def test_memory_of_one_adapter_is_refused_for_another(base):
    layers = attach(base.model, base.linear_names, LoraConfig(rank=4), 0)
    memory = AdapterMemory(layers, base.dtype)
    detach(base.model, layers)
    layers = attach(base.model, base.linear_names, LoraConfig(rank=8), 0)
    with pytest.raises(ValueError, match="does not fit"):
        FlatAdapter(layers, base.dtype, memory)
    detach(base.model, layers)


def test_out_of_memory_drops_the_recordings_of_earlier_trials_first(tiny_config, tmp_path, base, recorder):
    config, other = small(tiny_config), small(tiny_config, rank=8)
    run(other, tmp_path / "other", base)
    recorder.fault = torch.OutOfMemoryError("full")
    reports = run(config, tmp_path / "short", base)
    assert reports[-1].num_out_of_memory == 0
    assert {kind.memory.key for kind in Recordings.of(base)._kinds.values()} == {
        kind.memory.key for kind in list(Recordings.of(base)._kinds.values())[:1]
    }
    assert same_numbers(reports, run(config, tmp_path / "alone"))


@pytest.mark.parametrize("recorded", [True, False])
def test_an_adapter_that_finds_no_room_beside_earlier_recordings_takes_theirs(
    tiny_config, tmp_path, base, recorder, monkeypatch, recorded
):
    if recorded:
        run(small(tiny_config), tmp_path / "earlier", base)
    whole = AdapterMemory.__init__

    def short(self, *given):
        if not recorded or len(Recordings.of(base)):
            raise torch.OutOfMemoryError("full")
        whole(self, *given)

    monkeypatch.setattr(AdapterMemory, "__init__", short)
    if recorded:
        reports = run(small(tiny_config, rank=8), tmp_path / "larger", base)
        assert reports[-1].num_out_of_memory == 0 and len(Recordings.of(base))
    else:
        with pytest.raises(torch.OutOfMemoryError):
            run(small(tiny_config, rank=8), tmp_path / "larger", base)
        assert not any(isinstance(module, LoraLinear) for module in base.model.modules())


def test_out_of_memory_without_earlier_recordings_changes_the_plan(tiny_config, tmp_path, base, recorder):
    recorder.fault = torch.OutOfMemoryError("full")
    reports = run(small(tiny_config), tmp_path / "short", base)
    assert reports[-1].num_out_of_memory == 1 and reports[-1].activation_checkpointing == "selective"
    without = run(build(tiny_config, train={"max_tokens": 512, "num_reports": 2, "micro_batch_size": 1}), tmp_path / "without")
    assert [r.eval_loss for r in reports] == pytest.approx([r.eval_loss for r in without], rel=1e-5)


def test_an_evaluation_that_runs_out_of_memory_is_computed_without_recordings(tiny_config, tmp_path, base, recorder, monkeypatch):
    config, evaluate, calls = small(tiny_config), passes.evaluate, []

    def short_once(base, samples, before_each, losses_of=None):
        calls.append(losses_of)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("full")
        return evaluate(base, samples, before_each, losses_of)

    monkeypatch.setattr(passes, "evaluate", short_once)
    reports = run(config, tmp_path / "short", base)
    assert calls[0] is not None and calls[1:] == [None] * 2  # twice: the first rung again, and the second
    assert same_numbers(reports, run(config, tmp_path / "alone"))


def test_a_trial_still_has_dropout_after_an_evaluation_ran_out_of_memory(tiny_config, tmp_path, base, recorder, monkeypatch):
    config, whole, left = small(tiny_config, lora_dropout=0.3), Base.target_losses, [1]

    def short_once(self, batch):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("full")
        return whole(self, batch)

    monkeypatch.setattr(Base, "target_losses", short_once)
    reports = run(config, tmp_path / "short", base)
    assert not left and same_numbers(reports, run(config, tmp_path / "alone"))


def test_whether_an_evaluation_waits_is_tried_once_and_takes_no_random_number_of_the_trial(monkeypatch):
    model, modes = torch.nn.Dropout(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    of_trial = passes.Passes.__new__(passes.Passes)
    of_trial._recordings, of_trial._samples = Recordings(CPU), SimpleNamespace(batches=[torch.ones(4)])
    loss = lambda row: modes.append(model.training) or model(row)  # noqa: E731
    of_trial._base = SimpleNamespace(model=model, device=SimpleNamespace(type="cuda"), loss=loss)
    of_trial._samples.batches[0].to = lambda device: torch.ones(4)
    before = torch.get_rng_state()
    assert of_trial._evaluation_waits() is of_trial._evaluation_waits() is True
    assert modes == [False, False] and model.training and torch.equal(before, torch.get_rng_state())


def test_recordings_that_read_dropped_weights_are_dropped(base):
    layers = attach(base.model, base.linear_names, LoraConfig(rank=4), 0)
    memory, kept = AdapterMemory(layers, base.dtype), Recordings(CPU)
    detach(base.model, layers)
    row = RecordedRow(None, torch.zeros(()))
    kept.kind("a", memory, {(0, "qkv"): 16}).rows[1] = row
    assert kept.kind("a", memory, {(0, "qkv"): 16, (1, "qkv"): 32}).rows == {1: row}  # more weights are no harm
    assert kept.kind("a", memory, {(0, "qkv"): 16}).rows == {}  # it may have read those of layer 1
    kept.kind("a", memory, {(0, "qkv"): 16}).rows[1] = row
    assert kept.kind("b", memory, {(0, "qkv"): 48}).rows == {} and len(kept) == 0


def test_only_so_many_recordings_and_so_much_idle_memory_are_kept(base, monkeypatch):
    kept, memories = Recordings(CPU), []
    for rank in (4, 8):
        layers = attach(base.model, base.linear_names, LoraConfig(rank=rank), 0)
        memories.append(AdapterMemory(layers, base.dtype))
        detach(base.model, layers)
    for number in range(5):
        kind = kept.kind(number, memories[number < 2], {})
        kind.rows.update({size: RecordedRow(None, torch.zeros(())) for size in range(10)})
        kept.trim(memories[0])
    assert len(kept) <= MAX_OF_ALL and len(kept.kind(4, memories[0], {}).rows) == 10 and not kept.kind(0, memories[1], {}).rows
    assert kept.idle_bytes(memories[0]) == memories[1].num_bytes
    monkeypatch.setattr(recordings, "MAX_IDLE_GIB", 0.0)
    kept.trim(memories[0])
    assert kept.idle_bytes(memories[0]) == 0 and len(kept) > 0
    assert kept.clear() and len(kept) == 0 and not kept.clear()


def test_more_recordings_are_kept_while_a_plan_leaves_room(base, monkeypatch):
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    layers = attach(base.model, base.linear_names, LoraConfig(rank=4), 0)
    memory, kept = AdapterMemory(layers, base.dtype), Recordings(CPU)
    detach(base.model, layers)
    kept.can_record, row = True, RecordedRow(None, torch.zeros(()))
    kept.kind("a", memory, {}).rows.update(dict.fromkeys(range(10), row))
    kept.drop_if_short("b", memory, 3.0, 23.0)
    for number in range(5):
        kept.kind(number, memory, {}).rows.update(dict.fromkeys(range(10), row))
        kept.trim(memory)
    assert len(kept) == 60  # 28 beyond MAX_OF_ALL take 0.33 of the 20 GiB that are free
    kept.drop_if_short("b", memory, 22.9, 23.0)
    assert 0 < len(kept) <= MAX_OF_ALL
    kept.drop_if_short("b", memory, 23.1, 23.0)
    assert len(kept) == 0
