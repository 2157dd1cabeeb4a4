"""Reading results files: {"machine": {...}, "rows": [...]}."""

import json
from collections import defaultdict
from pathlib import Path

Key = tuple[str, str, str, str, str, int]


def load(path: Path) -> dict:
    result = json.loads(Path(path).read_text())
    if not {"machine", "rows"} <= result.keys():
        raise SystemExit(f"{path} is not a results file of benchmarks/run.py: it has no machine and rows")
    return result


def by_key(rows: list[dict]) -> dict[Key, dict]:
    """Rows by what they measure."""
    return {
        tuple(row[name] for name in ("suite", "op", "impl", "direction", "data", "length")): row
        for row in rows
    }


def by_impl(rows: list[dict], op: str, direction: str, data: str) -> dict[str, dict[int, dict]]:
    """impl -> length -> row, of one op, direction and data."""
    table: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows:
        if (row["op"], row["direction"], row["data"]) == (op, direction, data):
            table[row["impl"]][row["length"]] = row
    return dict(table)


def caption(machine: dict, rows: list[dict]) -> str:
    """One line that says what was measured on what."""
    row = rows[0]
    heads = f"{row['num_heads_q']} query / {row['num_heads_kv']} KV heads"
    dims = f"dim {row['head_dim_qk']}, {row['dtype']}"
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['isa_torch']}, {machine['threads']} threads"
    return (
        f"{heads}, {dims}; {device}; torch {machine['torch']}; {machine['date'][:10]}, {machine['revision']}"
    )
