"""Every command, option, key and piece of config in the documents is valid today."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from engine.command_answers import Facts
from sweep import driver, preflight
from sweep.__main__ import compose
from sweep.cluster.slots import Hardware
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan import sweep_plan
from sweep.report import build as report
from tests.support.documented import Checker, Wrong, read
from tests.support.fake_engine import SHAPE
from tests.support.paths import ROOT
from tests.support.prepared import prepared

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = {name: read((ROOT / name).read_text()) for name in ("README.md", "CONTRIBUTING.md", "dashboards/README.md", *PAGES)}
CASES = {kind: {text: name for name, found in reversed(DOCUMENTS.items()) for text in getattr(found, kind)}
         for kind in ("commands", "overrides", "keys", "yaml")}  # fmt: skip


def cases(kind):
    return pytest.mark.parametrize("text", list(CASES[kind]), ids=[f"{name}: {text[:60]}" for text, name in CASES[kind].items()])


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
    monkeypatch.setattr(preflight, "inspect", lambda config, module: Facts(shape=SHAPE))
    monkeypatch.setattr(preflight, "prepare", lambda configs, module: prepared())
    monkeypatch.setattr(report, "write_report", lambda folder: folder.path / "report.html")
    # a document's cluster does not exist, so both functions that look for it are replaced
    for module in (driver, sweep_plan):
        monkeypatch.setattr(module, "_find_hardware", lambda cluster: Hardware(8 if cluster.address else 0, 16), raising=False)
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
        ("command", "qlora-sweep +experiment=quickstart lora.rnk=8"),
        ("command", "qlora-export sweeps/<sweep folder>/best --too peft --out DIR"),
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


def test_the_documents_have_what_these_tests_look_for():
    assert "docs/first-sweep.md" in DOCUMENTS and len(DOCUMENTS["README.md"].commands) >= 7
    assert {kind: len(texts) >= 20 for kind, texts in CASES.items() if kind != "yaml"} == {
        "commands": True, "overrides": True, "keys": True,
    }  # fmt: skip
    assert CASES["yaml"]
    assert any("sweeps/<sweep folder>" in command for command in CASES["commands"])
    assert any(command.startswith("qlora-sweep ") for command in CASES["commands"])
