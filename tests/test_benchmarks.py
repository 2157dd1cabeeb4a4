"""The benchmark scripts: a quick run writes the promised rows, and the scripts that read them can."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PROMISED = {
    "suite",
    "op",
    "impl",
    "direction",
    "length",
    "data",
    "ms",
    "p10_ms",
    "p90_ms",
    "tflops",
    "peak_bytes",
}
SINGLE_OPS = {
    "compress",
    "compressed_attention",
    "block_scores",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "gated_combine",
}
DIRECTIONS = {"forward", "backward", "step"}


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    run_script("run.py", "--suite", "cpu", "--quick", "--json", path)
    return path


@pytest.fixture(scope="module")
def rows(results: Path) -> list[dict]:
    return json.loads(results.read_text())["rows"]


def test_rows_have_the_promised_keys(rows: list[dict]):
    for row in rows:
        assert row.keys() >= PROMISED
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"]


def test_attention_is_measured_beside_dense_attention(rows: list[dict]):
    attention = [row for row in rows if row["op"] == "attention"]
    lengths = {row["length"] for row in attention}
    assert len(lengths) >= 2
    measured = {(row["impl"], row["direction"], row["length"]) for row in attention}
    assert measured == {(impl, d, t) for impl in ("nsa", "sdpa") for d in DIRECTIONS for t in lengths}


def test_every_single_op_is_measured(rows: list[dict]):
    assert {row["op"] for row in rows} == SINGLE_OPS | {"attention"}
    without_gradient = {"block_scores", "select_blocks"}
    for op in SINGLE_OPS:
        expected = {"forward"} if op in without_gradient else DIRECTIONS
        assert {row["direction"] for row in rows if row["op"] == op} == expected


def test_peak_memory_holds_at_least_what_must_be_returned(rows: list[dict]):
    for row in rows:
        if row["op"] != "attention" or row["peak_bytes"] is None:
            continue
        o = row["length"] * row["num_heads_q"] * row["head_dim_v"] * 4
        dq = row["length"] * row["num_heads_q"] * row["head_dim_qk"] * 4
        returned = {"forward": o, "backward": dq, "step": o + dq}[row["direction"]]
        assert row["peak_bytes"] >= 0.95 * returned  # the allocator may hold a few pages from before


def test_machine_names_versions_but_no_host_or_path(results: Path):
    machine = json.loads(results.read_text())["machine"]
    assert machine.keys() >= {"cpu", "cores", "threads", "torch", "revision", "nsa_ext", "date", "command"}
    assert machine["threads"] == 2
    text = json.dumps(machine)
    assert socket.gethostname() not in text
    assert str(ROOT) not in text and str(Path.home()) not in text and str(results.parent) not in text


def test_table_lists_every_length_and_enters_a_document(results: Path, rows: list[dict], tmp_path: Path):
    table = run_script("table.py", results).stdout
    for length in {row["length"] for row in rows}:
        assert f"| {length:,} |" in table
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- benchmark: cpu -->\nold\n<!-- end of benchmark -->\nafter\n")
    run_script("table.py", results, "--into", document)
    text = document.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "old" not in text
        and table.strip() in text
    )


def test_plot_writes_a_png(results: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    output = tmp_path / "plot.png"
    run_script("plot.py", results, "--output", output)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_compare_flags_only_what_exceeds_noise(results: Path, rows: list[dict], tmp_path: Path):
    same = run_script("compare.py", results, results).stdout
    assert f"{len(rows)} rows compared: 0 slower, 0 faster" in same
    changed = json.loads(results.read_text())
    for name in ("ms", "p10_ms", "p90_ms"):
        changed["rows"][0][name] *= 1000
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(changed))
    assert (
        f"{len(rows)} rows compared: 1 slower, 0 faster" in run_script("compare.py", results, slower).stdout
    )
    assert (
        f"{len(rows)} rows compared: 0 slower, 1 faster" in run_script("compare.py", slower, results).stdout
    )
