"""Padded rows for CUDA graphs give the numbers of the original rows, in few sizes."""

import copy

import numpy as np
import pytest
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import Sample, collate
from engine.data.row_sizes import Size
from engine.data.views import load_data
from engine.errors import InputError
from engine.evaluation.eval_loss import evaluate, evaluation_batches
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model.load import load_base
from engine.sample_losses import read_sample_losses
from engine.training import recordings
from engine.training.cuda_graphs import make_graphs
from engine.training.loop import train
from engine.training.passes import Passes
from engine.training.recordings import Recordings


@pytest.fixture
def config(tiny_config):
    return parse(TrainConfig, copy.deepcopy(tiny_config))


def rows(number, longest=60, seed=0):
    """Return packed rows of one to four samples, with a target at about 60 % of the positions."""
    random = np.random.default_rng(seed)
    samples = [[Sample(random.integers(1, 100, n), random.random(n) < 0.6) for n in random.integers(8, longest, count)]
               for count in random.integers(1, 5, number)]  # fmt: skip
    return [collate(row) for row in samples]


def test_padded_rows_have_the_loss_and_gradient_of_the_rows(config):
    base = load_base(config.model, torch.device("cpu"))
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter = FlatAdapter(layers, base.dtype)
    with torch.no_grad():
        adapter.parameter += 0.01 * torch.randn(adapter.parameter.shape, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    base.model.train()
    graphs, sizes = make_graphs(base, adapter.memory, 0, 256, 60), set()
    for row in rows(4):
        loss = base.loss(row)
        (loss / row.num_targets).backward()
        truth = adapter.parameter.grad.clone()
        adapter.zero_grad()
        ours = graphs.backward(row, row.num_targets)
        sizes.add(Size.of(row, 256, 60).num_tokens)
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapter.parameter.grad, truth, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(base.loss(Size.fine(row, 256, 60).pad(row, 60)), loss, rtol=1e-5, atol=1e-5)
        other = base.loss(collate([Sample(row.input_ids_T.numpy(), row.labels_T.numpy() != -100)])).detach()
        # attention across samples shows
        assert row.num_tokens < 61 or not torch.allclose(ours, other, rtol=1e-5)
        adapter.zero_grad()
    detach(base.model, layers)
    assert sizes <= {128, 256} and sizes


def test_few_sizes_occur():
    assert len({Size.of(row, 256, 60) for row in rows(400)}) <= 8
    for row in rows(50):
        Size.of(row, 256, 60).pad(row, 60)  # raises if too small


def test_no_row_is_padded_beyond_the_capacity_that_memory_is_planned_for():
    for capacity in (60, 130, 300, 700, 1000, 1100, 1500, 4100, 8191):
        sizes = {Size.around(n, n // 2, 1, capacity, capacity).num_tokens for n in range(1, capacity + 1)}
        assert max(sizes) == capacity and len(sizes) <= 8
        assert all(Size.around(n, n, 1, capacity, capacity).num_tokens >= n for n in range(1, capacity + 1))
    row = collate([Sample(np.ones(n, int), np.ones(n, bool)) for n in (700, 400)])
    assert Size.of(row, 1100, 1100).pad(row, 1100).num_tokens == 1100  # full: no filler


def test_rows_that_are_not_recorded_come_in_multiples_of_64_within_the_capacity():
    for row in rows(50):
        size = Size.fine(row, 250, 60)
        filled = size.pad(row, 60)
        assert size.num_tokens % 64 == 0 or size.num_tokens == 250
        assert row.num_tokens <= size.num_tokens <= 250 and size.num_tokens - row.num_tokens < 64
        assert row.num_targets <= filled.num_targets < row.num_targets + 64 and (filled.labels_T != -100).sum() == row.num_targets
        assert len(filled.document_lengths) == size.num_documents  # no empty samples behind
    assert Size.fine(row, 1, 60).num_tokens == row.num_tokens  # longer than planned: as it is


@pytest.mark.parametrize("changes", [{}, {"data": {"packing": False}}])
def test_a_trial_whose_unrecorded_rows_have_filler_has_the_same_losses(tiny_config, tmp_path, monkeypatch, changes):
    values = copy.deepcopy(tiny_config)
    for section, fields in changes.items():
        values[section].update(fields)
    follow, found = Passes.follow, {}
    for pads in (False, True):

        def follow_and_set(self, *given, pads=pads):
            follow(self, *given)
            self.pads_unrecorded = pads

        monkeypatch.setattr(Passes, "follow", follow_and_set)
        reports = list(train(parse(TrainConfig, copy.deepcopy(values)), tmp_path / str(pads)))
        found[pads] = [(report.train_loss, report.eval_loss, report.tokens_seen) for report in reports]
    assert np.allclose(found[False], found[True], rtol=1e-5)


def test_a_row_of_whole_samples_is_a_size_of_its_own():
    whole, other = ([Sample(np.ones(n, int), np.ones(n, bool)) for n in lengths] for lengths in ((256, 256), (256, 200, 56)))
    size, mixed = (Size.of(collate(samples), 512, 256) for samples in (whole, other))
    assert size.whole == 256 and size.lengths == (256, 256) and mixed.whole == 0 and size.num_tokens == mixed.num_tokens == 512
    assert size == Size.around(512, 512, 2, 512, 256)  # known before the row is there
    assert [Size.of(collate(whole[:1]), capacity, 256).whole for capacity in (512, 4096)] == [256, 0]  # the second has filler
    assert Size.of(collate(whole), 600, 300).whole == 0 and Size.around(600, 600, 2, 600, 300).whole == 0  # no lengths that recur


@pytest.mark.gpu
def test_recorded_rows_of_whole_samples_have_the_gradient_of_other_rows(config):
    base = load_base(config.model, torch.device("cuda"))
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter, random = FlatAdapter(layers, base.dtype), np.random.default_rng(0)
    with torch.no_grad():
        adapter.parameter += 0.01
    adapter.refresh()
    base.model.train()
    graphs, found = make_graphs(base, adapter.memory, 0, 512, 256), []
    row = collate([Sample(random.integers(1, 100, 256), np.ones(256, bool)) for _ in range(2)])
    on_device = row.to(base.device)
    plainly = lambda: (base.loss(on_device) / row.num_targets).backward()  # noqa: E731
    for compute in (lambda: graphs.backward(row, row.num_targets), plainly):
        compute()
        found.append(adapter.parameter.grad.clone())
        adapter.zero_grad()
    assert len(Recordings.of(base)) == 1 and (found[0] - found[1]).norm() < 0.02 * found[1].norm()
    detach(base.model, layers)


@pytest.mark.parametrize("changes", [{"train": {"host_layers": 1}}, {"train": {"activation_checkpointing": "offload"}}])
def test_what_cannot_be_recorded_is_refused_where_it_is_demanded(tiny_config, changes):
    values = copy.deepcopy(tiny_config)
    values["train"]["cuda_graphs"] = True
    parse(TrainConfig, values)
    for section, fields in changes.items():
        values.setdefault(section, {}).update(fields)
    with pytest.raises(InputError, match="cuda_graphs = True: needs train.host_layers = 0"):
        parse(TrainConfig, values)


def trial(tiny_config, folder, device, base=None, lora=None, **changes):
    values = copy.deepcopy(tiny_config)
    del values["train"]["tokens_per_step"]
    one_by_one = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    values["train"].update({"device": device, "activation_checkpointing": False, **one_by_one, **changes})
    values["lora"].update(lora or {})
    folder.mkdir()
    return [r.eval_loss for r in train(parse(TrainConfig, values), folder, base=base)]


def test_a_trial_over_padded_rows_is_the_trial(tiny_config, tmp_path):
    plain = trial(tiny_config, tmp_path / "plain", "cpu", cuda_graphs=False)
    assert trial(tiny_config, tmp_path / "padded", "cpu", cuda_graphs=True) == pytest.approx(plain, rel=1e-5)


def test_a_model_that_cannot_be_recorded_is_computed_without(config, monkeypatch):
    from contextlib import contextmanager, nullcontext
    from types import SimpleNamespace

    @contextmanager
    def graph(*_, pool=None, **__):
        yield
        if pool is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    stream, undone = SimpleNamespace(wait_stream=lambda other: None), []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: undone.append("claim"))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: undone.append("pool"))
    monkeypatch.setattr(Recordings, "pool", (0, 1))
    monkeypatch.setattr(Recordings, "start_over", lambda self: undone.append("start"))
    for name, value in {
        "current_stream": lambda: stream, "stream": lambda s: nullcontext(), "CUDAGraph": SimpleNamespace,
        "graph": graph, "set_stream": lambda s: undone.append(s), "current_device": lambda: "cpu",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("engine.training.cuda_graphs._side_stream", lambda device: stream)
    base = load_base(config.model, torch.device("cpu"))
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter = FlatAdapter(layers, base.dtype)
    graphs = make_graphs(base, adapter.memory, 0, 256, 60)
    kept = Recordings.of(base)
    kept.can_record = True
    row = collate([Sample(np.arange(60), np.arange(60) > 3)])
    with pytest.warns(UserWarning, match="no CUDA graphs for this model: operation not permitted when stream is capturing$"):
        graphs.backward(row, row.num_targets)
    adapter.zero_grad()
    torch.testing.assert_close(graphs.backward(row, row.num_targets), base.loss(row).detach())
    assert not len(kept) and not kept.can_record
    assert undone == [stream, "claim", "pool", "start"] * 2  # the second try too leaves nothing behind
    detach(base.model, layers)


@pytest.mark.gpu
def test_a_replayed_trial_has_the_losses_of_one_without_graphs(tiny_config, tmp_path, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    plain = trial(tiny_config, tmp_path / "plain", "cuda", cuda_graphs=False)
    assert not replays
    recorded = trial(tiny_config, tmp_path / "recorded", "cuda", cuda_graphs=True)
    assert len(replays) > 4 and recorded == pytest.approx(plain, rel=1e-3) and plain[-1] < plain[0]
    assert trial(tiny_config, tmp_path / "auto", "cuda") == pytest.approx(plain, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_trials_on_cuda_share_recordings_and_have_the_losses_of_trials_alone(tiny_config, tmp_path, monkeypatch, dropout):
    made, capture = [], recordings.capture
    monkeypatch.setattr(recordings, "capture", lambda *arguments: made.append(1) or capture(*arguments))
    base = load_base(parse(TrainConfig, tiny_config).model, torch.device("cuda"))
    variants = [{"lora_alpha": 8}, {"lora_alpha": 24}, {"rank": 8}, {"lora_alpha": 2}]
    counts = []
    for number, lora in enumerate(variants):
        lora, before = {"lora_dropout": dropout, **lora}, len(made)
        shared = trial(tiny_config, tmp_path / f"shared{number}", "cuda", base, lora, cuda_graphs=True)
        counts.append(len(made) - before)
        alone = trial(tiny_config, tmp_path / f"alone{number}", "cuda", None, lora, cuda_graphs=True)
        assert shared == pytest.approx(alone, rel=2e-4)  # flash attention's backward pass adds in any order
        plain = trial(tiny_config, tmp_path / f"plain{number}", "cuda", None, lora, cuda_graphs=False)
        assert shared == pytest.approx(plain, rel=2e-3)
    assert counts[0] > 1 and counts[2] > 1 and counts[1] == counts[3] == 0


@pytest.mark.gpu
def test_a_replayed_trial_evaluates_its_average_at_the_same_addresses(tiny_config, tmp_path):
    """Recorded passes read the average where the adapter was, and training goes on as without it."""
    values = copy.deepcopy(tiny_config)
    values["train"] |= {"device": "cuda", "cuda_graphs": True, "activation_checkpointing": False}
    values["optim"] |= {"ema_horizon": 0.5, "learning_rate": 0.1, "lr_schedule": "constant"}
    reports = {}
    for graphs in (True, False):
        values["train"]["cuda_graphs"] = graphs
        folder = tmp_path / str(graphs)
        folder.mkdir()
        config = parse(TrainConfig, values)
        reports[graphs] = list(train(config, folder))
        best = min(reports[graphs], key=lambda report: report.eval_loss)
        again = evaluate_adapter(config, folder / "adapter")
        assert again.eval_loss == pytest.approx(best.eval_loss, rel=1e-3)
        assert read_sample_losses(folder, best).mean == best.eval_loss
        assert all(report.ema_eval_loss != report.raw_eval_loss for report in reports[graphs])
    for name in ("raw_eval_loss", "ema_eval_loss"):
        one, two = ([getattr(report, name) for report in reports[graphs]] for graphs in (True, False))
        assert one == pytest.approx(two, rel=5e-3)


@pytest.mark.gpu
def test_a_recorded_evaluation_is_the_unrecorded_one_to_the_bit(tiny_config):
    config = parse(TrainConfig, tiny_config)
    base = load_base(config.model, torch.device("cuda"))
    samples = evaluation_batches(base, load_data(config.data, base.tokenizer)[0], 128)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter = FlatAdapter(layers, base.dtype)
    with torch.no_grad():
        adapter.parameter += 0.01
    adapter.refresh()
    graphs = make_graphs(base, adapter.memory, 0, base.evaluation_row_tokens(128), 128, trains=False)
    plain = evaluate(base, samples)
    recorded = [evaluate(base, samples, losses_of=graphs.target_losses) for _ in range(2)]
    assert recorded == [plain] * 2 and len(Recordings.of(base)) > 0 and samples.batches[0].input_ids_T.is_cuda
    # twin: another adapter has another loss, read from the same memory
    with torch.no_grad():
        adapter.parameter += 0.1
    adapter.refresh()
    assert evaluate(base, samples, losses_of=graphs.target_losses) == evaluate(base, samples) != plain
    detach(base.model, layers)


def test_an_evaluation_over_padded_rows_is_the_evaluation(config):
    base = load_base(config.model, torch.device("cpu"))
    layers = attach(base.model, base.linear_names, config.lora, 0)
    graphs = make_graphs(base, FlatAdapter(layers, base.dtype).memory, 0, 256, 60, trains=False)
    base.model.eval()
    for row in rows(4):
        padded = Size.of(row, 256, 60).pad(row, 60)
        assert Size.padded(padded) == Size.of(row, 256, 60)
        ours = graphs.target_losses(padded)
        assert torch.equal(ours, base.target_losses(padded)) and not ours[row.num_targets :].any()
        torch.testing.assert_close(ours[: row.num_targets], base.target_losses(row), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.sum(), base.loss(row).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["waits for the device", "out of memory"])
def test_a_failed_recording_leaves_nothing_behind(fault):
    kept, stream, one = Recordings(torch.device("cuda")), torch.cuda.current_stream(), torch.ones((), device="cuda")
    _, earlier = recordings.capture(lambda: one.mul_(2.0), kept.pool)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    def failing():
        large = torch.empty(2**28, device="cuda", dtype=torch.uint8)  # 256 MiB, in the pool
        if fault == "out of memory":
            return torch.empty(2**50, device="cuda", dtype=torch.uint8)
        return large.sum() if large.sum().item() else one

    with pytest.raises(torch.OutOfMemoryError if fault == "out of memory" else RuntimeError):
        recordings.capture(failing, kept.pool)
    if fault != "out of memory":
        kept.start_over()
    assert torch.cuda.current_stream() == stream
    torch.rand(4, device="cuda")  # raises if the generator still records
    loss, replay = recordings.capture(lambda: one + 1.0, kept.pool)
    earlier()
    replay()
    assert loss.item() == 3.0
    del earlier, replay, loss  # a pool's memory goes with its last recording
    torch.empty(2**28, device="cuda", dtype=torch.uint8)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26
