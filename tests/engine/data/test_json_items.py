"""A JSON list is read piece by piece, with the items and the faults that it has as a whole."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import json_items
from engine.data.readers import STRICT, read_rows
from engine.data.source_files import NamedSource, find_source
from engine.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def items(data, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items, "CHUNK", chunk)
        return list(json_items.JsonItems(b"", io.BytesIO(data), STRICT))


@given(st.lists(VALUES, max_size=5), st.booleans(), st.sampled_from([None, 1]), st.integers(1, 60))
def test_a_list_is_read_piece_by_piece_as_it_is_read_at_once(values, ascii_only, indent, chunk):
    data = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    assert items(data, chunk) == [(value, None) for value in values]


DAMAGE = st.tuples(st.integers(0, 200), st.sampled_from(["", *'[]{},:"\\0-e.n ', "\xff"]), st.booleans())


@given(st.lists(VALUES, max_size=4), DAMAGE, st.integers(1, 60))
def test_a_damaged_list_is_refused_wherever_the_pieces_end(values, damage, chunk):
    data = json.dumps(values).encode()
    at, put, over = damage
    at %= len(data)
    data = data[:at] + put.encode("latin-1") + data[at + over :]
    try:
        expected = [(value, None) for value in json.loads(data, object_pairs_hook=dict)]
        assert data.lstrip().startswith(b"[")
    except (ValueError, TypeError, AssertionError):
        with pytest.raises((json_items.DamagedJson, json_items.NoListError, UnicodeDecodeError)):
            items(data, chunk)
    else:
        found = items(data, chunk)
        assert len(found) == len(expected)
        assert all(fault or (value, None) == pair for (value, fault), pair in zip(found, expected))


def test_an_item_that_is_refused_is_bad_alone(tmp_path):
    bad = '{"text": "b", "text": "c"}, {"text": NaN}, {"n": ' + "9" * 5000 + "}"
    (tmp_path / "a.json").write_text(f'[{{"text": "a"}},\n {bad}, {{"text": "d"}}]')
    source = NamedSource("data.train", (str(tmp_path / "a.json"),))
    rows = list(read_rows(source, find_source(source)))
    assert [row.fault is None for row in rows] == [True, False, False, False, True] and rows[4].columns == {"text": "d"}
    with pytest.raises(InputError, match="data.train item 2 of a.json = .*'text' is there twice"):
        raise rows[1].fault


def test_a_long_list_takes_little_memory(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1000}] * 20_000))  # 20 MB
    source = NamedSource("data.train", (str(tmp_path / "a.json"),))
    found = find_source(source)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(source, found)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
