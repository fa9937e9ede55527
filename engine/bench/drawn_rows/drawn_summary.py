"""Sum up records of drawn settings: false fits, errors of predictions, and every outlier with its setting."""

from __future__ import annotations

import math
from typing import Any

OUTLIER, SPEED_OUTLIER, FULL = 0.05, 0.3, 0.97
OTHERS_GIB = 1.0  # of other processes on the card; with more of them, speeds do not count

Record = dict[str, Any]


def error_of(record: Record, name: str) -> float:
    """Return by how much a prediction is above what was measured. name: allocated, reserved or speed."""
    if name == "speed":
        return record["predicted_tokens_per_second"] / record["tokens_per_second"] - 1.0
    predicted = record["predicted_gib" if name == "allocated" else "predicted_reserved_gib"]
    return predicted / record[f"peak_{name}_gib"] - 1.0


def is_full(record: Record) -> bool:
    """Return True if some row has nearly all the tokens that it may have, for which memory is planned."""
    return record["largest_row"]["tokens"] >= FULL * record["largest_row"]["capacity"]


def summary(records: list[Record]) -> str:
    """Return a text: numbers of settings and false fits, errors, and the outliers."""
    tried = [record for record in records if record["fits"]]
    false_fits = [record for record in tried if record["num_out_of_memory"]]
    refused, failed = ([record for record in records if key in record] for key in ("refused", "failed"))
    head = f"{len(tried)} settings of {len({record['name'] for record in tried})} shapes ran: {len(false_fits)} out of memory"
    lines = [f"{head}; {len(refused)} refused, {len(failed)} failed"]
    whole = [record for record in tried if not record["num_out_of_memory"]]
    alone = [record for record in whole if record["others_gib"] < OTHERS_GIB]
    full = [record for record in whole if is_full(record)]
    parts = (("allocated", "", whole), ("reserved", "", whole), ("reserved", " where a row is full", full), ("speed", "", alone))
    for name, where, of in parts:
        errors = sorted(error_of(record, name) for record in of)
        if errors:
            sizes = sorted(map(abs, errors))
            p95 = sizes[math.ceil(0.95 * len(sizes)) - 1]
            spread = f"from {errors[0]:+.1%} to {errors[-1]:+.1%}, median {errors[len(errors) // 2]:+.1%}"
            lines.append(f"{name}{where}: |error| p95 {p95:.1%}, {spread}, {len(errors)} settings")
    far = [record for record in whole if abs(error_of(record, "reserved")) > OUTLIER]
    slow = [record for record in alone if record not in far and error_of(record, "speed") > SPEED_OUTLIER]
    titles = {"out of memory": false_fits, "reserved off": far, "slower than predicted": slow, "failed": failed}
    for title, some in titles.items():
        lines += [f"- {title}: {line_of(record)}\n  {_setting(record)}" for record in some]
    return "\n".join(lines)


def line_of(record: Record) -> str:
    """Return a record as one line: the shape, then predicted / measured memory and speed."""
    shape = record["shape"]
    name = f"{record['number']:>3} {shape['model_type']} {shape['num_hidden_layers']}x{shape['hidden_size']}"
    if not record["fits"]:
        return f"{name:<28} {record.get('refused') or record.get('failed')}, {record.get('seconds', 0):.1f} s"
    peaks = " ".join(
        f"{record[a]:6.2f}/{record[f'peak_{b}_gib']:5.2f} ({error_of(record, b):+.1%})"
        for a, b in (("predicted_gib", "allocated"), ("predicted_reserved_gib", "reserved"))
    )
    speed = f"{record['predicted_tokens_per_second']}/{record.get('tokens_per_second')} tok/s"
    trouble = f"{record['num_out_of_memory']} ooms {record['num_retries']} retries"
    return f"{name:<28} {peaks} {trouble}, {speed}, {record['plan']}, {record['seconds']:.1f} s"


def _setting(record: Record) -> str:
    sections = [f"{section}.{key}={value}" for section, values in record["config"].items() for key, value in values.items()]
    rows = record.get("largest_row", {})
    given = {**record["lengths"], **{f"row.{key}": value for key, value in rows.items()}}
    return " ".join([*sections, *(f"{key}={value}" for key, value in given.items())])
