"""Fuzzing any config, space, override or report gives a checked value or one InputError line."""

from __future__ import annotations

import json
import string
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.parsing import load_json
from engine.errors import InputError
from sweep.__main__ import compose
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.space.parse import known_paths, parse_space

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
SECRET = "hunter2-is-not-to-be-seen"
BASE = {"model": {"path": "m"}, "data": {"train": "t", "max_seq_length": 8}, "train": {"max_tokens": 400}}
TRICKS = st.sampled_from(["a\nb", "\x1b[2J", "${oc.env:SECRET_TOKEN}", "../../x", "!!python/object:os.system", "a\0b", "_target_",
                          "", "~", "${model.path}",
                          "\\${oc.env:SECRET_TOKEN}", "builtin:../x", "all-linear", "${", "}", ".inf", "1e999"])  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), TRICKS)
KEYS = st.text(max_size=8) | TRICKS
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)
SECTIONS = st.sampled_from([*SweepConfig.model_fields])
FUZZ = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))


def answer(call, *arguments):
    """Return what the call returns; None if it is refused, in one line that holds no secret."""
    try:
        return call(*arguments)
    except InputError as error:
        assert str(error).isprintable() and SECRET not in str(error)
        return None


@FUZZ
@given(section=SECTIONS, key=st.text(max_size=8) | TRICKS | st.sampled_from(["name", "path", "train", "uri", "rank"]), value=JSON)
def test_a_config_is_checked_or_refused_in_one_line(section, key, value):
    given_section = {**BASE.get(section, {}), key: value}
    config = answer(parse_sweep_config, {**BASE, section: given_section})
    if config is not None:
        assert config.sweep.name not in ("", ".", "..") and "/" not in config.sweep.name
        json.dumps(config.model_dump(mode="json"), allow_nan=False)


@FUZZ
@given(path=st.sampled_from(known_paths()) | st.text(max_size=10), leaf=st.dictionaries(
    st.sampled_from(["choices", "low", "high", "log", "step", "when", "_target_"]), JSON, max_size=4))  # fmt: skip
def test_a_space_is_checked_or_refused_in_one_line(path, leaf):
    space = answer(parse_space, {path: leaf})
    if space is not None and space.dimensions:
        answer(space.single_changes, parse_sweep_config(BASE).base().model_dump(mode="json"))


@settings(FUZZ, max_examples=60)  # each example composes ten files
@given(section=SECTIONS, value=TRICKS | st.text(string.printable, max_size=15))
def test_an_override_never_brings_in_the_environment(section, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_TOKEN", SECRET)
        raw = answer(compose, ["model=local", "model.path=m", "data=local", "data.train=t", f"{section}.name={value}"])
        assert SECRET not in json.dumps(raw)


@FUZZ
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_reports_and_json_files_are_read_or_refused_in_one_line(tmp_path_factory, content):
    if not hasattr(test_reports_and_json_files_are_read_or_refused_in_one_line, "folder"):
        config = parse_sweep_config({**BASE, "sweep": {"output_dir": str(tmp_path_factory.mktemp("fuzz"))}})
        test_reports_and_json_files_are_read_or_refused_in_one_line.folder = SweepFolder.create(config, datetime(2026, 1, 1))
    folder = test_reports_and_json_files_are_read_or_refused_in_one_line.folder
    file = folder.trial(0) / "reports.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    for number, report in enumerate(answer(folder.reports, 0) or [], 1):
        assert report.rung == number
    answer(load_json, file)
