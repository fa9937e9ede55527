"""A value is found in a dimension, or the point nearest to it."""

from __future__ import annotations

import pytest

from sweep.space.coordinates import OUTSIDE, coordinate, nearest
from sweep.space.parse import parse_space


def dimension(**leaf):
    return parse_space({"lora.lora_alpha": leaf}).dimensions[0]


@pytest.mark.parametrize(
    ("leaf", "value", "point"),
    [
        ({"choices": {"small": 8, "large": 64.0}}, 64, "large"),
        ({"choices": [8, 64]}, 9, OUTSIDE),
        ({"choices": {"all": "all-linear", "two": ["q_proj", "v_proj"]}}, ("q_proj", "v_proj"), "two"),
        ({"low": 1.0, "high": 4.0}, 2, 2.0),
        ({"low": 1.0, "high": 4.0}, 4.1, OUTSIDE),
        ({"low": 1.0, "high": 4.0}, True, OUTSIDE),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, 0.3, 0.3),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, 0.35, OUTSIDE),
        ({"low": 4, "high": 16, "step": 4}, 12, 12),
        ({"low": 4, "high": 16, "step": 4}, 13, OUTSIDE),
    ],
)
def test_a_value_is_found_by_what_the_config_gets(leaf, value, point):
    assert coordinate(dimension(**leaf), value) == point


@pytest.mark.parametrize(
    ("leaf", "number", "point"),
    [
        ({"low": 1e-4, "high": 1e-2, "log": True}, 5e-4, 5e-4),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1.0, 1e-2),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1e-9, 1e-4),
        ({"choices": [1e-4, 1e-3]}, 4e-4, 1e-3),  # by factors: 4 from the left, 2.5 from the right
        ({"choices": {"none": None, "a": 1e-4, "b": 1e-3}}, 2e-4, "a"),
        ({"choices": ["x", True]}, 2e-4, OUTSIDE),
        ({"choices": [4, 64]}, 16, 4),  # equally near
        ({"choices": [0.0, 0.1]}, 0.04, 0.0),
        ({"low": 4, "high": 128, "log": True}, 22.6, 23),
        ({"low": 4, "high": 10**12}, 8.4, 8),
        ({"low": 4, "high": 18, "step": 4}, 99, 16),
        ({"low": 0.0, "high": 0.3, "step": 0.1}, 0.14, 0.1),
    ],
)
def test_the_nearest_point_lies_in_the_space(leaf, number, point):
    assert nearest(dimension(**leaf), number) == point
