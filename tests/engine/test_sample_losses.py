"""The file of sample losses is read only as what it is: the losses of the adapter that a report tells of."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest

from engine.errors import InputError
from engine.sample_losses import SAMPLE_LOSSES, SampleLosses, read_sample_losses, write_sample_losses
from tests.support.reports import make_report

LOSSES = SampleLosses("0123456789abcdef", (0.1 + 0.2, 7.0, 1e-17, 3.3333333333333335), (3, 4, 0, 2))


def test_losses_are_read_as_they_were_written(tmp_path):
    report = make_report(3, LOSSES.mean)
    assert read_sample_losses(tmp_path, report) is None
    write_sample_losses(tmp_path, 3, LOSSES)
    assert read_sample_losses(tmp_path, report) == LOSSES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rung": 2}, "it is of rung 2 with loss"),
        ({"sums": [0.3, 7.0, 0.0, 3.4]}, "it is of rung 3 with loss"),
        ({"sums": [0.3, 7.0]}, "its sums and counts do not match"),
        ({"num_targets": [3, 4, -1, 2]}, "its sums and counts do not match"),
        ({"num_targets": [0, 0, 0, 0]}, "its sums and counts do not match"),
        ({"sums": [], "num_targets": []}, "its sums and counts do not match"),
        ({"sums": "x"}, "adapters.sums = 'x'"),
        ({"sums": [None, 7.0, 0.0, 3.4]}, "adapters.sums"),
        ({"sums": None}, "adapters.sums"),
        (None, "adapters = 5"),
        ("{", "it is not valid JSON"),
        ('{"adapters": 5}', "it is not valid JSON of lists"),
        ('{"adapters": []}', "it has no adapters"),
        ("5", "it has no adapters"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_report_is_one_line(tmp_path, changes, said):
    write_sample_losses(tmp_path, 3, LOSSES)
    file = tmp_path / SAMPLE_LOSSES
    values = json.loads(file.read_text())["adapters"][0]
    text = changes if isinstance(changes, str) else json.dumps({"adapters": [5 if changes is None else values | changes]})
    file.write_text(text)
    with pytest.raises(InputError, match="must hold the sample losses of the adapter beside it, but " + said) as error:
        read_sample_losses(tmp_path, make_report(3, LOSSES.mean))
    assert "\n" not in str(error.value)


def test_the_file_keeps_the_losses_of_the_adapter_that_is_about_to_be_replaced(tmp_path):
    def readable():
        found = {}
        for rung, losses in made.items():
            with suppress(InputError):
                found[rung] = read_sample_losses(tmp_path, make_report(rung, losses.mean))
        return found

    made = {rung: replace(LOSSES, sums=(float(rung), *LOSSES.sums[1:])) for rung in (1, 2, 5, 7)}
    # a resumed trial repeats rungs
    for rung, left in [(1, [1]), (2, [1, 2]), (5, [2, 5]), (5, [2, 5]), (2, [2, 5]), (7, [2, 7])]:
        write_sample_losses(tmp_path, rung, made[rung])
        assert readable() == {one: made[one] for one in left}
    (tmp_path / SAMPLE_LOSSES).write_text("{")
    write_sample_losses(tmp_path, 5, made[5])
    assert readable() == {5: made[5]}


def test_no_pair_with_a_margin_is_an_accuracy_of_0_without_a_sign():
    base = SampleLosses("d", (0.7, 0.7), (1, 1), margins=(0.0, 0.0))
    assert f"{base.preference_accuracy:.4f}" == "0.0000"
    assert replace(base, margins=(0.2, -0.1)).preference_accuracy == 0.5
