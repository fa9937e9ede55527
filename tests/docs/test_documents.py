"""README and CONTRIBUTING are typed by their readers: every command, option, key and piece of config in them is one of today."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from sweep import driver
from sweep.__main__ import compose
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.report import build as report
from tests.support.documented import Checker, Wrong, read
from tests.support.fake_engine import SHAPE
from tests.support.paths import ROOT

DOCUMENTS = {name: read((ROOT / name).read_text()) for name in ("README.md", "CONTRIBUTING.md", "dashboards/README.md")}
CASES = {kind: [(name, text) for name, found in DOCUMENTS.items() for text in dict.fromkeys(getattr(found, kind))]
         for kind in ("commands", "overrides", "keys", "yaml")}  # fmt: skip


def cases(kind):
    return pytest.mark.parametrize("text", [text for _, text in CASES[kind]], ids=[f"{n}: {t[:60]}" for n, t in CASES[kind]])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return folder


@pytest.fixture(scope="module")
def sweep_folder(place) -> Path:
    raw = compose(["+experiment=quickstart", f"sweep.output_dir={place}"])
    return SweepFolder.create(parse_sweep_config(raw), datetime(2026, 1, 1)).path


@pytest.fixture
def checker(place, sweep_folder, monkeypatch) -> Checker:
    monkeypatch.chdir(place)
    monkeypatch.setattr(driver, "inspect", lambda config, module: {"shape": SHAPE, "card": None})
    monkeypatch.setattr(report, "write_report", lambda folder: folder.path / "report.html")
    return Checker(sweep_folder, place)


@cases("commands")
def test_a_documented_command_is_taken(text, checker):
    checker.command(text)


@cases("overrides")
def test_a_documented_override_is_taken(text, checker):
    checker.overrides(text)


@cases("keys")
def test_a_documented_key_exists(text, checker):
    checker.key(text)


@cases("yaml")
def test_a_documented_piece_of_config_is_valid(text, checker):
    checker.yaml(text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("command", "python -m sweep +experiment=quickstart lora.rnk=8"),
        ("command", "python -m sweep ... spaec=none"),
        ("command", "python -m sweep model=llama-3.1-8b data.train=my.jsonl space=no-such"),
        ("command", "python -m sweep resume=sweeps/<sweep folder> lora.rank=8"),
        ("command", "python -m engine.export sweeps/<sweep folder>/best --too peft --out DIR"),
        ("command", "python -m engine plan <train_config.json> --card"),
        ("command", "python -m engine.bench --suite tabel"),
        ("command", "python tests/bench/sweep_decisions.py --trails 64"),
        ("command", "python -m pytest tests/test_no_such.py"),
        ("command", "make quickstrat"),
        ("overrides", "sampler=tpe|annealing"),
        ("overrides", "train.memory_budget=20"),
        ("overrides", "space.lora.rank={low: 4}"),
        ("overrides", "resume=... lora.rank=8"),
        ("key", "train.micro_batch"),
        ("yaml", "space:\n  lora:\n    rnk: {choices: [8]}"),
        ("yaml", "train: {max_token: 5}"),
    ],
)
def test_what_the_tool_would_refuse_fails_this_test(kind, text, checker, capsys):
    with pytest.raises(Wrong):
        getattr(checker, kind)(text)


def test_the_readme_has_what_these_tests_look_for():
    found = DOCUMENTS["README.md"]
    assert len(found.commands) > 20 and len(found.overrides) > 10 and len(found.keys) > 5 and found.yaml
    assert any("sweeps/<sweep folder>" in command for command in found.commands)
