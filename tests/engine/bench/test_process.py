"""A process hands back results, or one line of reason, and runs this code."""

import pytest

from engine.bench.process import ROOT, run_python


@pytest.mark.parametrize(
    "code, result",
    [
        ("print('a banner'); hand_back({'x': 1}); print('goodbye')", {"x": 1}),
        ("hand_back({'x': 1}); raise ValueError('at exit')", {"error": "ValueError: at exit"}),
        ("import sys; print('OddError: no card\\na warning', file=sys.stderr); sys.exit(1)", {"error": "OddError: no card"}),
        ("class OutOfMemoryError(Exception): pass\nraise OutOfMemoryError('2 GiB')", {"error": "out of memory"}),
        ("import os; os._exit(9)", {"error": "exit code 9"}),
        ("import time; time.sleep(60)", {"error": "timed out"}),
    ],
)
def test_a_process_hands_back_a_result_or_one_line_of_reason(tmp_path, code, result):
    prelude = "from engine.bench.process import hand_back\n"
    assert run_python(["-c", prelude + code], tmp_path, 0.5 if "sleep" in code else 30.0) == result


def test_a_process_gets_variables_of_its_own_and_this_code_first(tmp_path):
    code = "import os; from engine.bench.process import hand_back; hand_back(dict(os.environ))"
    found = run_python(["-c", code], tmp_path, 30.0, {"OWN": "1", "PYTHONPATH": "/peers"})
    assert found["OWN"] == "1" and found["PYTHONPATH"].split(":") == [str(ROOT), "/peers"]
