"""data.json holds digests, which later sweeps compare, and the accounts, which people read."""

import json

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
