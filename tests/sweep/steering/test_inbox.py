"""Commands wait as files in the sweep folder, whole and in order; other files there do no harm."""

from __future__ import annotations

import os

from sweep.folder.sweep_folder import SweepFolder
from sweep.steering.command import parse_words
from sweep.steering.inbox import new_name, send, unread


def test_commands_wait_in_the_order_of_sending(tmp_path):
    folder = SweepFolder(tmp_path)
    assert list(unread(folder)) == []
    for now_ns, words in ((9, "stop 9"), (10**18, "finish"), (10, "stop 10")):
        send(folder, parse_words(words.split(), "ann@box", 0.0, new_name(now_ns)))
    assert [command.text for _, command in unread(folder)] == ["stop 9", "stop 10", "finish"]


def test_what_is_no_command_is_said_and_what_is_no_whole_file_is_left_alone(tmp_path):
    folder = SweepFolder(tmp_path)
    file = send(folder, parse_words(["finish"], "ann@box", 0.0, "1"))
    (folder.commands / "0.json").write_text("{")
    (folder.commands / "2.json").write_text(file.read_text())  # the same command under another name
    (folder.commands / "3.json").write_bytes(b"\xff" * 10)
    (folder.commands / "4.json").write_text("[" * 100_000)
    (folder.commands / "5.json").write_text(" " * 2_000_000)
    (folder.commands / ".6.json").write_text("half")
    (folder.commands / "7.txt").write_text("notes")
    (folder.commands / "8.json").mkdir()
    os.symlink("/etc/hostname", folder.commands / "9.json")
    found = {file.name: command for file, command in unread(folder)}
    assert list(found) == ["0.json", "1.json", "2.json", "3.json", "4.json", "5.json"]
    assert found.pop("1.json").text == "finish"
    assert all(isinstance(why, str) and "\n" not in why for why in found.values())
