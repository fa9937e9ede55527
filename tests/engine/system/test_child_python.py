"""A child process gets this program's modules, and threads that do not spin."""

from __future__ import annotations

import os

from engine.system.child_python import own_environment


def test_the_working_folder_is_not_on_the_path_and_threads_sleep_unless_the_user_says_otherwise():
    found = own_environment({"PYTHONPATH": f"{os.pathsep}/mine", "HOME": "/h"})
    assert "" not in found["PYTHONPATH"].split(os.pathsep) and found["PYTHONPATH"].endswith("/mine")
    assert found["HOME"] == "/h" and found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert own_environment({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"
