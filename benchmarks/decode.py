"""Decoding with a cache against dense decoding: `python benchmarks/decode.py --device cuda --json FILE`.

A step appends one token to every sequence (`append_kv`, phi included) and attends it (`decode_attention`,
gate included); dense is scaled_dot_product_attention over the whole of its cache, append not counted. On a
GPU a step is one replay of a CUDA graph over several layers, each with a cache of its own, so that caches
come from memory and not from L2; the time is that of one layer. Bytes are the least that one layer reads.
The heads of a group go into dense attention as queries of one KV head, which the cuDNN backend does slowly:
its rows are no baseline.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from case import Shape
from implementations.nsa import load_nsa_ext
from machine import describe_machine
from timing import METHODS, measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

L2_BYTES = 256 << 20  # of caches, beyond every L2
SHAPES = {"cpu": Shape(), "cuda": Shape(64, 4, 128, 128)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
DENSE = {
    "cpu": {"sdpa": None},
    "cuda": {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION},
}
Step = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """What is measured: a batch of sequences that have `length` tokens each, `tokens` new ones per step."""

    batch: int
    length: int
    tokens: int
    device: str

    @property
    def shape(self) -> Shape:
        return SHAPES[self.device]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=DTYPES[self.device])

    def row_bytes(self) -> int:
        """Of K and V of one token."""
        s = self.shape
        return s.num_heads_kv * (s.head_dim_qk + s.head_dim_v) * DTYPES[self.device].itemsize

    def bytes(self, sparse: bool) -> int:
        s = self.shape
        rows = self.length
        if sparse:
            chosen = min(self.length, s.num_selected_blocks * s.block_size) * self.tokens
            rows = self.length // s.compress_stride + chosen + min(self.length, s.window_size)
        return self.batch * rows * self.row_bytes()

    def layers(self, cache_bytes: int) -> int:
        return 1 if self.device == "cpu" else max(1, min(64, L2_BYTES // max(1, cache_bytes)))


def sparse_step(point: Point, paged: bool) -> tuple[Step, int]:
    """A step over some layers, and their number."""
    nsa_ext, s = load_nsa_ext(), point.shape
    layers = point.layers(point.bytes(sparse=True))
    config = nsa_ext.NSAConfig(
        hidden_size=s.num_heads_q,
        num_heads=s.num_heads_q,
        num_kv_heads=s.num_heads_kv,
        head_dim=s.head_dim_qk,
        compress_hidden_size=s.compress_hidden_size,
    )
    room = point.length + point.tokens
    options = {"page_block_size": s.block_size} if paged else {}
    cache = nsa_ext.NSACache(
        config, layers, point.batch, room, dtype=DTYPES[point.device], device=point.device, **options
    )
    for layer in cache.layers:
        for stream in (*layer.pages, *layer.rings):
            stream.normal_()
    with cache.append(point.length):
        pass  # the lengths; the contents are random
    rows = point.batch * point.tokens
    q, gates = point.random(rows, s.num_heads_q, s.head_dim_qk), point.random(rows, s.num_heads_q, 3)
    new = [point.random(rows, s.num_heads_kv, s.head_dim_qk) for _ in range(6)]
    block, hidden, dim = s.compress_block_size, s.compress_hidden_size, s.head_dim_qk
    shapes = ((1, block, dim), (1, block * dim, hidden), (1, hidden), (1, hidden, dim), (1, dim))
    phi = [point.random(*shape) * 0.01 for shape in shapes]
    with cache.append(point.tokens):
        pass  # sets lengths and pages on the device
    arguments = {
        "cache_seqlens": cache.cache_seqlens,
        "block_table": cache.block_table,
        "cu_seqlens_q": cache.cu_seqlens_q,
        "max_seqlen_q": point.tokens,
    }

    def step() -> None:
        for c in cache.layers:
            caches = (c.k_cmp, c.v_cmp, c.k_slc, c.v_slc, c.k_swa, c.v_swa)
            nsa_ext.ops.append_kv(*caches, c.k_tail, c.v_tail, *new, *phi, *phi, *cache.rotary, **arguments)
            nsa_ext.ops.decode_attention(q, *caches, gates, **arguments)

    return step, layers


def dense_step(point: Point, backend: SDPBackend | None) -> tuple[Step, int]:
    s = point.shape
    layers = point.layers(point.bytes(sparse=False))
    shape = (point.batch, s.num_heads_kv, point.length, s.head_dim_qk)
    caches = [(point.random(*shape), point.random(*shape)) for _ in range(layers)]
    # The heads of a group as queries of one KV head: each key is read once, as in the sparse step.
    q = point.random(point.batch, s.num_heads_kv, s.group * point.tokens, s.head_dim_qk)

    def step() -> None:
        for k, v in caches:
            if backend is None:
                torch.nn.functional.scaled_dot_product_attention(q, k, v)
                continue
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return step, layers


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def measure_point(point: Point, args: argparse.Namespace) -> list[dict]:
    makers: dict[str, Callable[[], tuple[Step, int]]] = {
        "nsa contiguous": lambda: sparse_step(point, paged=False),
        "nsa paged": lambda: sparse_step(point, paged=True),
    }
    for name, backend in DENSE[point.device].items():
        makers[f"dense {name}"] = lambda backend=backend: dense_step(point, backend)
    method = METHODS[point.device]
    if args.quick:
        method = replace(method, rounds=2, min_rounds=1, burst_ms=5, pause_ms=0)
    rows = []
    for name, make in makers.items():
        try:
            step, layers = make()
            step = captured(step) if point.device == "cuda" else step
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"{point.batch:>5} {point.length:>7}  {name:<16} {str(error).splitlines()[0]}")
            continue
        timing = measure({name: lambda step=step: step}, point.device, method)[name]
        us = 1e3 * timing.ms / layers
        nbytes = point.bytes(sparse=name.startswith("nsa"))
        rows.append({**asdict(point), "impl": name, "us": us, "bytes": nbytes, "tbps": nbytes / us / 1e6})
        print(
            f"{point.batch:>5} {point.length:>7}  {name:<16} {us:>10.1f} {nbytes / us / 1e6:>8.3f}",
            flush=True,
        )
        del step
        if point.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(SHAPES), required=True)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="S", help="tokens in the cache")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens per sequence and step, 1 to 16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few calls: does it run at all")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    result = {"machine": describe_machine(args.device), "rows": []}
    print("  ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    print(f"batch  tokens  {'':<16} {'us':>10} {'TB/s':>8}")
    for batch in args.batches or ((1, 4) if on_cpu else (1, 8, 32, 128)):
        for length in args.lengths or ((4096, 16384, 65536) if on_cpu else (4096, 8192, 65536, 262144)):
            result["rows"] += measure_point(Point(batch, length, args.tokens, args.device), args)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
