"""Read rows from files and data sets one after the other, and give each a name for messages."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.data.json_items import CHUNK, DamagedJson, JsonItems, NoListError
from engine.data.source_files import FoundSource, NamedSource, file_digest, kind_of
from engine.errors import InputError, first_line
from engine.units import counted

BOM = "\ufeff"
POINTER = b"version https://git-lfs"
MAGIC = {
    POINTER: "a pointer of Git LFS; fetch the file itself: git lfs pull",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; unpack it, or export CSV", b"PAR1": "Parquet; let its name end in .parquet",
    b"\x1f\x8b": "gzip; let its name end in .gz, once, or unpack it", b"BZh": "bzip2; let its name end in .bz2, or unpack it",
    b"\xfd7zXZ": "xz; let its name end in .xz, or unpack it",
    b"\x28\xb5\x2f\xfd": "Zstandard; let its name end in .zst, or unpack it",
    b"ARROW1": "an Arrow file; write Parquet, or datasets' save_to_disk", b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file; write Parquet or JSON Lines", b"\x80\x04": "a pickle; write Parquet or JSON Lines",
}  # fmt: skip
WIDE = {  # the longer ones first
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}  # fmt: skip
OPENERS = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class SourceRow(NamedTuple):
    """One row of a source: its name for messages, and its columns.

    fault: why this row alone cannot be read, or None. A fault of a whole file is raised.
    """

    name: str
    columns: Any
    fault: InputError | None = None


def read_rows(source: NamedSource, found: FoundSource) -> Iterator[SourceRow]:
    """Yield the rows in order. InputError if a file is damaged, or at its end if it has changed."""
    if found.dataset is not None:
        for i, row in enumerate(found.dataset, 1):
            yield SourceRow(f"{source.field} row {i}", _without_invented_nulls(row))
    for path, digest in zip(found.files, found.digests):
        try:
            yield from _read_file(source.field, path)
            if file_digest(path) != digest:
                raise InputError(source.field, str(path), "changed while it was read; start again once it is whole")
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise InputError(source.field, str(path), f"is damaged or cut off ({first_line(error)})") from None
        except OSError as error:
            raise InputError(source.field, str(path), f"cannot be read ({first_line(error)})") from None


def _read_file(field: str, path: Path) -> Iterator[SourceRow]:
    kind, compression = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(field, path)
        return
    with _open(path, compression) as handle:
        if foreign := _foreign(handle.peek(64)[:64]):
            raise InputError(field, str(path), foreign)
        if kind in (".csv", ".tsv"):
            yield from _read_table(field, path, handle, "\t" if kind == ".tsv" else ",")
        elif kind == ".json":
            yield from _read_json(field, path, handle)
        else:
            yield from _read_lines(field, path, handle)


def _foreign(begin: bytes) -> str:
    """Return what is wrong with a file that begins so, if it holds something else than UTF-8 text."""
    for magic, what in MAGIC.items():
        if begin.startswith(magic):
            return f"is no text but {what}"
    wide = next((name for name, bom in WIDE.items() if begin.startswith(bom)), None)
    if wide is None and len(begin) > 3 and (begin[1] == begin[3] == 0 != begin[0] or begin[0] == begin[2] == 0 != begin[1]):
        wide = "UTF-16LE" if begin[0] else "UTF-16BE"
    return f"must be UTF-8 text, and begins like {wide}; save it as UTF-8: iconv -f {wide} -t UTF-8" if wide else ""


def _open(path: Path, compression: str) -> BinaryIO:
    if compression != ".zst":
        return OPENERS[compression](path, "rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _read_parquet(field: str, path: Path) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise InputError(field, str(path), f"must name each column once, and has {', '.join(names)}")
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        for i, row in enumerate(rows, 1):
            yield SourceRow(f"{field} row {i} of {path.name}", _without_invented_nulls(row))
    except (OSError, pa.ArrowException) as error:
        with path.open("rb") as handle:
            why = MAGIC[POINTER] if handle.read(len(POINTER)) == POINTER else ""
        why = f"is {why}" if why else f"must be a whole Parquet file ({first_line(error)})"
        raise InputError(field, str(path), why) from None


def _read_table(field: str, path: Path, handle: BinaryIO, delimiter: str) -> Iterator[SourceRow]:
    """Read CSV or TSV; every cell is text, whatever it looks like."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    where = f"{field} line {{}} of {path.name}"
    try:
        header = next(lines, [])
        if len(set(header)) != len(header):
            raise InputError(where.format(1), header, "must name each column once")
        other = next((mark for mark in ";\t|," if len(header) == 1 and mark in header[0]), None)
        if other:
            mended = "commas, in a .csv file" if delimiter == "\t" else "commas, or by tabs in a .tsv file"
            raise InputError(where.format(1), header[0], f"is one cell with {other!r} in it; cells must be separated by {mended}")
        for cells in lines:
            name = where.format(lines.line_num)
            if not cells:
                continue
            if len(cells) != len(header):
                names = counted(len(header), "column")
                fault = InputError(name, cells, f"has {counted(len(cells), 'cell')}; the first line names {names}")
                yield SourceRow(name, None, fault)
            else:
                yield SourceRow(name, dict(zip(header, cells)))
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"must be UTF-8 text ({error}); iconv -f <its encoding> -t UTF-8") from None
    except csv.Error as error:
        raise InputError(where.format(lines.line_num), str(path), f"must be CSV ({error})") from None


def _read_json(field: str, path: Path, handle: BinaryIO) -> Iterator[SourceRow]:
    """Read one JSON list. A file that has one object in each line is read as JSON Lines."""
    first = handle.readline(CHUNK)
    if first.removeprefix(BOM.encode()).lstrip().startswith(b"{"):
        first += handle.readline() if not first.endswith(b"\n") else b""
        try:
            _parse("", first.decode("utf-8-sig"))
        except (InputError, UnicodeDecodeError):
            raise InputError(field, str(path), "must hold a list of samples, or one in each line") from None
        yield from _read_lines(field, path, handle, first)
        return
    name = f"{field} item {{}} of {path.name}"
    number = 0
    try:
        for number, (row, error) in enumerate(JsonItems(first, handle, STRICT), 1):
            fault = None if error is None else InputError(name.format(number), "an item", f"must be JSON ({first_line(error)})")
            yield SourceRow(name.format(number), row, fault)
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"must be UTF-8 text ({error.reason} behind item {number})") from None
    except NoListError as error:
        raise InputError(field, str(path), f"must hold a list of samples, not a {error}") from None
    except DamagedJson as error:
        raise InputError(field, str(path), f"must be JSON ({error}, in item {number + 1} or behind it)") from None


def _read_lines(field: str, path: Path, handle: BinaryIO, first: bytes = b"") -> Iterator[SourceRow]:
    """Read JSON Lines; empty lines are passed over."""
    for i, line in enumerate(([first] if first else []), 1):
        yield _row_of_line(f"{field} line {i} of {path.name}", line)
    for i, line in enumerate(handle, 2 if first else 1):
        if line.strip() not in (b"", BOM.encode()):
            yield _row_of_line(f"{field} line {i} of {path.name}", line)


def _row_of_line(name: str, line: bytes) -> SourceRow:
    try:
        return SourceRow(name, _parse(name, line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        fault = InputError(name, line[:60], f"must be UTF-8 text ({error.reason} at byte {error.start + 1} of the line)")
    except InputError as error:
        way_out = _way_out(line.decode().strip())
        fault = InputError(name, error.value, f"{error.allowed}{way_out}") if way_out else error
    return SourceRow(name, None, fault)


def _way_out(line: str) -> str:
    """Return what to do about a line that is no JSON, for the usual kinds; "" for others."""
    if line.startswith("["):
        return "; a list of rows belongs in a .json file, a .jsonl file has one object in each line"
    if line.startswith(("{'", '{"')) and line.endswith(","):
        return "; take the comma off the ends of the lines"
    return "; Python wrote this line, not JSON: write it with json.dumps" if line.startswith("{'") else ""


def _parse(where: str, text: str) -> Any:
    try:
        return STRICT.decode(text)
    except ValueError as error:
        raise InputError(where, text.strip()[:60], f"must be JSON ({error})") from None
    except RecursionError:
        raise InputError(where, text.strip()[:60], "must be JSON that is less deeply nested") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object. Python would keep the last of two equal keys and drop the first unsaid."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _without_invented_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop empty keys inside the columns: a table gives every object the keys of all others."""
    return {name: _compact(value) for name, value in row.items()}


def _compact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _compact(part) for key, part in value.items() if part is not None}
    return [_compact(part) for part in value] if isinstance(value, list) else value
