"""The last lines name commands that work as they stand."""

from __future__ import annotations

import shlex
from datetime import datetime

import pytest

from sweep.config.compose import parsed
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.results.next_steps import next_steps
from sweep.space.parse import parse_space
from tests.support.studies import SMALL, WIDE


def steps(
    tmp_path, space=WIDE, has_adapter=True, num_trials=4, model=None, is_finished=False, **sections
) -> dict[str, list[str]]:
    values = {
        "model": {"path": "m", **(model or {})}, "data": {"train": "t"}, "train": {"max_tokens": 400}, "space": space,
        "sweep": {"num_trials": num_trials, "output_dir": str(tmp_path / "my sweeps")}, **sections,
    }  # fmt: skip
    config = parse_sweep_config(values)
    folder = SweepFolder.create(config, datetime(2026, 1, 2))
    text = next_steps(folder, config, parse_space(config.space), has_adapter, is_finished)
    return {line[:17].strip(): shlex.split(line[17:]) for line in text.splitlines() if line}


def test_all_of_them_with_paths_that_a_shell_takes(tmp_path):
    found = steps(tmp_path)
    folder = str(tmp_path / "my sweeps" / "sweep-20260102-000000")
    assert found["talk to it"] == ["python", "-m", "engine.chat", f"{folder}/best"]
    assert found["use it elsewhere"][3:] == [f"{folder}/best", "--to", "merged", "--out", "DIR"]
    assert found["look at trials"] == ["python", "-m", "sweep.ui", folder]
    assert found["search on"] == ["python", "-m", "sweep", f"resume={folder}", "sweep.num_trials=8"]


def test_a_finished_sweep_needs_more_trials_before_it_goes_on(tmp_path):
    found = steps(tmp_path, is_finished=True)
    folder = str(tmp_path / "my sweeps" / "sweep-20260102-000000")
    assert found["search on"][:5] == ["python", "-m", "sweep.control", folder, "add"]
    assert found["search on"][5:] == ["4", "&&", "python", "-m", "sweep", f"resume={folder}"]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"has_adapter": False}, {"talk to it", "use it elsewhere"}), ({"space": SMALL, "num_trials": 6}, {"search on"}),
        ({"model": {"train_tokens": ["<tool>"]}}, set()),  # chat and a merge take rows of tokens
    ],
)  # fmt: skip
def test_what_would_be_refused_is_not_named(tmp_path, changes, missing):
    assert set(steps(tmp_path)) - set(steps(tmp_path, **changes)) == missing


def test_a_small_space_ends_the_search_and_a_models_own_code_is_confirmed(tmp_path):
    found = steps(tmp_path, space=SMALL, model={"trust_remote_code": True})
    assert found["search on"][-2:] == ["model.trust_remote_code=true", "sweep.num_trials=6"]
    assert found["talk to it"][-1] == "--trust-remote-code"


@pytest.mark.parametrize("on_end", ["bash notify.sh", """sh -c 'mail -s "done; $(date)" me@x' """, "'a b' c=1,{2}", "https://x.org/a?b=c&d"])
def test_the_command_at_the_end_is_repeated_as_it_was_typed(tmp_path, on_end):
    *_, given, _ = steps(tmp_path, tracking={"on_end": on_end})["search on"]
    assert parsed(given) == ("tracking.on_end", on_end)
