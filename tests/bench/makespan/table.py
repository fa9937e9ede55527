"""Write the makespan's rows as Markdown. No torch."""

from __future__ import annotations

import json
from typing import Any

COLUMNS = ("system", "trials done", "wall s", "GPU s", "tokens trained", "tok/s, everything counted", "outcomes")
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "trl", "unsloth", "ray", "optuna")


def table(records: list[dict[str, Any]]) -> str:
    """Return a table for each job and card, with its rows' versions and commits under it. The last row of a name counts."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        key = (json.dumps(record["job"], sort_keys=True), record["card"])
        groups.setdefault(key, {})[_name(record)] = record
    return "\n\n".join(_group(list(group.values())) for group in groups.values())


def _group(rows: list[dict[str, Any]]) -> str:
    job = rows[0]["job"]
    cap = f", capped at {job['cap_gib']} GiB" if job["cap_gib"] and rows[0]["card"] != "CPU" else ""
    budget = f"{job['trials']} trials of {job['report_at'][-1]:,} tokens, {len(job['report_at'])} rungs"
    title = f"**{job['model']}, {budget}, rows of {job['length']:,}, seed {job['seed']}, {rows[0]['card']}{cap}**"
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 2)}---|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join([*lines, "", *(f"{_name(row)}: {_place(row)}" for row in rows)])


def _name(row: dict[str, Any]) -> str:
    """Return the system, and how many of its processes shared the card if several did."""
    return f"{row['system']}, {row['peers_at_once']} at once" if row.get("peers_at_once", 1) > 1 else row["system"]


def _cells(row: dict[str, Any]) -> list[str]:
    said = ", ".join(f"{count} {name}" for name, count in row.get("outcomes", {}).items())
    if "error" in row:
        reason = " ".join(row["error"].split()).replace("|", "\\|")
        return [_name(row), f"{row.get('trials_done', 0)} of {row['trials']}", "", "", "", "", f"failed: {reason}"]
    cut = "" if row["trials_ended"] >= row["trials"] else " (cut by the budget)"
    return [
        _name(row),
        f"{row['trials_done']} of {row['trials']}{cut}",
        f"{row['wall_s']:,.1f}",
        f"{row['gpu_s']:,.1f}",
        f"{row['tokens']:,}",
        "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        said + (f"; first failure: {row['first_failure']}" if "first_failure" in row else ""),
    ]


def _place(row: dict[str, Any]) -> str:
    versions = [f"{name} {row[f'version.{name}']}" for name in PACKAGES if f"version.{name}" in row]
    changed = "+changes" * row["git.commit"].endswith("+changes")
    return ", ".join([*versions, *([f"commit {row['git.commit'][:9]}{changed}"] if row["git.commit"] else [])])
