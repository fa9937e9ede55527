"""The driver drops output when its reader has gone."""

from __future__ import annotations

import os

import pytest

from sweep.cli.lasting_output import LastingStream


def test_output_that_nobody_takes_any_more_is_dropped_and_other_errors_are_not(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        stream = LastingStream(pipe)
        print("a trial ends", file=stream, flush=True)
        print("another", file=stream, flush=True)
    with open(tmp_path / "log", "w") as file:
        stream = LastingStream(file)
        print("whole", file=stream, flush=True)
        assert (tmp_path / "log").read_text() == "whole\n" and not stream.isatty()
        with open(tmp_path / "log") as reader:
            os.dup2(reader.fileno(), file.fileno())  # open, but not for writing
        with pytest.raises(OSError, match="Bad file descriptor"):
            print("lost", file=stream, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
