"""A worker loads its libraries before it has a trial, and touches no card by that."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from engine.errors import EngineError
from sweep.cluster import worker_libraries
from sweep.cluster.slots import Slots
from sweep.cluster.worker_libraries import environment_of, load_libraries, raise_fault
from sweep.execution import worker_process
from sweep.execution.worker_config import REAL_ENGINE, EngineModules
from sweep.execution.worker_process import refuse_other_cards
from tests.support.paths import ENV

# torch believes to be built for CUDA and to see two cards, and whatever initialises CUDA is noted
LOADED = """
import json, sys, torch
asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append("cudaGetDeviceCount") or 2
torch._C._cuda_init = lambda: asked.append("init")
torch._C._cuda_getCurrentRawStream = lambda device: asked.append("stream")
torch.cuda._device_count_nvml = lambda: 2
import os
from sweep.cluster.worker_libraries import environment_of, load_libraries, raise_fault
from sweep.execution.worker_config import REAL_ENGINE
os.environ.update(environment_of(3, REAL_ENGINE.worker_modules))
load_libraries()
raise_fault()
names = ("bitsandbytes", "engine.training.loop", "transformers.modeling_utils", "ray.tune")
print(json.dumps([asked, [name in sys.modules for name in names], os.environ["OMP_NUM_THREADS"]]))
"""


def test_what_a_real_worker_loads_initialises_no_cuda_and_leaves_bitsandbytes_out():
    done = subprocess.run([sys.executable, "-c", LOADED], env=ENV, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], [False, True, True, True], "3"], done.stderr


def test_workers_are_started_early_for_trials_only_and_a_fake_engines_load_no_library():
    assert EngineModules("a", "b", "c").worker_modules == ("sweep.execution.worker",)
    assert REAL_ENGINE.for_trials(3, Slots(4, "cpu", 1)).worker_modules == ()  # some slots would get no trial
    assert REAL_ENGINE.for_trials(4, Slots(4, "cpu", 1)) == REAL_ENGINE
    assert set(REAL_ENGINE.worker_modules) > {"torch", "sweep.execution.worker", REAL_ENGINE.train, REAL_ENGINE.model}


def test_a_library_that_cannot_be_imported_fails_the_first_trial_with_its_own_error(monkeypatch, tmp_path):
    monkeypatch.setattr(worker_libraries, "_faults", [])
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_library.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "0", **environment_of(2, ("json", "broken_library", "not_reached"))}
    load_libraries(environment)
    assert (environment["OMP_NUM_THREADS"], environment["PYTORCH_NVML_BASED_CUDA_CHECK"]) == ("2", "0")
    with pytest.raises(OSError, match="libcudart"):
        raise_fault()


def test_without_rays_early_start_nothing_is_loaded_or_set():
    environment: dict[str, str] = {}
    load_libraries(environment)
    raise_fault()
    assert environment == {}


LEFT_BY_RAY = {"CUDA_VISIBLE_DEVICES": "0,1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(("num_seen", "environment"), [(1, {"CUDA_VISIBLE_DEVICES": "1"}), (2, {}), (2, LEFT_BY_RAY)])
def test_a_process_with_its_own_card_only_goes_on(num_seen, environment):
    refuse_other_cards(num_seen, environment)


def test_a_process_that_sees_other_cards_than_its_own_is_refused():
    with pytest.raises(EngineError, match=r"sees 2 cards, not the one of its slot \(CUDA_VISIBLE_DEVICES=1\)"):
        refuse_other_cards(2, {"CUDA_VISIBLE_DEVICES": "1"})


def test_a_worker_sets_torchs_allocator_before_anything_starts_cuda(monkeypatch):
    """A plan's predicted memory rests on segments that grow, and torch reads that once."""
    import torch

    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: order.append("CUDA") or 1, raising=False)
    monkeypatch.setattr("engine.model.load.let_segments_grow", lambda: order.append("allocator"))
    monkeypatch.setattr(worker_process, "measure_workers_card", lambda spec: order.append("measured"))
    spec = {"device": "cuda", "num_threads": torch.get_num_threads(), "engine": {"model": REAL_ENGINE.model}}
    worker_process.settle_process(spec)
    assert order == ["allocator", "CUDA", "measured"]
