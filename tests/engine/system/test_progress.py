"""A long command shows how far it is: one bar on a terminal, few lines elsewhere, lines for another process."""

from __future__ import annotations

import io
import json

from engine.system.command_line import ProgressBar, progress_lines, read_progress, tell, telling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_terminal_gets_one_line_that_is_drawn_again_and_removed_at_the_end():
    screen, clock = Terminal(), Clock()
    bar = ProgressBar(screen, clock)
    bar("merging", 1, 4)
    clock.now_s = 0.05
    bar("merging", 2, 4)  # too soon for another drawing
    clock.now_s = 0.2
    bar("merging", 3, 4)
    bar("tokenising rows", 1234, 0)
    bar.close()
    assert screen.getvalue().split("\r\x1b[K") == [
        "", "[######..................] 1/4 merging", "[##################......] 3/4 merging", "tokenising rows 1,234 ...", "",
    ]  # fmt: skip


def test_a_pipe_gets_a_line_only_for_a_part_that_takes_long():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(stream, clock)
    for now_s, done in ((0, 1), (9, 2), (11, 3), (20, 4), (42, 5)):
        clock.now_s = now_s
        bar("tokenising rows", done, 0)
    clock.now_s = 80
    bar.tick()  # nothing was told meanwhile
    bar.close()
    assert stream.getvalue().splitlines() == [f"tokenising rows {done} ..." for done in (3, 5, 5)]


def test_what_is_told_reaches_the_other_process_and_other_lines_are_left_alone():
    stream, clock = io.StringIO(), Clock()
    tell("unheard")
    with telling(progress_lines(stream, clock)):
        for done in range(5):
            tell("checking", done, 5)  # four of them too soon
        tell("checking", 5, 5)
        tell("tokenising", 7)
    tell("unheard")
    told = [read_progress(line) for line in stream.getvalue().splitlines()]
    assert told == [("checking", 0, 5), ("checking", 5, 5), ("tokenising", 7, 0)]
    others = ("", "null", "[]", "a line", '["a", "b", 1]', json.dumps(["a", 1]))
    assert [read_progress(line) for line in others] == [None] * len(others)
