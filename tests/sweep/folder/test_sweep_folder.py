"""data.json holds digests, which later sweeps compare, and the accounts, which people read."""

import fcntl
import json
import threading

import pytest

from engine.errors import InputError
from sweep.folder.sweep_folder import SweepFolder
from tests.support.reports import make_account


def test_digests_and_accounts_are_kept_apart(tmp_path):
    folder, account = SweepFolder(tmp_path), make_account()
    assert folder.read_data() is None and folder.read_accounts() == []
    folder.write_data({"training": "ab"}, [account])
    assert folder.read_data() == {"training": "ab"} and folder.read_accounts() == [account]


def test_a_sweep_without_accounts_is_read(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"training": "ab"}))
    assert SweepFolder(tmp_path).read_data() == {"training": "ab"} and SweepFolder(tmp_path).read_accounts() == []


@pytest.mark.parametrize("accounts", ["5", "null", '{"a": 1}', "[5]", '[{"part": "x"}]'])
def test_accounts_that_someone_edited_are_one_line(tmp_path, accounts):
    folder = SweepFolder(tmp_path)
    folder.data_file.write_text(f'{{"training": "ab", "accounts": {accounts}}}')
    assert folder.read_data() == {"training": "ab"}
    with pytest.raises(InputError, match=r"data\.json\.accounts") as error:
        folder.read_accounts()
    assert "\n" not in str(error.value)


def test_a_link_out_of_an_earlier_sweep_is_said_of_the_field_that_named_it(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep_config.json").write_text("{}")
    (tmp_path / "sweep" / "best").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link out") as error:
        SweepFolder.open(tmp_path / "sweep", "sweep.warm_start")
    assert error.value.field == "sweep.warm_start"


def test_a_driver_that_begins_while_somebody_asks_begins_and_is_seen(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.lock_file.touch()
    with folder.lock_file.open() as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)
        assert not folder.is_driven()
        threading.Timer(0.05, fcntl.flock, (asker, fcntl.LOCK_UN)).start()
        with folder.lock():
            assert folder.is_driven()
    assert not folder.is_driven()
