"""Provide the folder of a tiny model that a test may change."""

import shutil

import pytest


@pytest.fixture
def folder(tiny_config, tmp_path):
    return shutil.copytree(tiny_config["model"]["path"], tmp_path / "model")
