"""Configs and sweep folders made to harm: refused in one line; what the environment holds does not reach them."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from engine.errors import InputError
from sweep.__main__ import compose, main
from sweep.config import conf_files
from sweep.config.sweep import TrackingConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.space.parse import parse_space
from sweep.study.study import Study
from tests.support.reports import make_report

GIVEN = ["model=local", "data=local", "data.train=t.jsonl", "space=learning-rate"]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")


@pytest.mark.parametrize(
    "value",
    ["${oc.env:SECRET_TOKEN}", '"${oc.decode:1}"', '"a ${oc.env:SECRET_TOKEN} b"', '"${model.${oc.env:SECRET_TOKEN}}"', 
     "${nope:x}",
     '"${hydra:runtime.cwd}"', '["${oc.env:SECRET_TOKEN}"]', '"${oc.env:NOT_THERE,${oc.env:SECRET_TOKEN}}"'],
)  # fmt: skip
def test_a_config_cannot_read_the_environment(value):
    with pytest.raises(InputError, match="not a resolver or an environment variable") as error:
        compose([*GIVEN, f"model.path={value}"])
    assert "hunter2" not in str(error.value)


def test_a_config_may_refer_to_its_own_keys():
    assert compose([*GIVEN, "model.path=m", "data.eval=${data.train}"])["data"]["eval"] == "t.jsonl"


def test_an_escaped_resolver_stays_text():
    assert compose([*GIVEN, r"model.path=\${oc.env:SECRET_TOKEN}"])["model"]["path"] == "${oc.env:SECRET_TOKEN}"


@pytest.mark.parametrize(
    "text",
    ["tracking: {uri: '${oc.env:SECRET_TOKEN}'}", "sweep: {name: !!python/object/apply:os.getcwd []}",
     "hydra: {searchpath: ['file:///etc']}\nmodel: {_target_: os.getcwd}", "sweep: {name: ../../x}", "[" * 1000],
)  # fmt: skip
def test_a_conf_file_from_elsewhere_is_plain_data(tmp_path, monkeypatch, text):
    import shutil

    conf = shutil.copytree(conf_files.conf_folder(), tmp_path / "conf")
    (conf / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    monkeypatch.setattr(conf_files, "conf_folder", lambda: conf)
    with pytest.raises(InputError) as error:
        parse_sweep_config(compose([*GIVEN, "model.path=m", "experiment=evil"]))
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


DOUBLED = "".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}, {f'*a{i - 1}' if i else 'x'}]\n" for i in range(40))
BOMBS = {
    DOUBLED: "once its aliases are expanded",
    "a: &a [*a, *a]": "once its aliases are expanded",
    "".join(f"x{i}: '${{x{i - 1}}}${{x{i - 1}}}'\n" if i else "x0: '0123456789'\n" for i in range(60)): "must not grow beyond",
    "".join(f"x{i}: ['${{x{i - 1}}}', '${{x{i - 1}}}']\n" if i else "x0: []\n" for i in range(60)): "must not grow beyond",
    "a: {b: '${a}', c: '${a}'}": "parent node",
    "a: '${model.${data.train}}'": "must name its key directly",
}


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_a_config_that_would_unfold_without_end_is_one_line_in_no_time(tmp_path, monkeypatch, text):
    import shutil
    import tracemalloc

    conf = shutil.copytree(conf_files.conf_folder(), tmp_path / "conf")
    monkeypatch.setattr(conf_files, "conf_folder", lambda: conf)
    (conf / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=BOMBS[text]) as error:
            compose([*GIVEN, "model.path=m", "experiment=evil"])
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_aliases_and_references_that_stay_small_are_taken(tmp_path, monkeypatch):
    import shutil

    conf = shutil.copytree(conf_files.conf_folder(), tmp_path / "conf")
    monkeypatch.setattr(conf_files, "conf_folder", lambda: conf)
    text = "lora: {target_modules: &t [q_proj, v_proj]}\nspace: {lora: {target_modules: {choices: {a: *t, b: all-linear}}}}\n"
    (conf / "experiment" / "fine.yaml").write_text(f"# @package _global_\n{text}sweep: {{name: 'of-${{data.train}}'}}\n")
    raw = compose([*GIVEN, "model.path=m", "data.eval=${data.train}", "experiment=fine"])
    assert raw["space"]["lora"]["target_modules"]["choices"]["a"] == ["q_proj", "v_proj"]
    assert (raw["sweep"]["name"], raw["data"]["eval"]) == ("of-t.jsonl", "t.jsonl")


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".x", "", "a\n", "a\0", "x" * 101, "~", "${a}"])
def test_a_sweep_name_is_one_folder_name(name):
    raw = compose([*GIVEN, "model.path=m"])
    with pytest.raises(InputError, match=r"sweep\.name"):
        parse_sweep_config({**raw, "sweep": {**raw["sweep"], "name": name}})


@pytest.mark.parametrize("value", ["a\0b", "a\nb", "a\x1b[2J"])
def test_names_and_paths_hold_no_control_characters(value):
    raw = compose([*GIVEN, "model.path=m"])
    with pytest.raises(InputError, match="printable"):
        parse_sweep_config({**raw, "data": {**raw["data"], "train": value}})


def test_remote_code_is_not_for_the_sampler_to_choose_and_is_said_in_the_plan():
    with pytest.raises(InputError, match="for you to decide"):
        parse_space({"model": {"trust_remote_code": {"choices": [True, False]}}})
    config = parse_sweep_config(compose([*GIVEN, "model.path=m", "model.trust_remote_code=true"]))
    assert "its own code is run" in make_sweep_plan(config).describe()


@pytest.mark.parametrize("uri", ["https://user:hunt@er2@host/x", "postgresql://u:hunter2@host/db", "https://:hunter2@host"])
def test_a_password_in_the_tracking_address_is_refused_before_it_is_written_anywhere(uri, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["+experiment=quickstart", f"tracking.uri={uri}", "dry_run=true"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: tracking.uri = ") and "MLFLOW_TRACKING_PASSWORD" in shown.err
    assert shown.err.count("\n") == 1 and "er2" not in shown.err + shown.out
    assert list(tmp_path.iterdir()) == []


def test_a_user_name_in_the_tracking_address_is_taken_and_not_shown():
    assert TrackingConfig(uri="https://user@host/x").public_uri == "https://host/x"


# --- a sweep folder from elsewhere ---


@pytest.fixture
def folder(tmp_path):
    raw = {**compose([*GIVEN, "model.path=m"]), "sweep": {"output_dir": str(tmp_path)}}
    return SweepFolder.create(parse_sweep_config(raw), datetime(2026, 1, 1))


def study(folder):
    config = folder.read_config()
    return Study(folder, config, parse_space(config.space))


@pytest.mark.parametrize("entry", ["trials", "trials/0000", "trials/0000/checkpoint", "study.journal", "best", ".lock"])
def test_links_out_of_a_sweep_folder_are_refused(folder, tmp_path, entry):
    outside = tmp_path / "outside"
    outside.mkdir()
    SweepFolder.open(folder.path)  # twin: without a link it opens
    (folder.path / entry).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / entry).symlink_to(outside)
    with pytest.raises(InputError, match="must not link out of the sweep folder"):
        SweepFolder.open(folder.path)


def test_a_torn_last_line_is_dropped_and_a_damaged_one_before_it_is_refused(folder):
    first = study(folder)
    first.ask()
    whole = folder.journal.read_bytes()
    folder.journal.write_bytes(whole + b'{"op_code": 4, "wor')
    assert len(study(folder).records()) == 1
    assert folder.journal.read_bytes().startswith(whole) and b"wor\n" not in folder.journal.read_bytes()
    folder.journal.write_bytes(b"\0\0\0\n" + whole)
    with pytest.raises(InputError, match="line 1 is damaged"):
        study(folder)
    assert folder.journal.read_bytes() == b"\0\0\0\n" + whole  # nothing was changed
    folder.journal.write_bytes(whole + b'{"op_code": 4, "worker_id": "x"}\n')
    with pytest.raises(InputError, match="must be the journal of a sweep"):
        study(folder)


def test_a_torn_report_is_left_out_and_a_wrong_one_is_refused(folder):
    file = folder.trial(0) / "reports.jsonl"
    file.parent.mkdir(parents=True)
    whole, second = (json.dumps(make_report(rung, 2.0).to_dict()) for rung in (1, 2))
    file.write_text(whole + '\n{"rung": 2, "ev')
    assert [report.rung for report in folder.reports(0)] == [1]
    for line in ("5", second, whole.replace('"eval_loss": 2.0', '"eval_loss": "x"'), "[" * 100_000):
        file.write_text(line + "\n")
        with pytest.raises(InputError, match="must be the report of rung 1"):
            folder.reports(0)


def test_a_sweep_folder_that_cannot_be_filled_is_not_left_behind(folder, monkeypatch):
    import errno
    from pathlib import Path

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    before = sorted(path.name for path in folder.path.parent.iterdir())
    with pytest.raises(InputError, match="No space left"):
        SweepFolder.create(folder.read_config(), datetime(2026, 1, 2))
    assert sorted(path.name for path in folder.path.parent.iterdir()) == before
    assert json.loads(folder.config_file.read_text())
