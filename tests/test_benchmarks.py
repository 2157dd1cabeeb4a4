"""The benchmark scripts: a quick run writes the promised rows, and the scripts that read them can."""

import importlib
import itertools
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

import nsa_ext

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


# ---- Suites of the GPU, with tiny sizes on the CPU ----


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """The modules of benchmarks/ can be imported."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def run_suite(path: Path, suite: str, *arguments: object) -> dict:
    run_script("run.py", "--suite", suite, "--device", "cpu", "--quick", "--json", path, *arguments)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def decode_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decode") / "results.json"
    run_suite(path, "decode", "--lengths", 256, 512, "--batches", 1, 2)
    return path


def test_decode_measures_each_kind_of_step_beside_dense_attention(decode_results: Path):
    result = json.loads(decode_results.read_text())
    measured = {(row["impl"], row["direction"], row["batch"], row["length"]) for row in result["rows"]}
    sparse = itertools.product(("nsa", "nsa_paged"), ("mean", "ordinary", "compressing"), (1, 2), (256, 512))
    assert measured == {*sparse, *itertools.product(("sdpa_flash",), ("mean",), (1, 2), (256, 512))}
    assert {entry["impl"] for entry in result["absent"]} == {"sdpa_cudnn"}
    for row in result["rows"]:
        assert row.keys() >= PROMISED and 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"]
        tokens = row["length"]
        rows_read = tokens // 16 + min(tokens, 1024) + min(tokens, 512) if "nsa" in row["impl"] else tokens
        assert row["bytes"] == row["batch"] * rows_read * 4 * 512


def test_decode_has_a_table_and_a_plot(decode_results: Path, tmp_path: Path):
    table = run_script("table.py", decode_results).stdout
    for batch, length in itertools.product((1, 2), (256, 512)):
        assert f"| {batch} | {length} |" in table
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    run_script("plot.py", decode_results, "--output", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_prefill_measures_chunks_beside_training_and_dense_attention(tmp_path: Path):
    result = run_suite(tmp_path / "results.json", "prefill", "--lengths", 256)
    impls = {"nsa", "nsa_chunks_2048", "nsa_chunks_8192", "nsa_training", "sdpa_flash"}
    assert {row["impl"] for row in result["rows"]} == impls
    table = run_script("table.py", tmp_path / "results.json").stdout
    assert "| 256 |" in table and "x nsa_training" in table


@pytest.mark.parametrize("suite", ["training", "gqa"])
def test_time_that_is_over_leaves_a_whole_file(suite: str, tmp_path: Path):
    result = run_suite(
        tmp_path / "results.json", suite, "--lengths", 64, "--seconds", 0.001, "--impls", "nsa"
    )
    assert {entry["reason"] for entry in result["absent"][-2:]} == {"its time is over"}


def test_training_measures_dense_attention_once_for_all_data(tmp_path: Path):
    options = (
        "--ops",
        "attention",
        "--lengths",
        64,
        "--data",
        "random",
        "smooth",
        "flat",
        "--impls",
        "nsa",
        "sdpa_flash",
    )
    rows = run_suite(tmp_path / "results.json", "training", *options)["rows"]
    numbers = {(row["impl"], row["data"], row["direction"]): row for row in rows}
    for direction, data in itertools.product(("forward", "backward"), ("smooth", "flat")):
        copy, original = numbers["sdpa_flash", data, direction], numbers["sdpa_flash", "random", direction]
        assert copy == original | {"data": data, "measured_on": "random"}
        assert "measured_on" not in numbers["nsa", data, direction]


def plain_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Head by head: head h of q belongs to KV head h // G."""
    group = q.shape[1] // k.shape[1]
    o = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        logits = k[b, h // group].double() @ q[b, h, 0].double() * scale
        o[b, h, 0] = logits.softmax(0) @ v[b, h // group].double()
    return o


def test_data_is_what_it_says(scripts: None) -> None:
    case = importlib.import_module("case")
    q = {data: case.Case(4096, data=data).generator()(4096, 64) for data in case.DATA}
    assert 0.98 < q["random"].std() < 1.02 and 0.29 < q["flat"].std() < 0.31
    neighbours = {data: (x[1:] * x[:-1]).mean() / x.square().mean() for data, x in q.items()}
    assert neighbours["smooth"] > 0.95 and abs(neighbours["random"]) < 0.02


@pytest.mark.parametrize("as_queries", [False, True])
def test_the_dense_step_is_attention_of_one_token(scripts: None, as_queries: bool):
    decode = importlib.import_module("implementations.decode")
    q, k, v = (torch.randn(2, heads, rows, 16) for heads, rows in ((6, 1), (2, 70), (2, 70)))
    o = decode.dense_step(q, k, v, SDPBackend.MATH, 0.3, as_queries)
    torch.testing.assert_close(o.double(), plain_decode(q, k, v, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["sdpa_flash", "sdpa_cudnn"])
def test_the_dense_step_of_a_backend_is_attention_of_one_token(scripts: None, impl: str):
    decode = importlib.import_module("implementations.decode")
    q, k, v = (torch.randn(2, heads, rows, 128).bfloat16() for heads, rows in ((64, 1), (4, 300), (4, 300)))
    backend, as_queries = decode.DENSE[impl]
    o = decode.dense_step(q.cuda(), k.cuda(), v.cuda(), backend, 0.09, as_queries)
    torch.testing.assert_close(o.cpu().double(), plain_decode(q, k, v, 0.09), atol=4e-3, rtol=8e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lengths_grow_between_the_calls_of_a_decoding_step(scripts: None, device: str):
    case, decode = importlib.import_module("case"), importlib.import_module("implementations.decode")
    shape = case.Shape(8, 2, 64, 64)
    point = case.Case(512, shape, batch=2, dtype="bfloat16", device=device)
    storage = decode.storage_of(point)
    counted = torch.zeros(512, dtype=torch.int32, device=device)
    steps = {"mean": range(16), "ordinary": range(15), "compressing": range(15, 128, 16)}

    def step(layer: int, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        counted.index_add_(0, lengths[:1].long() - 384, torch.ones_like(counted[:1]))
        return (counted,)

    work = decode.DecodeWorkload(point, storage, 1, steps, step, 1)
    for direction in steps:
        call = work.call(direction)
        counted.zero_()
        for _ in range(256 // (128 if direction == "compressing" else 16)):
            call()
        seen = counted.nonzero().flatten().tolist()
        finishing = [s for s in range(256) if (s + 1) % 16 == 0]
        others = [s for s in range(256) if s not in finishing]
        assert seen == {"mean": list(range(256)), "ordinary": others, "compressing": finishing}[direction]
        assert counted.max() == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pages_and_rows_hold_the_same_cache_sizes(scripts: None, device: str):
    case, decode = importlib.import_module("case"), importlib.import_module("implementations.decode")
    point = case.Case(512, case.Shape(8, 2, 64, 64), batch=2, dtype="bfloat16", device=device)
    for build in (decode.contiguous, decode.paged):
        work = build(point)
        o, indices, lse = work.forward()
        assert o.isfinite().all() and lse.isfinite().all()
        assert indices.max() == (512 - 128) // 64  # the own block of a token behind 384 others


def test_memory_that_does_not_suffice_ends_a_row_and_nothing_else(
    scripts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run, registry = importlib.import_module("run"), importlib.import_module("registry")

    def too_large(case: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setitem(registry.REGISTRY["attention"], "sdpa", too_large)
    path = tmp_path / "results.json"
    words = ["--suite", "cpu", "--ops", "attention", "--lengths", "64", "128", "--quick", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--directions", "forward"])
    threads = torch.get_num_threads()
    assert run.main() == 0
    torch.set_num_threads(threads)
    result = json.loads(path.read_text())
    assert [(row["impl"], row["length"]) for row in result["rows"]] == [("nsa", 64), ("nsa", 128)]
    reason = "out of memory: tried to allocate too much"
    assert [(entry["impl"], entry["reason"]) for entry in result["absent"]] == 2 * [("sdpa", reason)]


def test_memory_that_runs_out_within_a_burst_leaves_the_others(scripts: None):
    timing = importlib.import_module("timing")
    calls = []

    def fails_at_the_third_call() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")

    prepare = {"good": lambda: lambda: None, "bad": lambda: fails_at_the_third_call}
    method = timing.Method(burst_ms=0, min_calls=1, pause_ms=0, rounds=5)
    timings, failures = timing.measure(prepare, "cpu", method)
    assert failures.keys() == {"bad"} and timings["good"].calls == 5 and timings["good"].rounds == 5


def test_a_limit_shortens_bursts_and_rounds(scripts: None):
    timing = importlib.import_module("timing")
    method = timing.Method(burst_ms=50, min_calls=3, pause_ms=100)
    bursts, rounds = timing.plan({"long": 1000.0, "short": 5.0}, method)
    assert (bursts["long"], bursts["short"], rounds) == (timing.Burst(3, True), timing.Burst(10, True), 2)
    bursts, rounds = timing.plan({"long": 1000.0, "short": 5.0}, replace(method, limit_s=3))
    assert (bursts["long"], bursts["short"], rounds) == (timing.Burst(1, False), timing.Burst(10, True), 1)


def test_the_revision_is_known_outside_git(scripts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    machine = importlib.import_module("machine")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.git_revision() == nsa_ext.build_info()["git_revision"]
    monkeypatch.setenv("NSA_REVISION", "abc1234")
    assert machine.git_revision() == "abc1234"
