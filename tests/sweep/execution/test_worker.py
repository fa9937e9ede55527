"""One worker runs trial after trial with the real engine.

It loads nothing twice, its memory does not grow, and a warm trial equals a cold one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

import engine.data.views
import engine.model.load
import engine.training.loop
from engine.training.loop import train
from engine.trial_report import read_reports
from sweep.folder.notes import is_training, was_terminated
from tests.support.reports import PART_SECONDS
from tests.support.slots import VARIANTS, Slot, variant

MIB = 2**20
def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def numbers(trial_folder: Path) -> list[dict]:
    peaks = {"peak_allocated_gib", "peak_reserved_gib"}
    timed = {"tokens_per_second", "step_time_ms", "elapsed_s", "setup_s", *peaks, *PART_SECONDS}
    lines = (trial_folder / "reports.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """Count how often the model was loaded and data were tokenised."""
    counts = {"load_base": 0, "tokenise": 0}

    def counting(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counting(engine.model.load, "load_base")
    counting(engine.data.views, "tokenise")
    return counts


def test_a_warm_trial_is_a_cold_one_bit_for_bit_after_trials_of_every_kind(tmp_path, tiny_config, counted):
    """Earlier trials were left midway, failed, or had other layers under the adapter."""
    slot, config = Slot(), variant(tiny_config, VARIANTS[0])
    for number, changes in enumerate(VARIANTS[1:]):
        slot.run(variant(tiny_config, changes), tmp_path / f"before-{number}", num_rungs=1 if number == 0 else 99)
    failed = slot.run(variant(tiny_config, {"lora": {"target_modules": ["nowhere"]}}), tmp_path / "failed")
    assert failed[-1]["outcome"] == "FAILED"
    loads = counted["load_base"]
    warm = slot.run(config, tmp_path / "warm")
    assert warm[-1]["outcome"] == "COMPLETE" and counted["load_base"] == loads
    # freezing the model and its libraries spares the collector 0.3 s after each trial
    assert gc.get_freeze_count() > 10_000

    (tmp_path / "cold").mkdir()
    list(train(config, tmp_path / "cold"))
    assert numbers(tmp_path / "warm") == numbers(tmp_path / "cold")
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert (tmp_path / "warm" / name).read_bytes() == (tmp_path / "cold" / name).read_bytes()
    (tmp_path / "other").mkdir()
    list(train(variant(tiny_config, {**VARIANTS[0], "train": {"seed": 1}}), tmp_path / "other"))
    # the twin: the test notices another seed
    assert numbers(tmp_path / "other") != numbers(tmp_path / "cold")


@pytest.mark.parametrize("how", ["SIGTERM to the process", "the driver's file", "a note in its folder"])
def test_a_trial_asked_to_end_saves_its_step_and_goes_on_in_another_process_as_if_undisturbed(
    tmp_path, tiny_config, monkeypatch, how
):
    config = variant(tiny_config, VARIANTS[0])
    stop_file = tmp_path / ("parts/.leave" if how.startswith("a note") else ".stop")
    (tmp_path / "whole").mkdir()
    list(train(config, tmp_path / "whole"))
    steps, original = [], engine.training.loop._Run._step

    def step(run):
        steps.append(len(steps))
        if len(steps) == 4:  # in the middle of the second rung, in the middle of a step
            os.kill(os.getpid(), signal.SIGTERM) if how.startswith("SIGTERM") else stop_file.touch()
            monkeypatch.setattr("sweep.execution.interruption.LOOK_EVERY_S", 0.0)
        return original(run)

    monkeypatch.setattr(engine.training.loop._Run, "_step", step)
    slot, trial = Slot(), tmp_path / "parts"
    if how.startswith("SIGTERM"):
        with pytest.raises(SystemExit):
            slot.run(config, trial)
        slot.worker._close()  # its process would have ended
        assert was_terminated(trial) and not was_terminated(trial)
    else:
        *_, last = slot.run(config, trial)
        assert (last["outcome"], last["report"], last["error"], last["done"]) == ("RUNNING", "", None, True)
        assert slot.run(config, trial)[-1]["outcome"] == "RUNNING"  # as long as the file is there
        stop_file.unlink()
    num_steps = json.loads((trial / "checkpoint/state.json").read_text())["step"]
    assert num_steps == 4 == len(steps) and len(read_reports(trial)) == 1
    assert Slot().run(config, trial)[-1]["outcome"] == "COMPLETE"
    assert numbers(trial) == numbers(tmp_path / "whole") and len(steps) == read_reports(trial)[-1].step
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert (trial / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("left_out", [1, 2])
def test_reports_that_only_the_checkpoint_kept_are_passed_on_and_judged_before_a_step_is_trained(tmp_path, tiny_config, left_out):
    """Else a trial pruned at the first of them would have one rung more in its folder.

    The journal would lack that rung.
    """
    config, trial_folder, first = variant(tiny_config, {}), tmp_path / "trial", Slot()
    first.run(config, trial_folder, num_rungs=2)
    first.worker.cleanup()
    file = trial_folder / "reports.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[: len(whole) - left_out]))
    slot = Slot()
    heard = slot.run(config, trial_folder, num_rungs=left_out)
    slot.worker.cleanup()
    assert [json.loads(result["report"])["rung"] for result in heard] == list(range(3 - left_out, 3))
    assert file.read_text().splitlines(keepends=True) == whole


@pytest.mark.parametrize("how", ["SIGTERM to the process", "the driver's file"])
def test_a_process_that_still_loads_the_model_is_not_waited_for(tmp_path, tiny_config, monkeypatch, how):
    """It has nothing to save, so SIGTERM ends it while loading and the driver does not count it."""
    seen, slot, trial, load = [], Slot(), tmp_path / "trial", engine.model.load.load_base

    def load_base(*given):
        seen.append(is_training(trial))
        if how.startswith("SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append("goes on")
        return load(*given)

    monkeypatch.setattr(engine.model.load, "load_base", load_base)
    if how.startswith("SIGTERM"):
        with pytest.raises(SystemExit):
            slot.run(variant(tiny_config, VARIANTS[1]), trial)
        slot.worker._close()
        assert seen == [False] and was_terminated(trial)
    else:
        step = engine.training.loop._Run._step
        monkeypatch.setattr(engine.training.loop._Run, "_step", lambda run: (seen.append(is_training(trial)), step(run))[1])
        slot.run(variant(tiny_config, VARIANTS[1]), trial, num_rungs=1)
        assert seen[:2] == [False, "goes on"] and set(seen[2:]) == {True}
        assert not is_training(trial)  # it has saved, and waits for a verdict


def test_a_process_asked_to_end_between_two_steps_ends_at_once(tmp_path, tiny_config):
    slot, trial = Slot(), tmp_path / "trial"
    slot.run(variant(tiny_config, VARIANTS[1]), trial, num_rungs=1)
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    slot.worker._close()
    assert was_terminated(trial)


def test_a_worker_loads_its_model_once_and_a_machine_tokenises_its_data_once(tmp_path, tiny_config, counted):
    data = tmp_path / "data.jsonl"
    data.write_text(Path(tiny_config["data"]["train"]).read_text())
    fresh = {**tiny_config, "data": {**tiny_config["data"], "chat_template": "chatml", "train": str(data)}}
    for slot in (Slot(), Slot()):  # two workers of one machine
        for number, changes in enumerate(VARIANTS[:3]):
            slot.run(variant(fresh, changes), tmp_path / f"{id(slot)}-{number}", num_rungs=1)
    assert counted == {"load_base": 2, "tokenise": 1}


def test_tokenised_data_are_mapped_from_one_file_and_cannot_be_written(tiny_config):
    config = variant(tiny_config, {})
    tokenizer = engine.model.load.load_tokenizer(config.model)
    views = [view for _ in range(2) for view in engine.data.views.load_data(config.data, tokenizer)]
    arrays = [getattr(view._tokens, name) for view in views for name in ("input_ids", "is_target", "hashes")]
    assert len({array.filename for array in arrays}) == 3
    assert not any(array.flags.writeable for array in arrays)


def test_a_trial_leaves_no_tensor_behind(tmp_path, tiny_config):
    slot = Slot()
    slot.run(variant(tiny_config, VARIANTS[0]), tmp_path / "first")
    slot.worker._close()
    before = live_tensors()
    for number, changes in enumerate(VARIANTS[1:3]):
        slot.run(variant(tiny_config, changes), tmp_path / str(number), num_rungs=2)
        slot.worker._close()
    assert live_tensors() == before
    kept = torch.zeros(3)  # the twin: the test notices one more
    assert live_tensors() == before + 1 and kept is not None


@pytest.mark.faults
@pytest.mark.timeout(540)
def test_fifty_trials_in_one_worker_take_no_more_memory_than_ten(tmp_path, tiny_config):
    """Compare resident memory after ten and after fifty trials; the twin is a worker that leaks.

    Takes 3 minutes on two cores.
    """
    slot, process, resident = Slot(), psutil.Process(), []
    for number in range(50):
        changes = VARIANTS[number % len(VARIANTS)]
        slot.run(variant(tiny_config, changes), tmp_path / str(number), num_rungs=1 if number % 3 == 0 else 99)
        slot.worker._close()
        gc.collect()
        resident.append(process.memory_info().rss / MIB)
    print(f"resident MiB after 10, 20, ... trials: {[round(value, 1) for value in resident[9::10]]}")
    # half a MiB a trial is less than an optimizer's state, the smallest part that could leak
    limit = 0.5 * 40
    assert resident[-1] - resident[9] < limit
    before = process.memory_info().rss / MIB
    kept = [bytearray(b"x") * MIB for _ in range(40)]  # the twin: the test notices one MiB a trial
    assert process.memory_info().rss / MIB - before > limit and kept
