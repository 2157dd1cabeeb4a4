"""Reading results files: {"machine": {...}, "rows": [...]}."""

import json
from collections import defaultdict
from pathlib import Path

SHAPE = ("num_heads_q", "num_heads_kv", "head_dim_qk", "head_dim_v")
KEY = ("suite", "op", "impl", "direction", "data", "batch", "length", *SHAPE)
Key = tuple[str | int, ...]


def load(path: Path) -> dict:
    result = json.loads(Path(path).read_text())
    if not {"machine", "rows"} <= result.keys():
        raise SystemExit(f"{path} is not a results file of benchmarks/run.py: it has no machine and rows")
    for row in result["rows"]:
        row.setdefault("batch", 1)  # files older than batches
    return result


def by_key(rows: list[dict]) -> dict[Key, dict]:
    """Rows by what they measure."""
    return {tuple(row[name] for name in KEY): row for row in rows}


def by_impl(rows: list[dict], **labels: str | int) -> dict[str, dict[int, dict]]:
    """impl -> length -> row, of the rows with these labels."""
    table: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows:
        if labels.items() <= row.items():
            table[row["impl"]][row["length"]] = row
    return dict(table)


def shape_of(row: dict) -> tuple[int, ...]:
    return tuple(row[name] for name in SHAPE)


def caption(machine: dict, rows: list[dict]) -> str:
    """One line that says what was measured on what; heads and dims only where all rows share them."""
    shared = {shape_of(row) for row in rows}
    words = [rows[0]["dtype"]]
    if len(shared) == 1:
        heads_q, heads_kv, dim_qk, dim_v = shared.pop()
        dims = f"dim {dim_qk}" if dim_qk == dim_v else f"dims {dim_qk} and {dim_v}"
        words = [f"{heads_q} query / {heads_kv} KV heads", dims, *words]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['isa_torch']}, {machine['threads']} threads"
    when = f"{machine['date'][:10]}, {machine['revision']}"
    return f"{', '.join(words)}; {device}; torch {machine['torch']}; {when}"
