"""A sweep folder from someone else neither permits a model's code nor says where credentials go."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep import driver
from sweep.config.confirmations import CREDENTIALS, refuse_unconfirmed
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ui.__main__ import main

SERVER = "https://tracking.example.org:8443/mlflow"
BASE = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}}


def config_with(uri: str | None = None, trust: bool = False, name: str = "mlflow") -> SweepConfig:
    return parse_sweep_config(
        {**BASE, "model": {"path": "m", "trust_remote_code": trust}, "tracking": {"name": name, "uri": uri}}
    )


@pytest.mark.parametrize("variable", CREDENTIALS)
def test_credentials_go_to_no_server_that_the_folder_alone_names(variable, tmp_path):
    secret = {variable: "secret"}
    message = rf"tracking\.uri = '{SERVER}': only the sweep folder names this server, and {variable}"
    with pytest.raises(InputError, match=message) as refused:
        refuse_unconfirmed(config_with(SERVER), {}, secret, tmp_path)
    assert f"add tracking.uri={SERVER}" in str(refused.value) and "secret" not in str(refused.value)
    refuse_unconfirmed(config_with(SERVER), {"tracking.uri": SERVER}, secret, tmp_path)  # the command line names it
    refuse_unconfirmed(config_with(SERVER), {}, {**secret, "MLFLOW_TRACKING_URI": SERVER}, tmp_path)  # so does the environment
    refuse_unconfirmed(config_with(SERVER), {}, {}, tmp_path)  # nothing to send
    for harmless in (config_with(), config_with("sqlite:////tmp/x.db"), config_with(SERVER, name="none")):
        refuse_unconfirmed(harmless, {}, secret, tmp_path)


@pytest.mark.parametrize(
    "named", ["http://tracking.example.org:8443/mlflow", "https://tracking.example.org/mlflow", "https://example.org:8443", "sqlite:///x"]
)
def test_another_server_in_the_environment_is_no_permission(named, tmp_path):
    with pytest.raises(InputError, match="only the sweep folder names this server"):
        refuse_unconfirmed(config_with(SERVER), {}, {"MLFLOW_TRACKING_TOKEN": "s", "MLFLOW_TRACKING_URI": named}, tmp_path)


def test_a_file_of_credentials_counts_too_and_a_user_without_a_home_has_none(tmp_path):
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]")
    with pytest.raises(InputError, match="credentials would be sent"):
        refuse_unconfirmed(config_with(SERVER), {}, {}, tmp_path)
    refuse_unconfirmed(config_with(SERVER), {}, {}, None)


def test_permission_for_code_comes_from_the_command_line(tmp_path):
    config = config_with(trust=True)
    for given in ({}, {"model.trust_remote_code": "true"}, {"model.trust_remote_code": False}):
        with pytest.raises(InputError, match=r"model\.trust_remote_code = True: a sweep folder cannot permit"):
            refuse_unconfirmed(config, given, {}, tmp_path)
    refuse_unconfirmed(config, {"model.trust_remote_code": True}, {}, tmp_path)


def test_a_resume_may_repeat_these_fields_and_not_change_them():
    config = config_with(SERVER, trust=True)
    assert apply_resume_changes(config, {"tracking.uri": SERVER, "model.trust_remote_code": True}) == config
    for override in ({"tracking.uri": "https://elsewhere.org"}, {"model.trust_remote_code": False}):
        with pytest.raises(InputError, match="cannot be changed on resume"):
            apply_resume_changes(config, override)


@pytest.mark.parametrize("command", ["resume", "ui"])
def test_both_commands_ask_before_anything_is_sent(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: 1 / 0)
    folder = SweepFolder(tmp_path / "theirs")
    folder.path.mkdir()
    folder.write_config(config_with(SERVER))
    if command == "ui":
        assert main(["--mlflow", str(folder.path)]) == 2
        assert f"--tracking-uri {SERVER}" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match="only the sweep folder names this server"):
            driver.resume(str(folder.path), {})


def test_a_folder_alone_names_no_command_or_address_for_the_end(tmp_path):
    for on_end in ("bash notify.sh", "https://example.org/hook"):
        config = parse_sweep_config({**BASE, "tracking": {"on_end": on_end}})
        for given in ({}, {"tracking.on_end": "bash other.sh"}):
            with pytest.raises(InputError, match=r"tracking\.on_end = .*: a sweep folder cannot name what is started"):
                refuse_unconfirmed(config, given, {}, tmp_path)
        refuse_unconfirmed(config, {"tracking.on_end": on_end}, {}, tmp_path)
        without = apply_resume_changes(config, {"tracking.on_end": None})
        refuse_unconfirmed(without, {"tracking.on_end": None}, {}, tmp_path)


def test_the_key_of_an_address_is_not_shown_to_others():
    config = parse_sweep_config({**BASE, "tracking": {"on_end": "https://example.org/key?token=1"}})
    assert config.tracking.public_on_end == "https://example.org/..."
