"""Decoding steps of one layer, one token per sequence, over a cache of random contents.

A step of this library is append_kv, with phi where a token finishes a compressed block, and decode_attention,
gate included. Dense is scaled_dot_product_attention over the whole of its cache; its append is not counted.

A call is several steps over several layers, each with a cache and weights of its own, so that they come from
memory and not from L2; on a GPU it is one CUDA graph. The lengths are on the device, differ from step to
step and grow from call to call, within SPAN around the case's length, then start anew. All sequences have the
same length, so all finish their blocks in the same step. What the steps of a direction are:

* ordinary: no token finishes a compressed block
* compressing: every token does
* mean: `compress_stride` steps one after the other, of which the last one is compressing
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from case import Case, Workload
from registry import implementation
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from work import decode_rows, row_bytes

from implementations.inputs import attention_options
from implementations.nsa import load_nsa_ext

SPAN = 256  # of the lengths
MAX_LAYERS = 32
BEYOND_L2 = 4  # caches that a call reads, as a multiple of L2
ROLLBACK = 16  # as NSACache has it by default: longer rings
SPARE_BYTES = 2 << 30  # for workspaces, graphs and libraries


class Storage:
    """Caches of several layers, as flat rows: contiguous, paged and dense attention read the same memory."""

    def __init__(self, case: Case) -> None:
        s, dtype, device = case.shape, getattr(torch, case.dtype), case.device
        self.room = case.length + SPAN // 2  # tokens of a sequence
        if case.length < SPAN // 2 or self.room % s.block_size or s.block_size % s.compress_stride:
            raise ValueError(f"length {case.length}: decoding is measured at multiples of {s.block_size}")
        self.num_layers = layers_of(case, row_bytes(case) * decode_rows(case))
        ring, tail = (
            min(self.room, reach - 1 + ROLLBACK) for reach in (s.window_size, s.compress_block_size)
        )
        rows = {"slc": self.room, "cmp": self.room // s.compress_stride, "swa": ring, "tail": tail}
        dims = (s.head_dim_qk, s.head_dim_v)
        needed = self.num_layers * case.batch * sum(rows.values()) * row_bytes(case)
        if device == "cuda" and needed + SPARE_BYTES > (free := free_bytes()):
            raise ValueError(
                f"does not fit: caches of {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )

        def random(*shape: int, std: float = 1.0) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device).normal_(std=std)

        def phi(dim: int) -> list[Tensor]:
            block, hidden = s.compress_block_size, s.compress_hidden_size
            shapes = ((block, dim), (block * dim, hidden), (hidden,), (hidden, dim), (dim,))
            stds = (0.1, (block * dim) ** -0.5, 0.1, hidden**-0.5, 0.1)
            return [random(1, *shape, std=std) for shape, std in zip(shapes, stds, strict=True)]

        self.layers = [
            {
                name: [random(case.batch * count, s.num_heads_kv, dim) for dim in dims]
                for name, count in rows.items()
            }
            for _ in range(self.num_layers)
        ]
        self.phi = [[x for dim in dims for x in phi(dim)] for _ in range(self.num_layers)]
        self.q = random(case.batch, s.num_heads_q, s.head_dim_qk)
        self.gate_logits = random(case.batch, s.num_heads_q, 3)
        self.new = [random(case.batch, s.num_heads_kv, dim) for dim in 3 * dims]
        positions = torch.arange(self.room, device=device)
        rope_dtype = torch.promote_types(dtype, torch.float32)
        self.rotary = load_nsa_ext().modules.rope_tables(positions, s.head_dim_qk, 10000.0, rope_dtype)
        self.graph_pool = torch.cuda.graph_pool_handle() if device == "cuda" else None  # outputs die at once


_storages: weakref.WeakValueDictionary[Case, Storage] = weakref.WeakValueDictionary()


def storage_of(case: Case) -> Storage:
    """The same one for all implementations, while one of them lives."""
    case = replace(case, variant="")
    storage = _storages.get(case)
    if storage is None:
        torch.manual_seed(case.seed)
        storage = _storages[case] = Storage(case)
    return storage


def free_bytes() -> int:
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + cached


def layers_of(case: Case, bytes_per_layer: int) -> int:
    """So many that what they read in one step exceeds L2 by far."""
    if case.device == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties().L2_cache_size
    return min(MAX_LAYERS, math.ceil(BEYOND_L2 * l2 / bytes_per_layer))


Step = Callable[[int, Tensor], object]  # of a layer, at int32 [B] tokens before the step


class DecodeWorkload(Workload):
    def __init__(
        self,
        case: Case,
        storage: Storage,
        layers: int,
        steps: dict[str, range],
        step: Step,
        bytes_of_step: int,
    ) -> None:
        self.case, self.storage, self.layers, self.steps, self.step = case, storage, layers, steps, step
        units = {direction: layers * len(steps[direction]) for direction in steps}
        size = {direction: bytes_of_step for direction in steps}
        first = self.lengths(range(1))[0]
        super().__init__((), lambda: step(0, first), bytes=size, units=units, context=torch.no_grad)
        self._calls: dict[str, Callable[[], object]] = {}

    def directions(self) -> tuple[str, ...]:
        return tuple(self.steps)

    def lengths(self, steps: range) -> Tensor:
        first = torch.tensor(steps, dtype=torch.int32) + (self.case.length - SPAN // 2)
        return first[:, None].repeat(1, self.case.batch).to(self.case.device)

    @torch.no_grad()
    def call(self, direction: str) -> Callable[[], object]:
        if direction not in self._calls:
            self._calls[direction] = self._captured(self.steps[direction])
        return self._calls[direction]

    def _captured(self, steps: range) -> Callable[[], object]:
        first = self.lengths(steps)
        lengths = first.clone()

        def run() -> None:
            for row in lengths:
                for layer in range(self.layers):
                    self.step(layer, row)

        if self.case.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.storage.graph_pool):
                run()
            run = graph.replay
        stride = self.case.shape.compress_stride
        growth = math.ceil((steps[-1] + 1) / stride) * stride  # keeps each step's place in its block
        calls = 0

        @torch.no_grad()
        def call() -> None:
            nonlocal calls
            run()
            calls += 1
            if calls % (SPAN // growth):
                lengths.add_(growth)
            else:
                lengths.copy_(first)

        return call


def _sparse(case: Case, page: int | None) -> Workload:
    nsa_ext, s, storage = load_nsa_ext(), case.shape, storage_of(case)
    batch, rows = case.batch, storage.room
    table = None
    if page is not None:
        width = storage.room // page
        table = torch.randperm(batch * width, device=case.device).int().view(batch, width)
        rows = page
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=case.device)
    options = attention_options(case)
    compression = {name: options[name] for name in ("compress_block_size", "compress_stride")}

    def paged(x: Tensor, rows: int) -> Tensor:
        return x.view(-1, rows, *x.shape[1:])

    layers = []
    for streams in storage.layers:
        cmp = [paged(x, rows // s.compress_stride) for x in streams["cmp"]]
        slc = [paged(x, rows) for x in streams["slc"]]
        rings = [x.view(batch, -1, *x.shape[1:]) for name in ("swa", "tail") for x in streams[name]]
        layers.append((*cmp, *slc, *rings))

    def step(layer: int, lengths: Tensor) -> tuple[Tensor, ...]:
        streams, phi = layers[layer], storage.phi[layer]
        where = {"cache_seqlens": lengths, "block_table": table, "cu_seqlens_q": offsets, "max_seqlen_q": 1}
        nsa_ext.ops.append_kv(*streams, *storage.new, *phi, *storage.rotary, **where, **compression)
        return nsa_ext.ops.decode_attention(storage.q, *streams[:6], storage.gate_logits, **where, **options)

    stride = s.compress_stride
    steps = {
        "mean": range(stride),
        "ordinary": range(stride - 1),
        "compressing": range(stride - 1, SPAN // 2, stride),
    }
    bytes_of_step = row_bytes(case) * decode_rows(case)
    return DecodeWorkload(case, storage, storage.num_layers, steps, step, bytes_of_step)


@implementation("decode", "nsa", growth=0)  # set-up and pauses are most of it
def contiguous(case: Case) -> Workload:
    return _sparse(case, page=None)


@implementation("decode", "nsa_paged", growth=0)  # set-up and pauses are most of it
def paged(case: Case) -> Workload:
    """Pages of one selection block, in random order."""
    return _sparse(case, page=case.shape.block_size)


def dense_step(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, softmax_scale: float, as_queries: bool
) -> Tensor:
    """Attention of one token per sequence, q [B, Hq, 1, Dk], to all of k, v [B, Hkv, S, D] -> [B, Hq, 1, Dv].

    Each key is read once for the heads of a group: the backend is told of it by enable_gqa, or is given them
    as queries of their KV head, which is the same without a mask (as_queries).
    """
    heads, groups = q.shape[1], k.shape[1]
    if as_queries:
        q = q.view(q.shape[0], groups, heads // groups, q.shape[-1])
    with sdpa_kernel(backend):
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=softmax_scale, enable_gqa=not as_queries and heads != groups
        )
    return o.reshape(o.shape[0], heads, 1, o.shape[-1])


def _dense(case: Case, backend: SDPBackend, as_queries: bool) -> Workload:
    s, storage = case.shape, storage_of(case)
    caches = [
        [x.view(case.batch, s.num_heads_kv, storage.room, -1)[:, :, : case.length] for x in streams["slc"]]
        for streams in storage.layers
    ]
    q = storage.q.unsqueeze(2)  # one token

    def step(layer: int, _: Tensor) -> tuple[Tensor, ...]:
        return (dense_step(q, *caches[layer], backend, case.softmax_scale, as_queries),)

    bytes_of_step = row_bytes(case) * case.length * case.batch
    layers = min(storage.num_layers, layers_of(case, bytes_of_step))
    return DecodeWorkload(case, storage, layers, {"mean": range(1)}, step, bytes_of_step)


# As each is faster on an H100: FlashAttention takes queries up to 18 % faster, cuDNN many times as slowly.
DENSE = {"sdpa_flash": (SDPBackend.FLASH_ATTENTION, True), "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, False)}


@implementation("decode", "sdpa_flash", growth=0)  # set-up and pauses are most of it
def sdpa_flash(case: Case) -> Workload:
    return _dense(case, *DENSE["sdpa_flash"])


@implementation("decode", "sdpa_cudnn", growth=0)  # set-up and pauses are most of it
def sdpa_cudnn(case: Case) -> Workload:
    return _dense(case, *DENSE["sdpa_cudnn"])
