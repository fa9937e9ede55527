"""Files of every kind give the same rows, and a bad one is named with its file and line."""

import bz2
import functools
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from engine.data.readers import read_rows
from engine.data.source_files import NamedSource, find_source
from engine.errors import InputError

ROWS = [{"text": f"text {i} é\u2028データ"} for i in range(5)]
gz = functools.partial(gzip.compress, mtime=0)  # names of tests hold the bytes, which must not depend on the time
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(*paths, **options):
    source = NamedSource("data.train", tuple(map(str, paths)), **options)
    return list(read_rows(source, find_source(source)))


def columns(*paths, **options):
    return [row.columns for row in rows_of(*paths, **options)]


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet_file(rows):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def twice_named():
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "A.JSONL": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "empty lines.jsonl": b"\n \n" + LINES.replace(b"\n", b"\n\n"),
    "no last end.jsonl": LINES[:-1],
    "two boms.jsonl": b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf\n",
    "a.json": json.dumps(ROWS).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES,
    "a.jsonl.gz": gz(LINES),
    "two members.jsonl.gz": gz(LINES[: len(LINES) // 2]) + gz(LINES[len(LINES) // 2 :]),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.json.gz": gz(json.dumps(ROWS).encode()),
    "a.parquet": parquet_file(ROWS),
    "a.csv": b"text\n" + "".join(row["text"] + "\n" for row in ROWS).encode(),
    "bom.csv": b"\xef\xbb\xbftext\r\n" + "".join(f'"{row["text"]}"\r\n' for row in ROWS).encode(),
    "a.tsv.gz": gz(b"text\n" + "".join(row["text"] + "\n" for row in ROWS).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert columns(tmp_path / name) == ROWS


def test_cells_of_a_table_are_text_whatever_they_look_like(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"1,5\n2",007\nnull,NA\n1e3,2024-01-01\n,true\n')
    assert columns(tmp_path / "a.csv") == [
        {"prompt": "1,5\n2", "completion": "007"}, {"prompt": "null", "completion": "NA"},
        {"prompt": "1e3", "completion": "2024-01-01"}, {"prompt": "", "completion": "true"},
    ]  # fmt: skip


def test_nulls_that_a_table_invents_are_dropped_and_nulls_that_json_says_stay(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {"y": None, "z": [2]}}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.parquet").write_bytes(parquet_file(rows))
    assert columns(tmp_path / "a.jsonl") == rows
    del calls[1]["function"]["arguments"]["y"]
    assert columns(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": \n', "must be JSON"),
        (b'{"text": "a", "text": "b"}\n', "'text' is there twice"),
        (b'{"text": NaN}\n', "NaN is not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}\n", "must be JSON"),
        (b"\xff\xfe\n", "must be UTF-8 text.*byte 1"),
        (b"[" * 100_000 + b"\n", "must be JSON"),
        (b'{"text": "b"},\n', "take the comma off"),
        (b'[{"text": "b"}\n', "belongs in a .json file"),
        (b"{'text': 'b'}\n", "json.dumps"),
    ],
)
def test_a_line_that_is_no_json_is_a_fault_of_this_row_alone(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'{"text": "b"}\n')
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row.columns for row in rows] == [{"text": "a"}, None, {"text": "b"}]
    with pytest.raises(InputError, match=f"data.train line 3 of a.jsonl = .*{said}"):
        raise rows[1].fault


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", gz(LINES * 500)[:-200], "damaged or cut off"),
        ("a.jsonl.gz", LINES, "damaged or cut off"),
        ("a.jsonl.xz", lzma.compress(LINES * 500)[:-20], "damaged or cut off"),
        ("a.jsonl.bz2", bz2.compress(LINES * 500)[:-20], "damaged or cut off"),
        ("a.jsonl.zst", zstd(LINES * 500)[:-20], "cannot be read|damaged"),
        ("a.parquet", parquet_file(ROWS)[:-30], "whole Parquet file"),
        ("a.json", b'{"text":\n "a"}', "list of samples"),
        ("a.json", b'"a"', "list of samples"),
        ("a.json", b'[{"text": 1}', "must be JSON .*item 2"),
        ("a.json", b'[{"text": 1},]', "must be JSON .*line 1, character 14.*item 2"),
        ("a.json", b'[{"text": 1}]\n{}', "must be JSON .Extra data: line 2, character 1"),
        ("a.json", b'[{"text": "\xff"}]', "UTF-8"),
        ("a.json", b"[[" + b"[" * 100_000, "nested too deeply"),
        ("a.json", json.dumps(ROWS).encode("utf-16"), "iconv"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "iconv"),
        ("a.jsonl.gz", gz(LINES.decode().encode("utf-16")), "iconv"),
        ("a.csv", "text\na\n".encode("utf-16"), "iconv"),
        ("a.csv", b"a,a\n1,2\n", "name each column once"),
        ("a.csv", b"prompt;completion\np;c\n", "is one cell with ';' in it.*commas"),
        ("a.csv", b"prompt\tcompletion\np\tc\n", "tsv"),
        ("a.tsv", b"prompt,completion\np,c\n", "is one cell with ',' in it"),
        ("a.jsonl", b"PK\x03\x04\x14\0\0\0", "ZIP"),
        ("a.jsonl", gz(LINES), "is no text but gzip"),
        ("a.jsonl.gz", gz(gz(LINES)), "is no text but gzip"),
        ("a.json", parquet_file(ROWS), "is no text but Parquet"),
        ("a.csv", POINTER, "git lfs pull"),
        ("a.jsonl", POINTER, "git lfs pull"),
        ("a.parquet", POINTER, "git lfs pull"),
        ("a.parquet", twice_named(), "name each column once, and has text, text"),
        ("a.jsonl", LINES.decode().encode("utf-32"), "iconv -f UTF-32"),
        ("a.csv", b'a,b\n"1,2\n', "must be CSV"),
        ("a.csv", b"a\n\xff\n", "UTF-8"),
        ("a.txt", b"hello", "allowed file types"),
        ("a.parquet.gz", b"", "allowed file types"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        rows_of(tmp_path / name)
    assert "data.train" in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_of_a_table_with_too_few_cells_is_bad_alone(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1\n3,4\n")
    assert [row.fault is None for row in rows_of(tmp_path / "a.csv")] == [True, False, True]


def folder_of(path: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"text": str(i)}) + "\n")
    return path


def test_lists_and_patterns_are_read_in_their_order(tmp_path):
    folder_of(tmp_path, "b.jsonl", "a.jsonl", "sub/c.jsonl", "[1].jsonl")
    assert columns(tmp_path / "b.jsonl", tmp_path / "a.jsonl") == [{"text": "0"}, {"text": "1"}]
    assert columns(tmp_path / "?.jsonl") == [{"text": "1"}, {"text": "0"}]
    assert columns(tmp_path / "**/*.jsonl") == [{"text": "3"}, {"text": "1"}, {"text": "0"}, {"text": "2"}]
    assert columns(tmp_path / "[1].jsonl") == [{"text": "3"}]
    names = [row.name for row in rows_of(tmp_path / "b.jsonl", tmp_path / "a.jsonl")]
    assert names == ["data.train line 1 of b.jsonl", "data.train line 1 of a.jsonl"]


def test_the_identity_covers_every_file_and_its_place(tmp_path):
    folder_of(tmp_path, "a.jsonl", "b.jsonl")

    def identity(*names):
        return find_source(NamedSource("data.train", tuple(str(tmp_path / name) for name in names))).identity

    one, both, turned = identity("a.jsonl"), identity("a.jsonl", "b.jsonl"), identity("b.jsonl", "a.jsonl")
    assert len({one, both, turned}) == 3
    assert identity("*.jsonl") == both
    (tmp_path / "b.jsonl").write_text('{"text": "changed"}\n')
    assert identity("a.jsonl", "b.jsonl") != both and identity("a.jsonl") == one


def test_a_folder_is_read_by_its_splits(tmp_path):
    folder_of(tmp_path, "train.jsonl", "test.jsonl")
    assert columns(tmp_path) == [{"text": "0"}] and columns(tmp_path, split="test") == [{"text": "1"}]
    with pytest.raises(InputError, match="data.train_split = 'dev': .* has train, test"):
        columns(tmp_path, split="dev")
    assert columns(folder_of(tmp_path / "plain", "2.jsonl", "1.jsonl")) == [{"text": "1"}, {"text": "0"}]
    for extra in ("x.jsonl", "x.csv"):
        folder_of(tmp_path / extra, "train.jsonl", extra)
        with pytest.raises(InputError, match=f"also holds {extra}"):
            columns(tmp_path / extra)
    with pytest.raises(InputError, match="no data set"):
        columns(folder_of(tmp_path / "empty", "README.md"))


def test_a_saved_data_set_is_read_by_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert columns(tmp_path / "one") == ROWS == columns(tmp_path / "two")
    assert columns(tmp_path / "two", split="test") == [ROWS[1]]
    with pytest.raises(InputError, match="data.train_split = 'dev'.*has test, train"):
        columns(tmp_path / "two", split="dev")
    with pytest.raises(InputError, match="data.train_split = 'test': has no effect"):
        columns(tmp_path / "one", split="test")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(InputError, match="whole saved data set"):
        columns(tmp_path / "one")


def test_the_identity_says_how_the_bytes_are_read(tmp_path):
    names = ["a.csv", "a.tsv", "a.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(b"text\na\n")
    assert len({find_source(NamedSource("data.train", (str(tmp_path / name),))).identity for name in names}) == 3


def test_a_folder_may_hold_the_hub_s_descriptions(tmp_path):
    folder_of(tmp_path, "train.jsonl", "README.md")
    for name in ("dataset_infos.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert columns(tmp_path) == [{"text": "0"}]


@pytest.mark.parametrize("options", [{"split": "test"}, {"name": "en"}, {"revision": "main"}, {"files": ("a",)}])
def test_an_option_without_effect_on_a_file_is_refused(tmp_path, options):
    folder_of(tmp_path, "a.jsonl")
    with pytest.raises(InputError, match=f"data.train_{next(iter(options))} = .*no effect on a file"):
        rows_of(tmp_path / "a.jsonl", **options)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["none.jsonl"], "no such file"), (["none*.jsonl"], "no file matches"), (["a.jsonl", "none.jsonl"], "no such file"),
        (["a.jsonl", "."], "a list holds files"), (["no such folder/"], "no such file"), (["x" * 300], "no such file"),
        (["a.jsonl", "x" * 300], "no such file"),
        (["*"], "allowed file types"),
    ],
)  # fmt: skip
def test_a_source_that_is_not_there_is_one_line(tmp_path, names, said):
    folder_of(tmp_path, "a.jsonl", "b.txt")
    with pytest.raises(InputError, match=said):
        rows_of(*(f"{tmp_path}/{name}" for name in names))


def test_the_hub_is_asked_for_configuration_revision_and_files(monkeypatch):
    import datasets

    asked = []

    class Found(list):
        _fingerprint = "f"

    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((given, options)) or Found(ROWS))
    assert columns("org/set", split="test[:5]", name="en", revision="abc", files=("a.jsonl",)) == ROWS
    assert asked == [(("org/set", "en"), {"split": "test[:5]", "revision": "abc", "data_files": ["a.jsonl"]})]
