"""Reading results files: {"machine": {...}, "rows": [...]}."""

import json
from collections import defaultdict
from pathlib import Path

KEY = ("suite", "op", "impl", "direction", "data", "length")
KEY += ("num_heads_q", "num_heads_kv", "head_dim_qk", "head_dim_v")
Key = tuple[str | int, ...]


def load(path: Path) -> dict:
    result = json.loads(Path(path).read_text())
    if not {"machine", "rows"} <= result.keys():
        raise SystemExit(f"{path} is not a results file of benchmarks/run.py: it has no machine and rows")
    return result


def by_key(rows: list[dict]) -> dict[Key, dict]:
    """Rows by what they measure."""
    return {tuple(row[name] for name in KEY): row for row in rows}


def by_impl(rows: list[dict], op: str, direction: str, data: str) -> dict[str, dict[int, dict]]:
    """impl -> length -> row, of one op, direction and data."""
    table: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows:
        if (row["op"], row["direction"], row["data"]) == (op, direction, data):
            table[row["impl"]][row["length"]] = row
    return dict(table)


def caption(machine: dict, rows: list[dict]) -> str:
    """One line that says what was measured on what; heads and dims only where all rows share them."""
    shared = {
        (row["num_heads_q"], row["num_heads_kv"], row["head_dim_qk"], row["head_dim_v"]) for row in rows
    }
    words = [rows[0]["dtype"]]
    if len(shared) == 1:
        heads_q, heads_kv, dim_qk, dim_v = shared.pop()
        dims = f"dim {dim_qk}" if dim_qk == dim_v else f"dims {dim_qk} and {dim_v}"
        words = [f"{heads_q} query / {heads_kv} KV heads", dims, *words]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['isa_torch']}, {machine['threads']} threads"
    when = f"{machine['date'][:10]}, {machine['revision']}"
    return f"{', '.join(words)}; {device}; torch {machine['torch']}; {when}"
