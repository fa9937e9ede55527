"""The device of a trial, and how torch's allocator takes memory from it."""

import os

import pytest
import torch

from engine.model import device

SETTING = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture
def settings(monkeypatch):
    """Pretend that a card is there, and return what the allocator is told at once."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    for name in device.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is as before at the end
        monkeypatch.delenv(name)
    return told


def test_segments_may_grow_on_cuda(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert device.pick_device("cpu").type == "cpu" and SETTING not in os.environ
    assert device.pick_device("auto").type == "cuda"
    assert os.environ[SETTING] == "expandable_segments:True" == settings[0]


@pytest.mark.parametrize("name", device.ALLOCATOR_SETTINGS)
def test_the_users_own_settings_stay(settings, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    device.pick_device("cuda")
    assert os.environ[name] == "max_split_size_mb:512" and not settings
    assert sum(known in os.environ for known in device.ALLOCATOR_SETTINGS) == 1


def test_nothing_changes_once_cuda_has_started(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    device.pick_device("cuda")
    assert SETTING not in os.environ and not settings
